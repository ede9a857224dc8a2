"""Minima with constraints: what holds there, which constraints are active, and what is refused.

    min f(x)   subject to   c(x) = 0,   g(x) >= 0,   lower <= x <= upper.

Where a minimum is regular there are multipliers, and with the active set A (the inequalities that
hold as equations) x and they are the root of the Karush-Kuhn-Tucker system

    x_i - bound_i = 0            where a bound of x_i is active
    [grad f - c'^T l - g'^T m]_i = 0     elsewhere
    c(x) = 0
    g_k(x) = 0 for k in A,       m_k = 0 for the others.

Its derivative is that of the minimum as long as the active set stays: the rule of a root does the
rest, second derivatives included. The multiplier of a bound is the gradient of the Lagrangian at
its component and no unknown.

*Active.* Each inequality has a gap and a pull, of which one is zero. Both are measured so that no
unit counts: the gap relative to how much the constraint changes over the size of x, the pull (the
force of the multiplier) relative to how much the gradient of the Lagrangian changes over it, and to
its terms. A constraint is active where its pull exceeds its gap. A solver that stops at a distance
from the bound, as interior-point methods do, is read rightly as long as it is precise: what it
leaves is the product of the two.

*Size.* A component that lies on a bound of zero has no size of its own: its value there is an error
of the solver. It is as large as what changes the equations by their terms: `natural_size`. Bounds
tell the size too, unless they are so far away that they stand for none: `reach`. Where all of x is
zero, what a solver leaves of it is no size either: `least_size`.

*Degenerate.* Where both are zero the minimum has a derivative on each side, and they differ. Both
count as zero below eps^(2/3), or below ten times what the solver leaves of the other equations; and
where both are small and neither is much smaller than the other: there an interior-point method
leaves the root of what it leaves elsewhere.

*Multipliers* are found from x: those that minimise

    | W D (grad f - c'^T l - g'^T m) |^2 + | gap * m |^2

with m in units of the objective, D the size of x, W near zero where a bound may be active, and gaps
of at most 1, since how far away an inequality is that plays no part must not be seen. The
solver's own would be no better: where the active gradients are independent, these are as precise as
x; where they are not, the system is singular at all of them, and of two equal constraints a solver
may give everything to one, so that the other looks degenerate.

Sources: Fiacco 1983, "Introduction to Sensitivity and Stability Analysis in Nonlinear Programming",
chapter 3 (the derivative); Facchinei, Fischer, Kanzow 1998, "On the accurate identification of
active constraints" (the multipliers). Not here: the linear algebra, which is the host's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from freevars._solvers.verdict import Kind, Limits, is_minimum
from freevars.errors import FreevarsError, NotASolutionError, SingularError

__all__ = [
    "CONSTRAINTS",
    "WRONG",
    "Found",
    "Pair",
    "Side",
    "are_crossed",
    "explain",
    "least_size",
    "natural_size",
    "on_the_spot",
    "pair",
    "reach",
    "saturated",
    "take_constraints",
    "threshold",
]

# The parameters of a solver that are constraints, if it is one of minima.
CONSTRAINTS = ("bounds", "equality", "inequality")

# A multiplier below this, relative, is no rounding error.
WRONG = -1e-2

_SHARE = 0.03  # of the larger of a gap and a pull, above which the smaller is not zero
_SHOWN = 3  # constraints that an error lists


def take_constraints(kind: Kind, options: Mapping[str, Any], *, conserved: bool) -> dict[str, Any]:
    """The constraints among the options of a call, those that are None left out.

    Raises:
        TypeError: one of them is not what a constraint is.
    """
    if not is_minimum(kind):
        return {}
    given = {name: options[name] for name in CONSTRAINTS if name in options}
    for name in ("equality", "inequality"):
        if given.get(name) is not None and not callable(given[name]):
            message = (
                f"{name}: expected a function of x, whose result is"
                f" {'0' if name == 'equality' else '0 or more'}, or None, got {given[name]!r}."
            )
            raise TypeError(message)
    bounds = given.get("bounds")
    if bounds is not None and not (isinstance(bounds, (tuple, list)) and len(bounds) == 2):  # noqa: PLR2004
        message = (
            "bounds: expected a pair (lower, upper), each like x0, a number, or None for no bound,"
            f" got {bounds!r}."
        )
        raise TypeError(message)
    active = {name: value for name, value in given.items() if value is not None}
    if active and conserved:
        message = (
            "conserved: expected no constraints beside it. Give the totals as equality= instead."
        )
        raise TypeError(message)
    return active


class Pair(NamedTuple):
    """A gap and a pull, which are complementary: arrays of the host."""

    active: Any  # bool
    certain: Any  # the larger of the two: zero where nothing tells which of them is zero
    left: Any  # the absolute value of that which should be zero


def pair(xp: Any, gap: Any, pull: Any, eps: float) -> Pair:
    """Which of the two counts."""
    active = gap < pull
    zero = xp.zeros_like(pull)
    toward, distance = xp.where(pull > 0, pull, zero), xp.abs(gap)
    larger, smaller = xp.maximum(distance, toward), xp.minimum(distance, toward)
    undecided = (smaller > _SHARE * larger) & (larger < eps**0.25)
    return Pair(
        active,
        xp.where(undecided, zero, larger),
        xp.abs(xp.where(active, gap, xp.where(pull > 0, pull, xp.where(gap < 0, gap, zero)))),
    )


def are_crossed(lower: Any, upper: Any, size: Any, near: float) -> Any:
    """Where nothing lies between two bounds of a component of a size, or one is no number."""
    is_nan = (lower != lower) | (upper != upper)  # noqa: PLR0124
    return (upper - lower < -near * size) | is_nan


def natural_size(xp: Any, size: Any, coupling: Any, largest: Any, eps: float) -> Any:
    """How large components are, also where the bound that they lie on is zero.

    `coupling` is what a change of the component changes of all equations, relative to their terms:
    a change of 1 / coupling counts. Where it does not count next to the `largest` size, or to how
    far the solver came, the equations are linear and do not tell; then the component is as large as
    it is.
    """
    tells = coupling * largest > eps**0.5
    by_equations = 1 / xp.where(tells, coupling, xp.ones_like(coupling))
    return xp.where(tells, xp.maximum(size, by_equations), size)


def least_size(way: Any, eps: float) -> Any:
    """The least size of x, from how far the solver came: anything smaller is an error of the
    solver."""
    return eps**0.5 * way


def reach(xp: Any, largest: Any, eps: float) -> Any:
    """The distance from zero up to which a bound indicates the size of x, given its `largest`.

    One that is farther away means no bound, such as 1e20. Where x is zero, any finite one counts.
    """
    finite = xp.finfo(largest.dtype).max
    return xp.where(largest > 0, xp.clip(largest / eps**0.5, 0, finite), finite)


def saturated(xp: Any, gap: Any) -> Any:
    """A gap as it is where it is small, and 1 where it is large or infinite."""
    near = xp.clip(gap, -1e3, 1e3)
    return near / xp.sqrt(1 + near**2)


def on_the_spot(xp: Any, value: Any, constant: Any, near: Any) -> Any:
    """A row of F that holds by decision: its derivative, without its value where that is near 0.

    The distance that an interior-point method keeps from a bound is not an error of x, nor is what
    rounding leaves of a multiplier of zero. `constant` is the value without its derivative.
    """
    return value - xp.where(near, constant, xp.zeros_like(constant))


def threshold(xp: Any, left: Any, eps: float) -> Any:
    """The value up to which both sides of a pair count as zero, given the residual of the
    equations."""
    return xp.clip(10 * left, *_zero(eps))


def _zero(eps: float) -> tuple[float, float]:
    """The least and the largest threshold."""
    return eps ** (2 / 3), eps**0.25


class Side(NamedTuple):
    """One side of a bound, or an inequality, in Python numbers."""

    name: str
    gap: float
    pull: float
    certain: float  # as in `Pair`

    @staticmethod
    def of_bound(
        side: str,
        component: str,
        gap: float,
        other: float,
        pull: float,
        certain: float,
        *,
        eps: float,
    ) -> Side:
        """The "lower" or "upper" side; `other` is the gap of the other one."""
        force = pull if side == "lower" else -pull
        # What pulls away from one side may lean on the other.
        force = max(force, 0.0) if other < eps**0.25 else force
        return Side(f"the {side} bound of {component}", gap, force, certain)


class Found(NamedTuple):
    """What an error looks at, in Python numbers."""

    sides: list[Side]
    crossed: list[str]  # the components whose bounds leave no place between them
    violated: float  # the largest equality constraint, relative
    left: float  # of the equations, relative
    dependent: bool  # the gradients of the active constraints are


def explain(name: str, found: Found, limits: Limits, eps: float) -> FreevarsError | None:
    """The error in terms of the constraints, if they explain why there is no derivative."""
    sides = found.sides
    if found.crossed:
        return NotASolutionError(
            f"{name}: nothing lies between the bounds of {_listed(found.crossed)}: expected lower"
            " <= upper, and neither of them NaN."
        )
    if not math.isfinite(found.violated):
        return None  # it is not by the constraints that there is no derivative
    outside = [f"{s.name} by {-s.gap:.1e}" for s in sides if s.gap < -limits.certain]
    if found.violated > limits.certain:
        outside.append(f"the equality constraint by {found.violated:.1e}")
    if outside:
        return NotASolutionError(
            f"{name}: the result violates {_listed(outside)}, relative to the size of x. Let the"
            " solver run longer or to a tighter tolerance."
        )
    if found.dependent:
        return SingularError(
            f"{name}: the gradients of the active constraints are not independent, so that their"
            " multipliers are not determined. Leave out constraints that follow from the others."
        )
    near = limits.certain
    wrong = [f"{s.name} ({s.pull:.1e})" for s in sides if abs(s.gap) <= near and s.pull < WRONG]
    if wrong:
        return NotASolutionError(
            f"{name}: the multiplier of {_listed(wrong)} has the wrong sign, relative to the"
            " gradient's terms: the result lies on the constraint, and the objective falls away"
            " from it. The solver did not converge, or inequality(x) >= 0 is written the other way"
            " round."
        )
    low, high = _zero(eps)
    least = min(max(10 * found.left, low), high)
    zero = [s.name for s in sides if s.certain <= least]
    if zero:
        return NotASolutionError(
            f"{name}: degenerate: {_listed(zero)} is reached with a multiplier of zero, so the"
            " derivative of the minimum differs on each side of this point. one_sided=True takes"
            " the one that keeps the constraint active."
        )
    return None


def _listed(items: list[str]) -> str:
    shown = ", ".join(items[:_SHOWN])
    return f"{shown} and {len(items) - _SHOWN} more" if len(items) > _SHOWN else shown
