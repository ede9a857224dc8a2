"""Find the programs among the parameters of equations, however deeply they are nested.

JAX's own primitives hold programs as they are or in tuples. A library with its own primitives may
pass on whole pytrees: equinox keeps the structure of the operands in one parameter and the leaves
that are not arrays in another. Both can hold programs, whose rules count like any others.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from jax import tree_util

from freevars.jax._compat.private import core

__all__ = [
    "JAXPR_TYPES",
    "has_parts",
    "is_flatten",
    "make_structure",
    "map_programs",
    "nested_programs",
    "take_apart",
]

JAXPR_TYPES = tuple({core.Jaxpr, getattr(core, "ClosedJaxpr", core.Jaxpr)})

PyTreeDef = tree_util.PyTreeDef


def has_parts(eqn: Any) -> bool:
    """Whether a parameter of an equation may hold anything; most are numbers, names and dtypes."""
    return not _PLAIN.issuperset(map(type, eqn.params.values()))


def nested_programs(eqn: Any) -> list[Any]:
    """The programs, open or closed, among the parameters of an equation."""
    found: list[Any] = []
    for value in eqn.params.values():
        if type(value) not in _PLAIN:
            _collect(value, found)
    return found


def _collect(x: Any, found: list[Any]) -> None:
    if isinstance(x, JAXPR_TYPES):
        found.append(x)
    else:
        for y in take_apart(x)[0]:
            _collect(y, found)


def map_programs(x: Any, change: Callable[[Any], Any]) -> Any:
    """A parameter with `change` applied to each program in it; the same object where it gives the
    same programs."""
    if type(x) in _PLAIN:
        return x
    if isinstance(x, JAXPR_TYPES):
        return change(x)
    parts, make = take_apart(x)
    made = [map_programs(y, change) for y in parts]
    return x if all(map(operator.is_, made, parts)) else make(made)


Parts: TypeAlias = tuple[Sequence[Any], Callable[[Sequence[Any]], Any]]


def take_apart(x: Any) -> Parts:
    """What a parameter consists of, and how it is made of other parts. A function or object that is
    no pytree has none: it is never looked into."""
    kind = type(x)
    if kind in _PLAIN:
        return (), tuple
    if isinstance(x, (tuple, list)):
        return x, (lambda parts: kind(*parts)) if hasattr(x, "_fields") else kind
    if kind is dict:
        return list(x.values()), lambda parts: dict(zip(x, parts, strict=True))
    if isinstance(x, PyTreeDef):
        return _parts_of_structure(x)
    if kind is functools.partial:
        whole = (x.func, x.args, x.keywords)
        return whole, lambda parts: functools.partial(parts[0], *parts[1], **parts[2])
    if is_flatten(x):
        return _parts_of_flatten(x)
    if is_node(x):
        leaves, tree = tree_util.tree_flatten(x)
        return (tree, *leaves), lambda parts: tree_util.tree_unflatten(parts[0], parts[1:])
    return (), tuple


_PLAIN = {type(None), bool, int, float, str, *[type(np.dtype(c)) for c in np.typecodes["All"]]}


def is_node(x: Any) -> bool:
    """Whether an object is a pytree with parts, neither a leaf nor one that is static whole."""
    if tree_util.all_leaves([x]):
        return False
    node = tree_util.tree_structure(x, is_leaf=lambda y: y is not x).node_data()
    return node is not None and node[1] is not x


def _parts_of_structure(tree: Any) -> Parts:
    node = tree.node_data()
    if node is None:  # a leaf
        return (), tuple

    def make(parts: Sequence[Any]) -> Any:
        return make_structure((node[0], parts[0]), parts[1:])

    return (node[1], *tree.children()), make


def make_structure(node: tuple[Any, Any] | None, children: Sequence[Any]) -> Any:
    """A tree structure of what `node_data` and `children` say of it."""
    if node is None:
        return tree_util.tree_structure(0)
    return _make_structure(tree_util.default_registry, node, list(children))


# It lost a word of its name in JAX 0.10.
_make_structure: Any = getattr(PyTreeDef, "from_node_data_and_children", None) or getattr(
    PyTreeDef, "make_from_node_data_and_children", None
)


def is_flatten(x: Any) -> bool:
    """Whether a parameter is such an object of equinox's: see `_parts_of_flatten`."""
    kind = type(x)
    return kind.__name__ == "Flatten" and kind.__module__ == "equinox.internal._primitive"


def _parts_of_flatten(x: Any) -> Parts:
    """Those of an object in which a primitive of equinox's keeps the structure of its results, and
    the leaves of these that are no arrays.

    The primitive makes one afresh whenever it is bound, writes it while its results are inferred,
    and refuses to write anything else later, so that what it holds is all that it means. The public
    ways to make such a primitive (`equinox.internal.filter_primitive_def` and `_bind`) make this
    object themselves and hand it to nobody, so that its class has to be known by name.
    """

    def make(parts: Sequence[Any]) -> Any:
        made = type(x)()
        made.treedef_out, made.static_out = parts
        return made

    return ((x.treedef_out, x.static_out) if x.called() else ()), make
