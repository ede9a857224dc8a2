"""Compare two nested structures and name the first path that differs.

Each host says how to take a structure apart; this file walks two of them side by side. Not here:
what a host accepts as equal types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Difference", "Node", "first_difference"]


class Node(NamedTuple):
    """One container, taken apart: a text for its kind, and each child with the text of its key."""

    kind: str
    children: list[tuple[str, Any]]


class Difference(NamedTuple):
    """Where two structures differ: the path as Python would write it, and what is there in each."""

    path: str
    expected: str
    got: str


def first_difference(
    expected: Any,
    got: Any,
    *,
    take_apart: Callable[[Any], Node | None],
    differ: Callable[[Any, Any], tuple[str, str] | None],
    path: str = "",
) -> Difference | None:
    """The first path, depth first, at which `got` is not as `expected`; None if there is none.

    `take_apart(x)` gives the `Node` of a container and None for a leaf; `differ(expected, got)`
    gives the texts of two leaves that do not match and None for two that do.
    """
    a, b = take_apart(expected), take_apart(got)
    if a is None and b is None:
        texts = differ(expected, got)
        return None if texts is None else Difference(path, *texts)
    kind_a = a.kind if a else f"a leaf, {_short(expected)}"
    kind_b = b.kind if b else f"a leaf, {_short(got)}"
    if a is None or b is None or a.kind != b.kind:
        return Difference(path, kind_a, kind_b)
    theirs = dict(b.children)
    for key, child in a.children:
        if key not in theirs:
            return Difference(path + key, _short(child), "nothing")
        found = first_difference(
            child, theirs.pop(key), take_apart=take_apart, differ=differ, path=path + key
        )
        if found is not None:
            return found
    for key, child in theirs.items():
        return Difference(path + key, "nothing", _short(child))
    return None


def _short(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."


_SHORT = 60  # characters
