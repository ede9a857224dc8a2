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

It takes values of F, solves with four right-hand sides, and for each direction takes three of its
derivatives and solves twice. All of it is computed only where asked for, and one after the other:
what lies in memory beside one solve is the step, the second one, and two bits of each component.
Not here: the figures that need no closer look.
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
Solve: TypeAlias = Callable[[Tree], Tree]  # b -> A^-1 b
Along: TypeAlias = Callable[[Tree, Tree, Any], Tree]

_PART = 1 / 16  # of a step: a function is straight along it where Newton's method works
_HALF = 1 / 2  # of a step: what is lost in coarse arithmetic is on its scale
_BLURRED = 0.5  # how far it is from that where it does not see a change of x
_NO_LONGER = 16  # than the first step is a second one where both are noise


class Step(NamedTuple):
    """A Newton step at x. Trees are like x, and the last three may be of scalars."""

    v: Tree  # x
    step: Tree
    least: Tree  # the unit of a component that is smaller than this
    far: Tree  # how far the solver came with it
    rounding: Tree  # what a relative error of 1 in the terms of F moves it by


def look(
    solve: Solve,
    again: Callable[[Tree], Tree],
    along: Along | None,
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
        solve: the system.
        again: F.
        along: (v, d, number) -> the direction of F at v for d and the p of this number; None: not
            known.
        at: the step.
        limits: of the verdict.
        largest: the largest absolute value of a component.
        floor: a component of y counts as this at least, relative to the largest one.
        number: of directions, in which the derivative is compared.
        mixed: the step is that of F and something else, enough to see that it is small. Where it is
            not, that of F alone is taken.
    """
    most = largest(at.v)
    units = _Units.of(at, limits, most)
    size = largest(_over(at.step, units.near))
    if not limits.negligible < limits.step:  # `tol`: whatever the derivative does
        return size, jnp.zeros_like(size)
    reach = largest(_over(at.step, jax.tree.map(jnp.maximum, units.wide, units.whole)))
    needed = (size > limits.negligible) & (reach <= limits.step)

    def turn(state: tuple[Any, Any, Any, Tree]) -> tuple[Any, Any, Any, Tree]:
        needed, size, change, step = state
        here = at._replace(step=step)
        seen = _see(solve, again, here, limits, largest, (needed, size), mixed=mixed)
        here = here._replace(step=seen.step)
        error = _error(seen, here.rounding, largest)
        units = _Units.of(here, limits, most, needed & False)
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
                units = _Units.of(here, limits, most, on & False)
                new = _change(y, moved, error, here, units, floor, largest)
                return _like(on & False, on), _like(jnp.maximum(change, new), change)

            change = jax.lax.while_loop(lambda state: state[0], compare, (on, change))[1]
        return _like(needed & False, needed), size, change, seen.step

    # A loop of no or one turn, not a `cond`: under `vmap` that would compute it for every member.
    # So each of them has a step, and one that does not need this takes none: F may not be defined
    # there.
    step = jax.tree.map(lambda s: jnp.where(needed, s, 0), at.step)
    begin = (needed, size, jnp.zeros_like(size), step)
    return jax.lax.while_loop(lambda state: state[0], turn, begin)[1:3]


class _Units(NamedTuple):
    """What a component counts by; trees like x."""

    near: Tree  # itself
    wide: Tree  # how far the solver came, where it does not count by itself
    whole: Tree  # the largest component, or less where the terms of F move it by less

    @staticmethod
    def of(at: Step, limits: Limits, most: Any, never: Any = False) -> _Units:  # noqa: FBT002
        """`never` is False, and depends on the state of a loop: then units are computed where they
        are used. XLA would else compute them before the loop, and keep them."""

        def units(v: Any, least: Any, far: Any, rounding: Any) -> tuple[Any, Any, Any]:
            near = jnp.maximum(jnp.abs(v), jnp.where(never, 0, least).astype(v.dtype))
            wide = jnp.maximum(near, (limits.column * far).astype(v.dtype))
            whole = jnp.maximum(near, jnp.minimum(rounding, most).astype(v.dtype))
            return near, wide, whole

        return _Units(*_each(units, at.v, at.least, at.far, at.rounding))


class _Seen(NamedTuple):
    """What values of F say of a step; the state of the loop that asks one after the other. F sees a
    change d of x as A^-1 (F(x) - F(x - d)), which is d where F is straight."""

    question: Any  # the number of the next one
    on: Any  # bool: whether there is one
    size: Any  # of the step, by `near`
    bent: Any  # how far F is from straight along half of the step, in units of rounding
    step: Tree
    following: Tree  # the second step, by the same A
    blurred: Tree  # 1: F does not see a part of the step; 2: nor a part of the next iterate


# The questions.
_STEP, _HALF_STEP, _PART_STEP, _FOLLOWING, _LAST, _END = range(6)


def _see(
    solve: Solve,
    again: Callable[[Tree], Tree],
    at: Step,
    limits: Limits,
    largest: Callable[[Tree], Any],
    begin: tuple[Any, Any],
    *,
    mixed: bool,
) -> _Seen:
    """What is seen from a step on; `begin` is whether to ask, and the size of the step."""

    def points(number: Any, seen: _Seen) -> tuple[Tree, Tree, Tree, Tree]:
        """One point, the way to another, whether the step is large, and the units."""
        # Computed anew, or XLA would keep |x| and the like beside x.
        x = jax.tree.map(lambda v: jnp.where(number < 0, 0, v), at.v)
        near = _Units.of(at._replace(v=x), limits, 0, number < 0).near

        def of_leaf(v: Any, s: Any, t: Any, near: Any) -> tuple[Any, Any, Any]:
            large = jnp.abs(s) > limits.negligible * near
            short = jnp.where(v == 0, jnp.abs(s), jnp.minimum(jnp.abs(s), jnp.abs(v)))
            # The next iterate tells from zero what is next to nothing beside the step.
            last = v - s - t
            part = jnp.where(number == _LAST, last, jnp.sign(s) * short) * _PART
            d = jnp.where(number == _HALF_STEP, s * _HALF, jnp.where(large, part, 0))
            point = jnp.where(number == _FOLLOWING, v - s, jnp.where(number == _LAST, last, v))
            return point, d, large

        return *_each(of_leaf, x, seen.step, seen.following, near), near

    def ask(seen: _Seen) -> _Seen:
        number = seen.question
        point, d, _, _ = points(number, seen)
        alone = (number == _STEP) | (number == _FOLLOWING)
        there = again(jax.tree.map(jnp.subtract, point, d))
        found = solve(jax.tree.map(lambda f, g: f - jnp.where(alone, 0, g), again(point), there))
        # Computed again, not kept during the solve.
        after, found = jax.lax.optimization_barrier((number, found))
        _, d, large, near = points(after, seen)

        def figure(x: Any, d: Any, near: Any, rounding: Any) -> Any:
            step, bent = _relative(x, near), _relative(x - d, rounding)
            return jnp.where(number == _STEP, step, bent)

        size = largest(jax.tree.map(figure, found, d, near, at.rounding))
        mark = jnp.where(number == _PART_STEP, 1, jnp.where(number == _LAST, 2, 0))

        def add(marks: Any, x: Any, d: Any, large: Any) -> Any:
            return marks + jnp.where(large & _is_blurred(d, x), mark, 0).astype(marks.dtype)

        def only(which: int, new: Any, old: Any) -> Any:
            return jnp.where(number == which, _compat.like_type(new, old), old)

        more = (number < _LAST) & ((number != _STEP) | (size > limits.negligible))
        return _Seen(
            number + 1,
            _like(more, seen.on),
            only(_STEP, size, seen.size),
            only(_HALF_STEP, size, seen.bent),
            jax.tree.map(lambda x, s: only(_STEP, x, s), found, seen.step),
            jax.tree.map(lambda x, t: only(_FOLLOWING, x, t), found, seen.following),
            jax.tree.map(add, seen.blurred, found, d, large),
        )

    on, size = begin
    nothing = jax.tree.map(jnp.zeros_like, at.step)
    marks = jax.tree.map(lambda s: jnp.zeros_like(s, jnp.uint8), at.step)
    first = jnp.asarray(_STEP if mixed else _HALF_STEP)
    seen = _Seen(first, on, size, jnp.zeros_like(size), at.step, nothing, marks)
    seen = jax.lax.while_loop(lambda seen: seen.on, ask, seen)
    return seen._replace(on=seen.question == _END)


def _error(seen: _Seen, rounding: Tree, largest: Callable[[Tree], Any]) -> Any:
    """The relative error in the terms of F with which a change of x as long as half of the step is
    blurred; 0 where the second step is longer than such an error explains."""
    error = seen.bent / (_HALF * _BLURRED)
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

    def sort(
        v: Any,
        step: Any,
        following: Any,
        marks: Any,
        rounding: Any,
        near: Any,
        wide: Any,
        whole: Any,
    ) -> tuple[Any, Any]:
        last = v - step - following
        following, long = jnp.abs(following), jnp.abs(step)
        large = long > limits.negligible * near
        noise = jnp.maximum(4 * eps, error).astype(v.dtype) * rounding
        blurred = (marks % 2 == 1) & (following <= _NO_LONGER * long)
        after = 2 * following * following / jnp.where(long > 0, long, 1)
        unknown = (jnp.abs(last) <= 4 * eps * following + after) | (marks >= 2)  # noqa: PLR2004
        is_zero = large & unknown & (following <= limits.change * long)
        coarse = large & (long <= error * rounding)
        unit = jnp.where(blurred | is_zero, wide, near)
        unit = jnp.where(coarse, jnp.maximum(unit, whole), unit)
        relative = _relative(step, unit)
        # Such a step is never negligible: the derivative is looked at along it.
        relative = jnp.where(coarse, jnp.maximum(relative, 2 * limits.negligible), relative)
        left = jnp.where(blurred, 0, jnp.maximum(following - noise, 0)).astype(long.dtype)
        return relative, _relative(left, unit)

    trees = at.v, seen.step, seen.following, seen.blurred, at.rounding
    steps, following = _each(sort, *trees, *units)
    found = largest(steps)
    return found, largest(following) / jnp.where(found > 0, found, 1)


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


def _each(function: Callable[..., tuple[Any, ...]], *trees: Tree) -> tuple[Tree, ...]:
    """A function of leaves that returns several, as trees."""
    tree = jax.tree.structure(trees[0])
    results = [function(*leaves) for leaves in zip(*map(jax.tree.leaves, trees), strict=True)]
    return tuple(tree.unflatten(each) for each in zip(*results, strict=True))


def _like(a: Any, b: Any) -> Any:
    return _compat.like_type(a.astype(b.dtype), b)


def _over(v: Tree, unit: Tree) -> Tree:
    return jax.tree.map(_relative, v, unit)


def _relative(a: Any, unit: Any) -> Any:
    """In units; what is not zero in no unit is infinite."""
    return jnp.where(a == 0, 0, jnp.abs(a) / unit)
