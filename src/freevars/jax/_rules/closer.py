"""A closer look at a Newton step that is not small next to the solution.

Such a step has four reasons. It is short, and the derivative is the same at both of its ends: x is
good enough. The solution has a component that is zero, so that all of what a solver leaves there is
an error: the next iterate is zero up to what is known of it. Or x is as near as rounding allows:
the function does not see a change of x by a part of the step. In these two the step counts by how
far the solver came. Or F is computed in fewer digits than x has, as products of matrices are on a
GPU: it is not straight along half of the step, by as much as the step is long. Then the step counts
by the largest component. In any other case it counts by the component itself, however small that is
next to the start.

The derivative is compared in a few directions p of what it is asked by, each of which changes every
entry of that relative to itself. At x it is y = -A^-1 dF/dt p. At x - s it leaves a residual in its
own equation, dF/dx y + dF/dt p, that moves it by A^-1 of that, to first order. A component counts
relative to the largest that it is in these directions.

It takes five values of F, solves with four right-hand sides, and for each direction takes two of
its derivatives and solves twice; all of it is computed only where asked for. Not here: the figures
that need no closer look.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from freevars._solvers.verdict import Limits
from freevars.jax import _compat
from freevars.jax._rules.coordinates import magnitude

__all__ = ["Step", "look"]

Tree: TypeAlias = Any  # a pytree of real arrays

_PART = 1 / 16  # of a step: a function is straight along it where Newton's method works
_HALF = 1 / 2  # of a step: what is lost in coarse arithmetic is on its scale
_BLURRED = 0.5  # how far it is from that where it does not see a change of x
_NO_LONGER = 16  # than the first step is a second one where both are noise


class Step(NamedTuple):
    """A Newton step at x, in trees like x."""

    v: Tree  # x
    f: Tree  # F there
    step: Tree
    near: Tree  # the unit of each component
    far: Tree  # how far the solver came with it
    rounding: Tree  # what a relative error of 1 in the terms of F moves it by


def look(
    apply: Callable[[Tree], Tree],
    inverse: Callable[[Tree], Tree],
    again: Callable[[Tree], Tree],
    along: Callable[[Tree, Tree, Any], Tree] | None,
    at: Step,
    limits: Limits,
    largest: Callable[[Tree], Any],
    *,
    floor: float,
    number: int,
    mixed: bool = False,
) -> tuple[Any, Any]:
    """The largest component of the step in its unit, and the change of the derivative along it.

    Args:
        apply: the system.
        inverse: solves it for right-hand sides stacked along a first axis.
        again: F.
        along: (v, d, number) -> the direction of F at v for d and the p of this number; None: not
            known.
        at: the step.
        limits: of the verdict.
        largest: the largest absolute value of a component.
        floor: a component of y counts as this at least, relative to the largest one.
        number: of directions, in which the derivative is compared.
        mixed: the step is that of F and something else, enough to see that it is small. Here that
            of F alone is taken.
    """
    units = _Units.of(at, limits, largest)
    size = largest(_over(at.step, at.near))
    reach = largest(_over(at.step, jax.tree.map(jnp.maximum, units.wide, units.whole)))
    needed = (size > limits.negligible) & (reach <= limits.step)

    def one(side: Tree) -> Tree:
        return jax.tree.map(lambda x: x[0], inverse(jax.tree.map(lambda x: x[None], side)))

    def of_needed(tree: Tree, zero: Any) -> Tree:
        # Members of a batch that do not need it take no step: F may not be defined there.
        return jax.tree.map(lambda x: jnp.where(needed, x, 0) + zero.astype(x.dtype), tree)

    def turn(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        # What depends on the state is computed in the loop; the rest XLA moves out of it.
        zero = state[2]
        step = one(of_needed(at.f, zero)) if mixed else of_needed(at.step, zero)
        seen = _see(inverse, again, at._replace(step=step), limits)
        error = _error(seen, at.rounding, largest)
        found, change = _measure(seen, error, at, units, limits, largest)
        if along is None:
            change = jnp.where(found > limits.certain, jnp.inf, change)
        else:
            still = jax.tree.map(lambda v: jnp.broadcast_to(zero, v.shape).astype(v.dtype), at.v)
            still = jax.tree.map(_compat.like_type, still, at.v)
            directions = jnp.arange(number, dtype=jnp.uint32)
            points = (at.v, still, seen.end)
            y, moved = _derivative(apply, one, along, points, directions)
            of_derivative = _change(y, moved, error, at, units, floor, largest)
            change = jnp.maximum(change, of_derivative)
        return _like(needed & False, needed), _like(found, size), _like(change, size)

    if not limits.negligible < limits.step:  # `tol`: whatever the derivative does
        return size, jnp.zeros_like(size)
    # A loop of no or one turn, not a `cond`: under `vmap` that would compute it for every member.
    begin = (needed, size, jnp.zeros_like(size))
    return jax.lax.while_loop(lambda state: state[0], turn, begin)[1:]


class _Units(NamedTuple):
    """What a component counts by where it does not count by itself; trees like x."""

    wide: Tree  # how far the solver came
    whole: Tree  # the largest component, or less where the terms of F move it by less

    @staticmethod
    def of(at: Step, limits: Limits, largest: Callable[[Tree], Any]) -> _Units:
        most = largest(at.v)

        def wide(near: Any, far: Any) -> Any:
            return jnp.maximum(near, (limits.column * far).astype(near.dtype))

        def whole(near: Any, rounding: Any) -> Any:
            return jnp.maximum(near, jnp.minimum(rounding, most.astype(rounding.dtype)))

        return _Units(
            jax.tree.map(wide, at.near, at.far), jax.tree.map(whole, at.near, at.rounding)
        )


class _Seen(NamedTuple):
    """What values of F say of a step, in trees like x. F sees a change d of x as A^-1 (F(x) -
    F(x - d)), which is d where F is straight."""

    step: Tree
    large: Tree  # bool: where the step is not negligible
    end: Tree  # x - step
    following: Tree  # the second step, by the same A
    bent: Tree  # how far F is from straight along half of the step
    part: Tree  # a part of the step, where that is large
    part_seen: Tree  # what F sees of it
    last: Tree  # the next iterate, after the second step
    last_part: Tree  # a part of that
    last_part_seen: Tree  # what F sees of it there


def _see(
    inverse: Callable[[Tree], Tree], again: Callable[[Tree], Tree], at: Step, limits: Limits
) -> _Seen:
    """Five values of F, and what the system makes of them."""
    v, f, step = at.v, at.f, at.step
    large = jax.tree.map(lambda s, n: jnp.abs(s) > limits.negligible * n, step, at.near)

    def part_of(s: Any, v: Any, large: Any) -> Any:
        short = jnp.where(v == 0, jnp.abs(s), jnp.minimum(jnp.abs(s), jnp.abs(v)))
        return jnp.where(large, jnp.sign(s) * short * _PART, 0).astype(v.dtype)

    def values(points: list[Tree]) -> Tree:
        # One at a time: F may hold what has no batches.
        return jax.lax.map(again, jax.tree.map(lambda *each: jnp.stack(each), *points))

    part = jax.tree.map(part_of, step, v, large)
    half = jax.tree.map(lambda s: s * _HALF, step)
    end, *others = (jax.tree.map(jnp.subtract, v, d) for d in (step, part, half))
    there = values([end, *others])
    found = inverse(jax.tree.map(lambda f, g: jnp.stack([g[0], f - g[1], f - g[2]]), f, there))
    following, part_seen, half_seen = (jax.tree.map(lambda x, i=i: x[i], found) for i in range(3))
    # The next iterate tells from zero what is next to nothing beside the step.
    last = jax.tree.map(jnp.subtract, end, following)
    last_part = jax.tree.map(lambda x, on: jnp.where(on, x * _PART, 0).astype(x.dtype), last, large)
    there = values([last, jax.tree.map(jnp.subtract, last, last_part)])
    last_part_seen = inverse(jax.tree.map(lambda g: (g[0] - g[1])[None], there))
    return _Seen(
        step,
        large,
        end,
        following,
        jax.tree.map(jnp.subtract, half_seen, half),
        part,
        part_seen,
        last,
        last_part,
        jax.tree.map(lambda x: x[0], last_part_seen),
    )


def _error(seen: _Seen, rounding: Tree, largest: Callable[[Tree], Any]) -> Any:
    """The relative error in the terms of F with which a change of x as long as half of the step is
    blurred; 0 where the second step is longer than such an error explains."""
    error = largest(_over(seen.bent, rounding)) / (_HALF * _BLURRED)
    beyond = largest(_over(seen.following, rounding))
    return jnp.where(beyond <= _NO_LONGER * error, error, 0)


def _is_blurred(d: Any, seen: Any) -> Any:
    return jnp.abs(seen - d) >= _BLURRED * jnp.abs(d)


def _measure(
    seen: _Seen,
    error: Any,
    at: Step,
    units: _Units,
    limits: Limits,
    largest: Callable[[Tree], Any],
) -> tuple[Any, Any]:
    """The largest component of the step in the unit that it counts by, and what a second step is
    beside it."""
    eps = limits.column**2

    def sort(seen: _Seen, near: Any, rounding: Any, wide: Any, whole: Any) -> tuple[Any, Any]:
        following, long = jnp.abs(seen.following), jnp.abs(seen.step)
        noise = jnp.maximum(4 * eps, error).astype(rounding.dtype) * rounding
        blurred = _is_blurred(seen.part, seen.part_seen) & (following <= _NO_LONGER * long)
        after = 2 * following * following / jnp.where(long > 0, long, 1)
        unknown = jnp.abs(seen.last) <= 4 * eps * following + after
        unknown |= _is_blurred(seen.last_part, seen.last_part_seen)
        is_zero = unknown & (following <= limits.change * long)
        blurred, is_zero = seen.large & blurred, seen.large & is_zero
        coarse = seen.large & (long <= error * rounding)
        unit = jnp.where(blurred | is_zero, wide, near)
        unit = jnp.where(coarse, jnp.maximum(unit, whole), unit)
        relative = _relative(seen.step, unit)
        # Such a step is never negligible: the derivative is looked at along it.
        relative = jnp.where(coarse, jnp.maximum(relative, 2 * limits.negligible), relative)
        left = jnp.where(blurred, 0, jnp.maximum(following - noise, 0)).astype(long.dtype)
        return relative, _relative(left, unit)

    tree = jax.tree.structure(seen.step)
    of_leaves = map(_Seen, *map(jax.tree.leaves, seen))
    parts = map(jax.tree.leaves, (at.near, at.rounding, *units))
    pairs = [sort(*leaves) for leaves in zip(of_leaves, *parts, strict=True)]
    steps, following = (tree.unflatten(each) for each in zip(*pairs, strict=True))
    found = largest(steps)
    return found, largest(following) / jnp.where(found > 0, found, 1)


def _derivative(
    apply: Callable[[Tree], Tree],
    one: Callable[[Tree], Tree],
    along: Callable[[Tree, Tree, Any], Tree],
    points: tuple[Tree, Tree, Tree],
    directions: Any,
) -> tuple[Tree, Tree]:
    """The largest of each component of the derivative at x, and of what it changes by to the end
    of the step, in some directions. `one` solves the system; the points are x, 0, the end."""
    v, still, end = points

    def in_direction(number: Any) -> tuple[Tree, Tree]:
        here = along(v, still, number)
        y = jax.tree.map(jnp.negative, one(here))
        here = jax.tree.map(jnp.add, apply(y), here)  # the residual of a rough solve
        moved = one(jax.tree.map(jnp.subtract, along(end, y, number), here))
        return jax.tree.map(magnitude, (y, moved))

    found = jax.lax.map(in_direction, directions)
    return jax.tree.map(lambda each: jnp.max(each, axis=0), found)


def _change(
    y: Tree,
    moved: Tree,
    error: Any,
    at: Step,
    units: _Units,
    floor: float,
    largest: Callable[[Tree], Any],
) -> Any:
    """The largest change of a component of the derivative, relative to that, beyond what the error
    in the terms of F explains: those of the derivative's equation are as coarse."""
    noise = jnp.where(error > 0, error * largest(_over(y, units.whole)), 0)
    least = floor * largest(_over(y, units.wide))

    def beyond(moved: Any, rounding: Any) -> Any:
        return jnp.maximum(moved - noise.astype(moved.dtype) * rounding, 0)

    unit = jax.tree.map(lambda y, w: jnp.maximum(y, least.astype(w.dtype) * w), y, units.wide)
    return largest(_over(jax.tree.map(beyond, moved, at.rounding), unit))


def _like(a: Any, b: Any) -> Any:
    return _compat.like_type(a.astype(b.dtype), b)


def _over(v: Tree, unit: Tree) -> Tree:
    return jax.tree.map(_relative, v, unit)


def _relative(a: Any, unit: Any) -> Any:
    """In units; what is not zero in no unit is infinite."""
    return jnp.where(a == 0, 0, jnp.abs(a) / unit)
