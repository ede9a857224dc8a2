"""A pytree in which only arrays are leaves: everything else is sealed into its structure.

JAX compiles once for each structure of what a function is given, so a string, a function or a
Python number that is sealed counts as part of the program. Two sealed values are equal only if they
are of one type and mean the same: 1, 1.0 and True differ, and so do 0.0 and -0.0. Not here: which
leaves are to be sealed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from jax import tree_util

from freevars._callable_key import Same, scalar_key

__all__ = ["seal", "unseal"]


@tree_util.register_static
class _Sealed:
    """One value as part of a structure."""

    __slots__ = ("_key", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self._key = _key(value)

    def __eq__(self, other: object) -> bool:
        return type(other) is _Sealed and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return repr(self.value)


def _key(x: Any) -> Hashable:
    if isinstance(x, np.generic):
        return (type(x), x.dtype, x.tobytes())
    if isinstance(x, (float, complex)):
        return scalar_key(x)
    if isinstance(x, frozenset):
        return (type(x), frozenset(map(_key, x)))
    try:
        hash(x)
    except TypeError:
        return Same(x)
    if dataclasses.is_dataclass(x):  # a frozen one, whose fields compare as Python compares them
        fields = tuple(_key(getattr(x, f.name)) for f in dataclasses.fields(x))
        return (type(x), x, fields)
    return (type(x), x)


def seal(tree: Any, is_leaf: Callable[[Any], bool]) -> Any:
    """The pytree with every leaf sealed that is not to stay one."""
    return tree_util.tree_map(lambda x: x if is_leaf(x) else _Sealed(x), tree)


def unseal(tree: Any) -> Any:
    """The pytree as it was before `seal`."""
    return tree_util.tree_map(
        lambda x: x.value if isinstance(x, _Sealed) else x, tree, is_leaf=_is_sealed
    )


def _is_sealed(x: Any) -> bool:
    return isinstance(x, _Sealed)
