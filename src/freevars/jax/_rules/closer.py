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
        number: of directions, in which the derivative is compared.
        floor: a component of y counts as this at least, relative to the largest one.
        mixed: the step is that of F and something else, enough to see that it is small. Here that
            of F alone is taken.
    """
    v, f, step, near, far, rounding = at
    eps = limits.column**2
    wide = jax.tree.map(lambda n, d: jnp.maximum(n, (limits.column * d).astype(n.dtype)), near, far)
    most = largest(v)
    whole = jax.tree.map(
        lambda r, n: jnp.maximum(n, jnp.minimum(r, most.astype(r.dtype))), rounding, near
    )
    size = largest(_over(step, near))
    reach = largest(_over(step, jax.tree.map(jnp.maximum, wide, whole)))
    needed = (size > limits.negligible) & (reach <= limits.step)
    # Members of a batch that do not need it take no step: F may not be defined there.
    asked_for = jax.tree.map(lambda s: jnp.where(needed, s, 0), step)

    def values(points: list[Tree]) -> Tree:
        # One at a time: F may hold what has no batches.
        return jax.lax.map(again, jax.tree.map(lambda *each: jnp.stack(each), *points))

    def one(side: Tree) -> Tree:
        return jax.tree.map(lambda x: x[0], inverse(jax.tree.map(lambda x: x[None], side)))

    def turn(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        # What depends on the state is computed in the loop; the rest XLA moves out of it.
        if mixed:
            safe = one(
                jax.tree.map(lambda f: jnp.where(needed, f, 0) + state[2].astype(f.dtype), f)
            )
        else:
            safe = jax.tree.map(lambda s: s + state[2].astype(s.dtype), asked_for)
        offends = jax.tree.map(lambda s, n: jnp.abs(s) > limits.negligible * n, safe, near)

        def part(s: Any, v: Any, off: Any) -> Any:
            short = jnp.where(v == 0, jnp.abs(s), jnp.minimum(jnp.abs(s), jnp.abs(v)))
            return jnp.where(off, jnp.sign(s) * short * _PART, 0).astype(v.dtype)

        h = jax.tree.map(part, safe, v, offends)
        every = jax.tree.map(lambda s: s * _HALF, safe)
        end = jax.tree.map(jnp.subtract, v, safe)
        there = values([end, *(jax.tree.map(jnp.subtract, v, some) for some in (h, every))])
        first = inverse(jax.tree.map(lambda f, g: jnp.stack([g[0], f - g[1], f - g[2]]), f, there))
        # What relative error in the terms of F explains that it is not straight along the half.
        bent = jax.tree.map(lambda found, h: found[2] - h, first, every)
        error = largest(_over(bent, rounding)) / (_HALF * _BLURRED)
        beyond = largest(_over(jax.tree.map(lambda found: found[0], first), rounding))
        error = jnp.where(beyond <= _NO_LONGER * error, error, 0)
        # The next iterate tells from zero what is next to nothing beside the step.
        last = jax.tree.map(lambda x, found: x - found[0], end, first)
        k = jax.tree.map(lambda x, off: jnp.where(off, x * _PART, 0).astype(x.dtype), last, offends)
        there = values([last, jax.tree.map(jnp.subtract, last, k)])
        second = inverse(jax.tree.map(lambda g: (g[0] - g[1])[None], there))

        def sort(
            s: Any, h: Any, x: Any, k: Any, off: Any, r: Any, found: Any, also: Any
        ) -> tuple[Any, Any, Any]:
            following, seen, seen_there = jnp.abs(found[0]), found[1], also[0]
            long = jnp.abs(s)
            noise = jnp.maximum(4 * eps, error).astype(r.dtype) * r
            blurred = off & (jnp.abs(seen - h) >= _BLURRED * jnp.abs(h))
            blurred &= following <= _NO_LONGER * long
            after = 2 * following * following / jnp.where(long > 0, long, 1)
            unknown = jnp.abs(x) <= 4 * eps * following + after
            unknown |= jnp.abs(seen_there - k) >= _BLURRED * jnp.abs(k)
            is_zero = off & unknown & (following <= limits.change * long)
            left = jnp.where(blurred, 0, jnp.maximum(following - noise, 0))
            return blurred | is_zero, off & (long <= error * r), left.astype(s.dtype)

        leaves, tree = jax.tree.flatten(safe)
        others = [jax.tree.leaves(x) for x in (h, last, k, offends, rounding, first, second)]
        sorted_ = [sort(*parts) for parts in zip(leaves, *others, strict=True)]
        excused, coarse, left = (tree.unflatten(each) for each in zip(*sorted_, strict=True))
        unit = jax.tree.map(jnp.where, excused, wide, near)
        unit = jax.tree.map(lambda c, u, w: jnp.where(c, jnp.maximum(u, w), u), coarse, unit, whole)
        found = largest(_over(safe, unit))
        # Such a step is never negligible: the derivative is looked at along it.
        least = largest(
            jax.tree.map(
                lambda c, n: jnp.where(c, 2 * limits.negligible, 0).astype(n.dtype), coarse, near
            )
        )
        found = jnp.maximum(found, least)
        changes = largest(_over(left, unit)) / jnp.where(found > 0, found, 1)
        if along is None:
            changes = jnp.where(found > limits.certain, jnp.inf, changes)
        else:
            still = jax.tree.map(lambda v: jnp.broadcast_to(state[2], v.shape).astype(v.dtype), v)
            still = jax.tree.map(_compat.like_type, still, v)
            directions = jnp.arange(number, dtype=jnp.uint32)
            y, moved = _changes(apply, one, along, (v, still, end), directions)
            least = floor * largest(_over(y, wide))
            unit = jax.tree.map(lambda y, w: jnp.maximum(y, least.astype(w.dtype) * w), y, wide)
            # The terms of its equation are as coarse as those of F.
            noise = jnp.where(error > 0, error * largest(_over(y, whole)), 0)
            moved = jax.tree.map(
                lambda m, r: jnp.maximum(m - noise.astype(m.dtype) * r, 0), moved, rounding
            )
            changes = jnp.maximum(changes, largest(_over(moved, unit)))
        return _like(needed & False, needed), _like(found, size), _like(changes, size)

    if not limits.negligible < limits.step:  # `tol`: whatever the derivative does
        return size, jnp.zeros_like(size)
    # A loop of no or one turn, not a `cond`: under `vmap` that would compute it for every member.
    begin = (needed, size, jnp.zeros_like(size))
    return jax.lax.while_loop(lambda state: state[0], turn, begin)[1:]


def _changes(
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


def _like(a: Any, b: Any) -> Any:
    return _compat.like_type(a.astype(b.dtype), b)


def _over(v: Tree, unit: Tree) -> Tree:
    """In units; what is not zero in no unit is infinite."""
    return jax.tree.map(lambda a, u: jnp.where(a == 0, 0, jnp.abs(a) / u), v, unit)
