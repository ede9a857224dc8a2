"""A pytree in which only arrays are leaves: everything else is sealed into its structure.

JAX compiles once for each structure of what a function is given, so a string, a function or a
Python number that is sealed counts as part of the program. Two sealed values are equal only if they
are of one type and mean the same: 1, 1.0 and True differ, and so do 0.0 and -0.0. Not here: which
leaves are to be sealed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
from jax import tree_util

from freevars.jax._convert.callable_key import Same, scalar_key

__all__ = ["as_static", "from_static", "static_key", "tree_key"]


@tree_util.register_static
class Static:
    """One value as part of a structure."""

    __slots__ = ("_key", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self._key = static_key(value)

    def __eq__(self, other: object) -> bool:
        return type(other) is Static and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return repr(self.value)


def static_key(x: Any) -> Hashable:
    """A key for what is part of a structure: Python's equality, but numbers as in `scalar_key`."""
    if isinstance(x, np.generic):
        return (type(x), x.dtype, x.tobytes())
    if isinstance(x, (float, complex)):
        return scalar_key(x)
    if isinstance(x, tuple):
        return (type(x), tuple(map(static_key, x)))
    if isinstance(x, frozenset):
        return (type(x), len(x), frozenset(map(static_key, x)))
    try:
        hash(x)
    except TypeError:
        return Same(x)
    params = getattr(type(x), "__dataclass_params__", None)
    if params is not None and params.eq:  # its fields are compared as Python compares them
        fields = tuple(static_key(getattr(x, f.name)) for f in dataclasses.fields(x) if f.compare)
        return (type(x), x, fields)
    return (type(x), x)


def tree_key(tree: Any) -> Hashable:
    """A key for a tree structure in which the metadata of its nodes count as in `static_key`."""
    try:
        hash(tree)
    except TypeError:
        # Metadata that does not hash: equal to itself alone.
        return object()
    return (tree, tuple(_metadata(tree)))


def _metadata(tree: Any) -> Iterator[Hashable]:
    node = tree.node_data()  # None for a leaf
    if node is None or node[1] is None:
        yield from ()
    elif isinstance(node[1], list):  # the keys of a dict
        yield tuple(map(static_key, node[1]))
    else:
        yield static_key(node[1])
    for child in tree.children():
        yield from _metadata(child)


def as_static(tree: Any, is_leaf: Callable[[Any], bool]) -> Any:
    """The pytree with every leaf sealed that is not to stay one."""
    return tree_util.tree_map(lambda x: x if is_leaf(x) else Static(x), tree)


def from_static(tree: Any) -> Any:
    """The pytree as it was before `as_static`."""
    return tree_util.tree_map(
        lambda x: x.value if isinstance(x, Static) else x, tree, is_leaf=_is_static
    )


def _is_static(x: Any) -> bool:
    return isinstance(x, Static)
