"""Arguments as an array part and a static part, and what a call may bring in their place.

The leaves of a pytree that JAX takes as arrays are traced; every other leaf (a string, a function,
a dtype, an enum) is static: the function sees it as it is, and a call must bring an equal one. A
leaf that was changed in place is not equal. Not here: tracing, and what happens to the values once
they fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import tree_util

from freevars._difference import Difference, Node, first_difference
from freevars.errors import StructureError
from freevars.jax import _compat
from freevars.jax._convert.static import Static

__all__ = [
    "ArgSpec",
    "combine",
    "describe",
    "fit",
    "insert",
    "int_ranges",
    "mismatch",
    "partition",
    "same_static",
    "too_large",
]


class ArgSpec(NamedTuple):
    """A pytree without its arrays: its structure, a type for each array leaf, the static leaves."""

    tree: Any  # PyTreeDef
    types: tuple[Any, ...]  # one abstract value for each array leaf
    statics: tuple[tuple[int, Static], ...]  # position among all leaves, leaf

    @property
    def is_plain(self) -> bool:
        """Whether it holds no object of the user's: no static leaf, and built-in containers
        alone."""
        return not self.statics and _is_plain(self.tree)

    def struct(self) -> Any:
        """The pytree with a `jax.ShapeDtypeStruct` for each array."""
        shapes = [
            jax.ShapeDtypeStruct(t.shape, t.dtype, weak_type=t.weak_type)
            if hasattr(t, "shape") and hasattr(t, "weak_type")
            else t
            for t in self.types
        ]
        return tree_util.tree_unflatten(self.tree, self.combine(shapes))

    def avals(self) -> Any:
        """The pytree with the type for each array: an abstract value, which says more."""
        return tree_util.tree_unflatten(self.tree, self.combine(self.types))

    def combine(self, arrays: Sequence[Any]) -> list[Any]:
        """All leaves, from the array leaves and the static ones."""
        return insert(arrays, [(i, leaf.value) for i, leaf in self.statics])


def _is_plain(tree: Any) -> bool:
    node = tree.node_data()  # None for a leaf
    return (node is None or node[0] in (tuple, list, dict, type(None))) and all(
        map(_is_plain, tree.children())
    )


def partition(tree: Any) -> tuple[list[Any], Any, list[tuple[int, Any]]]:
    """The array leaves of a pytree, its structure, and the other leaves with their positions."""
    leaves, treedef = tree_util.tree_flatten(tree)
    arrays: list[Any] = []
    statics: list[tuple[int, Any]] = []
    for i, leaf in enumerate(leaves):
        if _compat.is_array(leaf):
            arrays.append(leaf)
        else:
            statics.append((i, leaf))
    return arrays, treedef, statics


def insert(arrays: Sequence[Any], others: Iterable[tuple[int, Any]]) -> list[Any]:
    """All leaves, from the array leaves and the others with their positions."""
    leaves = list(arrays)
    for position, leaf in others:  # in rising order, so each lands where it was
        leaves.insert(position, leaf)
    return leaves


def combine(spec: ArgSpec, arrays: Sequence[Any]) -> Any:
    """The pytree that `spec` describes, with these arrays."""
    return tree_util.tree_unflatten(spec.tree, spec.combine(arrays))


def fit(x: Any, expected: Any, *, weak_matters: bool) -> Any:
    """`x` as a value of the expected type, or None where it is none.

    A scalar of weak type (a Python number, or a tracer of one) fits a scalar of its kind, and any
    value of weak type one of the same dtype. A value of strong type fits a weak one where
    `weak_matters` is False: where no result of the program depends on the weakness.
    """
    try:
        got = _compat.example_type(x)
    except TypeError:
        return None
    if got == expected:
        return x
    if not (hasattr(got, "shape") and hasattr(expected, "shape")) or got.shape != expected.shape:
        return None
    if not (hasattr(got, "weak_type") and hasattr(expected, "weak_type")):
        return None
    if got.dtype == expected.dtype and got.weak_type == expected.weak_type:
        return x
    if got.dtype == expected.dtype:
        return _compat.cast(x, expected) if got.weak_type or not weak_matters else None
    number = got.weak_type and got.shape == ()
    if number and _compat.kind(got.dtype) == _compat.kind(expected.dtype):
        return _compat.cast(x, expected)
    return None


def int_ranges(types: Sequence[Any]) -> tuple[tuple[int, int, int], ...]:
    """The places of the integer scalars among some types, each with its least and largest value.

    There a Python number fits by its kind, and JAX would cast it without a range check.
    """
    ranges = []
    for i, t in enumerate(types):
        if getattr(t, "shape", None) == () and jax.dtypes.issubdtype(t.dtype, np.integer):
            limits = jax.numpy.iinfo(t.dtype)
            ranges.append((i, int(limits.min), int(limits.max)))
    return tuple(ranges)


def too_large(leaves: Sequence[Any], ranges: Sequence[tuple[int, int, int]]) -> int | None:
    """The place of the first Python number that does not fit, or None."""
    for i, least, largest in ranges:
        if i < len(leaves) and type(leaves[i]) is int and not least <= leaves[i] <= largest:
            return i
    return None


def describe(x: Any) -> str:
    """A type as an error message shows it: `float32[3]`, `weak float32[]`, or the static leaf."""
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = ",".join(map(str, x.shape))
        return f"{'weak ' if x.weak_type else ''}{x.dtype}[{shape}]"
    if isinstance(x, _compat.VALUES):
        weak = "weak " if getattr(x, "weak_type", False) else ""
        return weak + x.str_short(short_dtypes=False)
    if _compat.is_array(x):
        return describe(_compat.example_type(x))
    return repr(x)


def mismatch(
    spec: ArgSpec, got: Any, *, name: str, weak_matters: bool, hint: str = ""
) -> StructureError | None:
    """The error for the first path at which `got` is not as `spec` says, or None if it fits.

    `hint` says what to do next, in place of converting again.
    """

    def differ(expected: Any, leaf: Any) -> tuple[str, str] | None:
        if isinstance(expected, _StaticLeaf):
            if same_static(expected.static, leaf):
                return None
            if expected.static.value is leaf:
                return "the static leaf as it was", f"{leaf!r}, which was changed in place since"
            return f"the static leaf {expected!r}", describe(leaf)
        if (
            _compat.is_array(leaf)
            and fit(leaf, expected.type, weak_matters=weak_matters) is not None
        ):
            return None
        return describe(expected.type), describe(leaf)

    expected = tree_util.tree_unflatten(
        spec.tree,
        insert([_Type(t) for t in spec.types], [(i, _StaticLeaf(s)) for i, s in spec.statics]),
    )
    found = first_difference(expected, got, take_apart=_take_apart, differ=differ)
    if found is None:
        treedef = tree_util.tree_structure(got)
        if treedef == spec.tree:
            return None
        found = Difference("", str(spec.tree), str(treedef))
    weak = found.expected.startswith("weak ") and not found.got.startswith("weak ")
    hint = hint or (
        " The example was a Python number or another weakly typed value, and the result depends on"
        " that: pass one here, or convert with an example of a definite dtype."
        if weak and found.expected.removeprefix("weak ") == found.got
        else " Pass what it expects: a solver calls its function with values like those that it was"
        " given to start from. Or convert the function again with an example like this call."
    )
    return StructureError(
        f"{name}{found.path} does not match the example: expected {found.expected},"
        f" got {found.got}.{hint}"
    )


def same_static(expected: Static, got: Any) -> bool:
    """Whether a call brought a static leaf equal to the example's, as that was then."""
    return type(expected.value) is type(got) and Static(got) == expected


class _Type:
    def __init__(self, type: Any) -> None:  # noqa: A002
        self.type = type

    def __repr__(self) -> str:
        return describe(self.type)


class _StaticLeaf:
    def __init__(self, static: Static) -> None:  # which is no leaf itself
        self.static = static

    def __repr__(self) -> str:
        return repr(self.static)


def _take_apart(x: Any) -> Node | None:
    """One level of a JAX pytree."""
    children, _ = tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    if len(children) == 1 and children[0][0] == ():
        return None
    kind = "None" if x is None else f"a {type(x).__name__}"
    return Node(kind, [(tree_util.keystr(path), child) for path, child in children])
