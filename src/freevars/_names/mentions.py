"""Members of modules and classes, followed where some code mentions their names.

A module or class has many members that a function never reads. A member is followed once the search
has met both its owner and code that mentions its name, in either order.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from freevars._names.links import Attribute, Node

__all__ = ["Mentions"]

# Where a module or class was met, what it holds, and the instance attributes that hide its own.
_Holder = tuple[Node, Mapping[str, Any], Mapping[str, object]]


class Mentions:
    """The names in the code read so far, and the holders of members, by the names of these.

    Both are looked up by name, so the cost of a search is their sum, not their product.
    """

    def __init__(self) -> None:
        self._order: dict[str, int] = {}  # of the names, as they were read
        self._holders: dict[str, list[_Holder]] = {}

    def holder(
        self, node: Node, members: Mapping[str, Any], hidden: Mapping[str, object] | None = None
    ) -> Iterator[Node]:
        """Add a module or class: what code has mentioned already, in the order of that code."""
        found = node, members, hidden or {}
        for name in members:
            self._holders.setdefault(name, []).append(found)
        order = self._order
        for name in sorted(members.keys() & order.keys(), key=order.__getitem__):
            yield from _member(found, name)

    def read(self, names: Iterable[str]) -> Iterator[Node]:
        """Add the names in a piece of code: what the holders met so far have under them."""
        for name in names:
            if name not in self._order:
                self._order[name] = len(self._order)
                for found in list(self._holders.get(name, ())):
                    yield from _member(found, name)


def _member(found: _Holder, name: str) -> Iterator[Node]:
    node, members, hidden = found
    if name in members and name not in hidden:
        yield Node(members[name], node, Attribute(name))
