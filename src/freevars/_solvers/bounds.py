"""Find the components of a result that seem to lie on a bound that stopped the solver.

A solver that stops early leaves numbers of many digits; one that a bound stops leaves the bound:
one among its options or, of a minimum, a round number. Not here: what follows (`failures.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite
from typing import NamedTuple

from freevars._solvers.verdict import Kind, is_minimum

__all__ = ["Component", "on_a_bound"]

_SHOWN = 3  # components that are listed


class Component(NamedTuple):
    """One real number of a result."""

    name: str  # as a person writes it: x[1]
    value: float
    change: float  # by a Newton step
    shown: str  # its value
    rounded: Callable[[float], float]  # a number in its precision


def on_a_bound(
    components: Iterable[Component], options: Iterable[float], kind: Kind, limit: float
) -> list[str]:
    """The first few that should move by more than `limit`, relative, and have a value that no
    iteration would produce, such as `x[1] = 0.0`."""
    given = list(options)
    found = []
    for name, value, change, shown, rounded in components:
        if abs(change) > limit * abs(value):
            bound = any(value == rounded(g) for g in given)
            if bound or (is_minimum(kind) and _is_round(value, rounded)):
                found.append(f"{name} = {shown}")
    if len(found) > _SHOWN:
        return [*found[:_SHOWN], f"{len(found) - _SHOWN} more"]
    return found


def _is_round(value: float, rounded: Callable[[float], float]) -> bool:
    return isfinite(value) and rounded(float(f"{value:.3g}")) == value
