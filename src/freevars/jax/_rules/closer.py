"""A closer look at a Newton step that is not small next to the solution.

Such a step has four harmless causes. It may be short, with the same derivative at both ends: x is
good enough. A component of the solution may be zero, so that everything the solver leaves there is
error: the next iterate is zero to within its own error. Or x may be as near as rounding allows: the
function does not notice when x changes by a part of the step. In these two cases the step is
measured by a part of how far the solver came. Or F may be computed in fewer digits than x has, as
matrix products are on a GPU: along half of the step it deviates from a parabola by as much as the
step is long. Then the step is measured by the largest component. In all other cases it is measured
by the component itself, however small that is next to the start.

The derivative is compared in a few directions p of what it is taken with respect to, each of which
changes every entry of that relative to itself. At x it is y = -A^-1 dF/dt p. At x - s it leaves a
residual in its own equation, dF/dx y + dF/dt p, that moves it by A^-1 of that, to first order. A
component counts relative to the largest that it is in these directions.

This takes values of F, solves with four right-hand sides, and for each direction three derivatives
of F and two solves. It is computed only where needed, one solve after the other: besides the
current one, memory holds only the step, the second step, and two bits for each component. Not here:
the values of F (`seen`), and the figures that need no closer look.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from freevars._solvers.verdict import Limits
from freevars.jax import _compat
from freevars.jax._rules.coordinates import magnitude
from freevars.jax._rules.seen import (
    NO_LONGER,
    Equations,
    Seen,
    Step,
    Units,
    each,
    error_in_terms,
    in_units,
    like_state,
    relative_to,
    see,
)

__all__ = ["look"]

Tree: TypeAlias = Any  # a pytree of real arrays
Solve: TypeAlias = Callable[[Tree], Tree]  # b -> A^-1 b
Along: TypeAlias = Callable[[Tree, Tree, Any], Tree]


def look(
    solve: Solve,
    equations: Equations,
    at: Step,
    limits: Limits,
    largest: Callable[[Tree], Any],
    *,
    floor: float,
    number: int,
    closely: bool,
    mixed: bool = False,
    alone: Callable[[Tree], Tree] | None = None,
) -> tuple[Any, Any]:
    """The largest component of the step in its unit, and the change of the derivative along it.

    Args:
        solve: the system.
        equations: F, whose directions are those for the p above.
        at: the step.
        limits: of the verdict.
        largest: the largest absolute value of a component.
        floor: a component of y counts as this at least, relative to the largest one.
        number: of directions, in which the derivative is compared.
        closely: else nothing is asked. Where something has to be, the change is NaN.
        mixed: the step is that of F and something else, enough to see that it is small. Where it is
            not, that of F alone is taken.
        alone: takes the most of that something else out of the step; None: nothing does.
    """
    most = largest(at.v)
    units = Units.of(at, limits, most)
    size = largest(in_units(at.step, units.near))
    if alone is not None and closely:
        at, size = _alone(alone, at, size, limits, most, largest)
    needed = size > limits.negligible
    if alone is None or closely:  # it is the step of F
        if not limits.negligible < limits.step:  # `tol`: whatever the derivative does
            return size, jnp.zeros_like(size)
        of_zero = jax.tree.map(functools.partial(_unit_of_zero, limits), units.whole, at.far)
        reach = largest(in_units(at.step, of_zero))
        needed &= reach <= limits.step
    if not closely:
        return size, jnp.where(needed, jnp.nan, jnp.zeros_like(size))

    along = equations.along

    def turn(state: tuple[Any, Any, Any, Tree]) -> tuple[Any, Any, Any, Tree]:
        needed, size, change, step = state
        here = at._replace(step=step)
        seen = see(solve, equations.at, here, limits, largest, (needed, size), mixed=mixed)
        here = here._replace(step=seen.step)
        error = error_in_terms(seen, here.rounding, largest)
        units = Units.of(here, limits, most, needed & False)
        found, after = _measure(seen, error, here, units, limits, largest)
        change = jnp.where(seen.on, after, change).astype(size.dtype)
        size = jnp.where(seen.on, found, seen.size).astype(size.dtype)
        if along is None:
            change = jnp.where(size > limits.certain, jnp.inf, change)
        else:
            on = seen.on & (size > limits.negligible) & (change <= limits.change)

            def compare(state: tuple[Any, Any]) -> tuple[Any, Any]:
                on, change = state
                y, moved = _derivative(solve, along, here, on, number)
                units = Units.of(here, limits, most, on & False)
                new = _change(y, moved, error, here, units, floor, largest)
                return like_state(on & False, on), like_state(jnp.maximum(change, new), change)

            change = _compat.while_loop(lambda state: state[0], compare, (on, change))[1]
        return like_state(needed & False, needed), size, change, seen.step

    # A loop of at most one iteration, not a `cond`, which would compute it for every member under
    # `vmap`. Members that need no look take a step of zero, since F may not be defined at its end.
    step = jax.tree.map(lambda s: jnp.where(needed, s, 0), at.step)
    begin = (needed, size, jnp.zeros_like(size), step)
    return _compat.while_loop(lambda state: state[0], turn, begin)[1:3]


def _alone(
    alone: Callable[[Tree], Tree],
    at: Step,
    size: Any,
    limits: Limits,
    most: Any,
    largest: Callable[[Tree], Any],
) -> tuple[Step, Any]:
    """The step alone where it is not negligible, and its largest component in its unit."""

    def turn(state: tuple[Any, Any, Tree]) -> tuple[Any, Any, Tree]:
        needed, size, step = state
        step = alone(step)
        near = Units.of(at, limits, most, needed & False).near
        return (
            like_state(needed & False, needed),
            like_state(largest(in_units(step, near)), size),
            step,
        )

    begin = (size > limits.negligible, size, at.step)
    _, size, step = _compat.while_loop(lambda state: state[0], turn, begin)
    return at._replace(step=step), size


def _measure(
    seen: Seen,
    error: Any,
    at: Step,
    units: Units,
    limits: Limits,
    largest: Callable[[Tree], Any],
) -> tuple[Any, Any]:
    """The largest component of the step in the unit that it counts by, and what a second step is
    beside it."""
    eps = limits.column**2

    def sort(
        v: Any,
        step: Any,
        following: Any,
        marks: Any,
        rounding: Any,
        far: Any,
        near: Any,
        wide: Any,
        whole: Any,
    ) -> tuple[Any, Any]:
        last = v - step - following
        following, long = jnp.abs(following), jnp.abs(step)
        large = long > limits.negligible * near
        noise = jnp.maximum(4 * eps, error).astype(v.dtype) * rounding
        blurred = (marks % 2 == 1) & (following <= NO_LONGER * long)
        after = 2 * following * following / jnp.where(long > 0, long, 1)
        unknown = (jnp.abs(last) <= 4 * eps * following + after) | (marks >= 2)  # noqa: PLR2004
        is_zero = large & unknown & (following <= limits.change * long)
        coarse = large & (long <= error * rounding)
        unit = jnp.where(blurred, wide, near)
        unit = jnp.where(is_zero, _unit_of_zero(limits, near, far), unit)
        unit = jnp.where(coarse, jnp.maximum(unit, whole), unit)
        relative = relative_to(step, unit)
        # Such a step is never negligible: the derivative is looked at along it.
        relative = jnp.where(coarse, jnp.maximum(relative, 2 * limits.negligible), relative)
        left = jnp.where(blurred, 0, jnp.maximum(following - noise, 0)).astype(long.dtype)
        return relative, relative_to(left, unit)

    trees = at.v, seen.step, seen.following, seen.blurred, at.rounding, at.far
    steps, following = each(sort, *trees, *units)
    found = largest(steps)
    return found, largest(following) / jnp.where(found > 0, found, 1)


def _unit_of_zero(limits: Limits, near: Any, far: Any) -> Any:
    return jnp.maximum(near, (limits.column**0.5 * far).astype(near.dtype))


def _derivative(solve: Solve, along: Along, at: Step, on: Any, number: int) -> tuple[Tree, Tree]:
    """The largest of each component of the derivative at x, and of what it changes by to the end
    of the step, in a number of directions."""
    still = jax.tree.map(lambda v: jnp.where(on, 0, v), at.v)
    end = jax.tree.map(lambda v, s: v - jnp.where(on, s, 0), at.v, at.step)

    def in_direction(which: Any) -> tuple[Tree, Tree]:
        y = jax.tree.map(jnp.negative, solve(along(at.v, still, which)))
        # Less the residual of a rough solve.
        moved = solve(jax.tree.map(jnp.subtract, along(end, y, which), along(at.v, y, which)))
        return jax.tree.map(magnitude, (y, moved))

    if number == 1:
        return in_direction(jnp.uint32(0))
    found = jax.lax.map(in_direction, jnp.arange(number, dtype=jnp.uint32))
    return jax.tree.map(lambda each: jnp.max(each, axis=0), found)


def _change(
    y: Tree,
    moved: Tree,
    error: Any,
    at: Step,
    units: Units,
    floor: float,
    largest: Callable[[Tree], Any],
) -> Any:
    """The largest change of a component of the derivative, relative to that, beyond what the error
    in the terms of F explains: those of the derivative's equation are as coarse."""
    noise = jnp.where(error > 0, error * largest(in_units(y, units.whole)), 0)
    least = floor * largest(in_units(y, units.wide))

    def beyond(moved: Any, rounding: Any) -> Any:
        return jnp.maximum(moved - noise.astype(moved.dtype) * rounding, 0)

    unit = jax.tree.map(lambda y, w: jnp.maximum(y, least.astype(w.dtype) * w), y, units.wide)
    return largest(in_units(jax.tree.map(beyond, moved, at.rounding), unit))
