"""A Newton step, the units that it counts by, and what values of F say of it.

Each question takes one solve, one after the other. Besides the current one, memory holds only the
step, the second step, and two bits for each component. Not here: what follows from it (`closer`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from freevars._solvers.verdict import Limits
from freevars.jax import _compat

__all__ = [
    "NO_LONGER",
    "Equations",
    "Seen",
    "Step",
    "Units",
    "each",
    "error_in_terms",
    "in_units",
    "like_state",
    "relative_to",
    "see",
]

Tree: TypeAlias = Any  # a pytree of real arrays
Solve: TypeAlias = Callable[[Tree], Tree]  # b -> A^-1 b

_PART = 1 / 16  # of a step: a function is straight along it where Newton's method works
_HALF = 1 / 2  # of a step: what is lost in coarse arithmetic is on its scale
_BLURRED = 0.5  # how far it is from that where it does not see a change of x
NO_LONGER = 16  # than the first step is a second one where both are noise


class Equations(NamedTuple):
    """F at x, and how it is asked elsewhere."""

    f: Tree
    at: Callable[[Tree], Tree]
    # (v, d, number) -> the direction of F at v, for the direction d of x and one, of this number,
    # of what F is differentiated by; None: not known. Then a step has to be certain.
    along: Callable[[Tree, Tree, Any], Tree] | None = None


class Step(NamedTuple):
    """A Newton step at x. Trees are like x, and the last three may be of scalars."""

    v: Tree  # x
    step: Tree
    least: Tree  # the unit of a component that is smaller than this
    far: Tree  # how far the solver came with it
    rounding: Tree  # what a relative error of 1 in the terms of F moves it by


class Units(NamedTuple):
    """What a component counts by; trees like x."""

    near: Tree  # itself
    wide: Tree  # how far the solver came, where it does not count by itself
    whole: Tree  # the largest component, or less where the terms of F move it by less

    @staticmethod
    def of(at: Step, limits: Limits, most: Any, never: Any = False) -> Units:  # noqa: FBT002
        """`never` is False, and depends on the state of a loop: then units are computed where they
        are used. XLA would else compute them before the loop, and keep them."""

        def units(v: Any, least: Any, far: Any, rounding: Any) -> tuple[Any, Any, Any]:
            near = jnp.maximum(jnp.abs(v), jnp.where(never, 0, least).astype(v.dtype))
            wide = jnp.maximum(near, (limits.column * far).astype(v.dtype))
            whole = jnp.maximum(near, jnp.minimum(rounding, most).astype(v.dtype))
            return near, wide, whole

        return Units(*each(units, at.v, at.least, at.far, at.rounding))


class Seen(NamedTuple):
    """What values of F show about a step; the state of the loop over the questions. F sees a change
    d of x as A^-1 (F(x) - F(x - d)), which is d where F is linear."""

    question: Any  # the number of the next one
    on: Any  # bool: whether there is one
    size: Any  # of the step, by `near`
    bent: Any  # how far F is from a parabola along the step, in units of rounding
    step: Tree
    following: Tree  # the second step, by the same A
    blurred: Tree  # 1: F does not see a part of the step; 2: nor a part of the next iterate


# The questions.
_STEP, _FOLLOWING, _HALF_STEP, _PART_STEP, _LAST, _END = range(6)


def see(
    solve: Solve,
    again: Callable[[Tree], Tree],
    at: Step,
    limits: Limits,
    largest: Callable[[Tree], Any],
    begin: tuple[Any, Any],
    *,
    mixed: bool,
) -> Seen:
    """What is seen from a step on; `begin` is whether to ask, and the size of the step."""

    def points(number: Any, seen: Seen) -> tuple[Tree, Tree, Tree, Tree]:
        """One point, the way to another, whether the step is large, and the units."""
        # Computed anew, or XLA would keep |x| and the like beside x.
        x = jax.tree.map(lambda v: jnp.where(number < 0, 0, v), at.v)
        near = Units.of(at._replace(v=x), limits, 0, number < 0).near

        def of_leaf(v: Any, s: Any, t: Any, near: Any) -> tuple[Any, Any, Any]:
            large = jnp.abs(s) > limits.negligible * near
            short = jnp.where(v == 0, jnp.abs(s), jnp.minimum(jnp.abs(s), jnp.abs(v)))
            # The next iterate tells from zero what is next to nothing beside the step.
            last = v - s - t
            part = jnp.where(number == _LAST, last, jnp.sign(s) * short) * _PART
            d = jnp.where(number == _HALF_STEP, s * _HALF, jnp.where(large, part, 0))
            point = jnp.where(number == _FOLLOWING, v - s, jnp.where(number == _LAST, last, v))
            return point, d, large

        return *each(of_leaf, x, seen.step, seen.following, near), near

    def ask(seen: Seen) -> Seen:
        number = seen.question
        point, d, _, _ = points(number, seen)
        alone = (number == _STEP) | (number == _FOLLOWING)
        there = again(jax.tree.map(jnp.subtract, point, d))
        found = solve(jax.tree.map(lambda f, g: f - jnp.where(alone, 0, g), again(point), there))
        # Computed again, not kept during the solve.
        after, found = jax.lax.optimization_barrier((number, found))
        _, d, large, near = points(after, seen)

        def figure(x: Any, d: Any, t: Any, near: Any, rounding: Any) -> Any:
            # Curvature takes t from the whole step, and a quarter of that from half of it.
            step, bent = relative_to(x, near), relative_to(x - d + _HALF**2 * t, rounding)
            return jnp.where(number == _STEP, step, bent)

        size = largest(jax.tree.map(figure, found, d, seen.following, near, at.rounding))
        mark = jnp.where(number == _PART_STEP, 1, jnp.where(number == _LAST, 2, 0))

        def add(marks: Any, x: Any, d: Any, large: Any) -> Any:
            return marks + jnp.where(large & _is_blurred(d, x), mark, 0).astype(marks.dtype)

        def only(which: int, new: Any, old: Any) -> Any:
            return jnp.where(number == which, _compat.like_type(new, old), old)

        more = (number < _LAST) & ((number != _STEP) | (size > limits.negligible))
        return Seen(
            number + 1,
            like_state(more, seen.on),
            only(_STEP, size, seen.size),
            only(_HALF_STEP, size, seen.bent),
            jax.tree.map(lambda x, s: only(_STEP, x, s), found, seen.step),
            jax.tree.map(lambda x, t: only(_FOLLOWING, x, t), found, seen.following),
            jax.tree.map(add, seen.blurred, found, d, large),
        )

    on, size = begin
    nothing = jax.tree.map(jnp.zeros_like, at.step)
    marks = jax.tree.map(lambda s: jnp.zeros_like(s, jnp.uint8), at.step)
    first = jnp.asarray(_STEP if mixed else _FOLLOWING)
    seen = Seen(first, on, size, jnp.zeros_like(size), at.step, nothing, marks)
    seen = _compat.while_loop(lambda seen: seen.on, ask, seen)
    return seen._replace(on=seen.question == _END)


def error_in_terms(seen: Seen, rounding: Tree, largest: Callable[[Tree], Any]) -> Any:
    """The relative error in the terms of F with which a change of x as long as half of the step is
    blurred; 0 where the second step is longer than such an error explains."""
    error = seen.bent / (_HALF * _BLURRED)
    beyond = largest(in_units(seen.following, rounding))
    return jnp.where(beyond <= NO_LONGER * error, error, 0)


def _is_blurred(d: Any, seen: Any) -> Any:
    return jnp.abs(seen - d) >= _BLURRED * jnp.abs(d)


def each(function: Callable[..., tuple[Any, ...]], *trees: Tree) -> tuple[Tree, ...]:
    """A function of leaves that returns several, as trees."""
    tree = jax.tree.structure(trees[0])
    results = [function(*leaves) for leaves in zip(*map(jax.tree.leaves, trees), strict=True)]
    return tuple(tree.unflatten(each) for each in zip(*results, strict=True))


def like_state(a: Any, b: Any) -> Any:
    return _compat.like_type(a.astype(b.dtype), b)


def in_units(v: Tree, unit: Tree) -> Tree:
    return jax.tree.map(relative_to, v, unit)


def relative_to(a: Any, unit: Any) -> Any:
    """In units; what is not zero in no unit is infinite."""
    return jnp.where(a == 0, 0, jnp.abs(a) / unit)
