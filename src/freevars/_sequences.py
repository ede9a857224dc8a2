"""Replace some of the values in a list, as a derivative with respect to some of them does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

__all__ = ["replaced"]

T = TypeVar("T")


def replaced(values: Iterable[T], places: Iterable[int], some: Iterable[T]) -> list[T]:
    """The values, with `some` in the given places."""
    result = list(values)
    for i, value in zip(places, some, strict=True):
        result[i] = value
    return result
