"""A key of many parts that is hashed once. Not here: what the parts are."""

from __future__ import annotations

from collections.abc import Hashable

__all__ = ["Key"]


class Key:
    """A key of many parts, hashed once.

    Programs share nested programs, so the number of paths through a key may be exponential. Two
    keys that were found equal remember it, and each pair is compared once.
    """

    __slots__ = ("__weakref__", "_hash", "_parts", "_token")

    def __init__(self, parts: Hashable) -> None:
        self._parts = parts
        self._hash = hash(parts)
        self._token = object()

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(other) is not Key or self._hash != other._hash:
            return False
        if self._token is other._token:
            return True
        if self._parts != other._parts:
            return False
        other._token = self._token
        return True
