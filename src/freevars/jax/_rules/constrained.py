"""The Karush-Kuhn-Tucker system of a minimum with constraints, on pytrees as they are.

The unknown is x with the multipliers of `equality` and `inequality`. The active set is decided at
the unknown itself and is a constant of the system; `freevars._solvers.kkt` explains how. Not here:
the derivative of the system's root (`implicit`), and refusals (`refusal`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from freevars._solvers import kkt
from freevars._solvers.kkt import Found, Pair, Side
from freevars._solvers.verdict import Limits
from freevars.errors import FreevarsError, StructureError
from freevars.jax import _compat
from freevars.jax._rules.active import (
    ActiveSet,
    Functions,
    flat,
    pairs,
    positive,
    rows_of,
)
from freevars.jax._rules.coordinates import Coordinates, max_abs, probe
from freevars.jax._rules.powers import power_of_two
from freevars.jax._rules.sizes import limits_of
from freevars.jax._solver.problem import Problem, count

__all__ = ["Constrained", "bounds_like", "explain", "unknown", "with_multipliers"]

Tree: TypeAlias = Any  # a pytree of real arrays


def bounds_like(bounds: Any, x0: Any, name: str) -> tuple[Any, Any]:
    """The two sides as arrays like those of x0, infinite where there is none."""
    if any(map(jnp.iscomplexobj, jax.tree.leaves(x0))):
        message = f"{name}: bounds: complex numbers have no order, got a complex x0."
        raise StructureError(message)

    def side(given: Any, default: float) -> Any:
        def fill(bound: Any, part: Any) -> Any:
            value = default if bound is None else bound
            return jax.tree.map(
                lambda leaf: jnp.broadcast_to(jnp.asarray(value, leaf.dtype), leaf.shape), part
            )

        try:
            return tree_util.tree_map(fill, given, x0, is_leaf=lambda b: b is None)
        except (ValueError, TypeError) as error:
            message = f"{name}: bounds: expected each side like x0, or a number: {error}."
            raise StructureError(message) from None

    lower, upper = bounds
    return side(lower, -jnp.inf), side(upper, jnp.inf)


def unknown(problem: Problem, x0: Any) -> Any:
    """x0 with multipliers of zero."""
    dtype = Coordinates(x0).dtype
    sizes = {name: count(problem.struct(name)) for name in problem.constraints}
    return {"x": x0, **{name: jnp.zeros(size, dtype) for name, size in sizes.items()}}


class Units(NamedTuple):
    """The units in which the system is solved; constant powers of two. The gradient of the
    objective and the values of the constraints are in units of x, and so are the multipliers, so
    that no norm depends on a factor in any of them."""

    slope: Any
    values: dict[str, Any]  # of each constraint
    multipliers: dict[str, Any]

    @staticmethod
    def at(problem: Problem, x: Any, x0: Any, *, has_aux: bool, squares: bool) -> Units:
        """At an unknown, found from x0: by what changes over the size of x."""
        at = Functions.of(problem, x["x"], x0, has_aux=has_aux, squares=squares)
        v = Coordinates(x["x"]).to_real(x["x"])
        multipliers = {name: x[name] for name in problem.constraints}
        size = at.size(v)
        largest = jnp.max(flat(size), initial=0)
        along = [jax.tree.map(jnp.multiply, size, probe(v, seed)) for seed in (14, 15)]

        def energy(slope: Tree) -> Any:
            return max_abs(flat(slope) * flat(size))

        bend, slope = (
            energy(jax.jvp(lambda v: at.gradient(v, multipliers), (v,), (along[0],))[1]),
            energy(jax.grad(at.objective)(v)),
        )
        bend = positive(jnp.where(bend > 0, bend, slope))
        changes = [jax.jvp(at.constraints, (v,), (d,))[1] for d in along]
        change = jax.tree.map(lambda a, b: positive(jnp.maximum(jnp.abs(a), jnp.abs(b))), *changes)
        return jax.lax.stop_gradient(
            Units(
                power_of_two(bend / largest**2),
                {name: power_of_two(c / largest) for name, c in change.items()},
                {name: power_of_two(bend / largest / c) for name, c in change.items()},
            )
        )


class InUnits(Coordinates):
    """The coordinates of x and its multipliers, which are in units."""

    def __init__(self, x: Any, units: Units) -> None:
        super().__init__(x)
        self._units = units.multipliers

    def to_real(self, x: Any) -> Tree:
        v = super().to_real(x)
        return v | {name: v[name] / unit for name, unit in self._units.items()}

    def from_real(self, v: Tree) -> Any:
        scaled = {name: v[name] * unit for name, unit in self._units.items()}
        return super().from_real(v | scaled)


@dataclass(frozen=True)
class Constrained:
    """F of a minimum with constraints."""

    squares: bool  # the objective is half the sum of squares
    one_sided: bool
    check: bool
    to_bounds: bool = False  # the distance that x keeps from an active bound counts
    x0: Any = None  # from which x was found
    units: Units | None = None  # those of the problem

    def in_units(
        self, problem: Problem, x: Any, x0: Any, *, has_aux: bool
    ) -> tuple[Constrained, Coordinates]:
        """The same in units in which x and its multipliers are about of one size, and these."""
        start = x0["x"]
        units = Units.at(problem, x, start, has_aux=has_aux, squares=self.squares)
        return replace(self, x0=start, units=units), InUnits(x, units)

    def __call__(
        self, problem: Problem, coordinates: Coordinates, y: Tree, *, has_aux: bool
    ) -> Tree:
        """At y, in the coordinates of the unknown; NaN where the point is degenerate."""
        return _conditions(self, problem, coordinates, y, has_aux=has_aux)


def _conditions(
    of: Constrained, problem: Problem, coordinates: Coordinates, y: Tree, *, has_aux: bool
) -> Tree:
    x = coordinates.from_real(y)
    start = x["x"] if of.x0 is None else of.x0
    at = Functions.of(problem, x["x"], start, has_aux=has_aux, squares=of.squares)
    v, multipliers = y["x"], {name: x[name] for name in problem.constraints}
    one = jnp.ones((), coordinates.dtype)
    ones = dict.fromkeys(problem.constraints, one)
    units = of.units or Units(one, ones, ones)
    gradient, values = at.gradient(v, multipliers), at.constraints(v)
    fixed = jax.lax.stop_gradient((v, multipliers, gradient, values))
    active_set: ActiveSet = jax.lax.stop_gradient(ActiveSet.of(at, *fixed))
    least = kkt.threshold(jnp, active_set.left, coordinates.eps)

    def keeps(pair: Pair) -> Any:
        return (pair.active | (pair.certain <= least)) if of.one_sided else pair.active

    near = Limits.of(coordinates.eps).certain
    spot = 0.0 if of.to_bounds else near
    slopes = jax.tree.map(lambda slope: slope / units.slope, gradient)
    f: dict[str, Any] = {"x": _rows_of_x(at, active_set, v, slopes, keeps, spot)}
    values = {name: value / units.values[name] for name, value in values.items()}
    if "equality" in values:
        f["equality"] = values["equality"]
    if active_set.inequality is not None:
        active = keeps(active_set.inequality)
        zero = kkt.on_the_spot(
            jnp,
            y["inequality"],
            jax.lax.stop_gradient(y["inequality"]),
            active_set.pulls[1] > kkt.WRONG,
        )
        f["inequality"] = jnp.where(active, values["inequality"], zero)
    if of.check:
        refused = active_set.crossed(at, near)
        if not of.one_sided:
            refused |= active_set.certain(at) <= least
        refused = jax.lax.stop_gradient(refused)
        f = jax.tree.map(lambda leaf: jnp.where(refused, jnp.nan, leaf), f)
    return f


def _rows_of_x(
    at: Functions,
    active_set: ActiveSet,
    v: Tree,
    slopes: Tree,
    keeps: Callable[[Pair], Any],
    near: float,
) -> Tree:
    """The equations of x: the bound of a component where one `keeps` it, else its slope."""

    def at_bound(x: Any, bound: Any, gap: Any) -> Any:
        constant = jax.lax.stop_gradient(x - bound)
        return kkt.on_the_spot(jnp, x - bound, constant, jnp.abs(gap) <= near)

    def row(lower: Pair, upper: Pair, fixed: Any, x: Any, sides: Any, gaps: Any, slope: Any) -> Any:
        below, above = (at_bound(x, *side) for side in zip(sides, gaps, strict=True))
        # Of two sides that fix a component, the one that holds it. No `where`: x may be sharded
        # where its bounds are not.
        at_lower = (fixed & ~upper.active) | (~fixed & keeps(lower))
        return jnp.where(at_lower, below, jnp.where(keeps(upper), above, slope))

    leaves, tree = jax.tree.flatten(v)
    rows = map(
        row,
        pairs(active_set.lower),
        pairs(active_set.upper),
        jax.tree.leaves(at.fixed),
        leaves,
        zip(*map(jax.tree.leaves, (at.lower, at.upper)), strict=True),
        zip(*map(jax.tree.leaves, active_set.gaps[:2]), strict=True),
        jax.tree.leaves(slopes),
    )
    return tree.unflatten(list(rows))


@_compat.any_rank
def with_multipliers(problem: Problem, x: Any, x0: Any, *, has_aux: bool, squares: bool) -> Any:
    """The unknown at x, found from x0, with the multipliers that follow from stationarity."""
    if not problem.constraints:
        return {"x": x}
    at = Functions.of(problem, x, x0, has_aux=has_aux, squares=squares)
    v = Coordinates(x).to_real(x)
    size = at.size(v)
    gap = jax.tree.map(
        lambda x, low, up, d: jnp.minimum(jnp.abs(x - low), jnp.abs(up - x)) / d,
        *(v, at.lower, at.upper, size),
    )
    weight = jax.tree.map(lambda g, d: d * kkt.saturated(jnp, g), gap, size)
    matrix, values = rows_of(at, v)
    rows = positive(jnp.sum(jnp.abs(matrix) * flat(size), axis=1))
    system = (flat(weight) * matrix / rows[:, None]).T
    right = flat(weight) * flat(jax.grad(at.objective)(v))
    if "inequality" in values:
        k = values["inequality"].size
        slack = kkt.saturated(jnp, values["inequality"] / rows[rows.size - k :])
        pad = jnp.zeros((k, rows.size - k), slack.dtype)
        system = jnp.concatenate([system, jnp.concatenate([pad, jnp.diag(slack)], 1)])
        right = jnp.concatenate([right, jnp.zeros(k, right.dtype)])
    solution = jnp.linalg.lstsq(system, right)[0] / rows
    found, start = {}, 0
    for name, value in values.items():
        found[name] = solution[start : start + value.size]
        start += value.size
    return {"x": x, **found}


@_compat.any_rank
def explain(
    problem: Problem,
    y: Any,
    y0: Any,
    *,
    has_aux: bool,
    squares: bool,
    name: str,
    tol: float | None,
) -> FreevarsError | None:
    """The error in words of the constraints, for known values."""
    coordinates = Coordinates(y)
    at = Functions.of(problem, y["x"], y0["x"], has_aux=has_aux, squares=squares)
    v = Coordinates(y["x"]).to_real(y["x"])
    multipliers = {name: y[name] for name in problem.constraints}
    values = at.constraints(v)
    active_set = ActiveSet.of(at, v, multipliers, at.gradient(v, multipliers), values)
    limits = limits_of(coordinates, tol)
    sides: list[Side] = []
    crossed: list[str] = []
    paths = [tree_util.keystr(path) for path, _ in tree_util.tree_leaves_with_path(v)]
    free: list[Any] = []
    for path, low, up, pull, fixed, is_low, is_up in zip(
        paths,
        *map(jax.tree.leaves, (*active_set.gaps[:2], active_set.pulls[0], at.fixed)),
        pairs(active_set.lower),
        pairs(active_set.upper),
        strict=True,
    ):
        holds = (jnp.abs(low) <= limits.certain) | (jnp.abs(up) <= limits.certain)
        free.append(np.ravel(~np.asarray(holds | fixed)))
        for side, gap, other, pair in (("lower", low, up, is_low), ("upper", up, low, is_up)):
            for index in np.argwhere(np.isfinite(gap) & ~np.asarray(fixed)):
                there = (float(a[tuple(index)]) for a in (gap, other, pull, pair.certain))
                component = f"x{path}{_place(index)}"
                sides.append(Side.of_bound(side, component, *there, eps=coordinates.eps))
    for path, lower, upper, size in zip(
        paths, *map(jax.tree.leaves, (at.lower, at.upper, active_set.size)), strict=True
    ):
        where = np.argwhere(kkt.are_crossed(lower, upper, size, limits.certain))
        crossed += [f"x{path}{_place(index)}" for index in where]
    if active_set.inequality is not None:
        each = zip(
            active_set.gaps[2], active_set.pulls[1], active_set.inequality.certain, strict=True
        )
        sides += [Side(f"inequality[{i}]", *map(float, of)) for i, of in enumerate(each)]
    found = Found(
        sides,
        crossed,
        float(active_set.violated),
        float(active_set.left),
        _dependent(at, v, active_set, np.concatenate(free), limits.certain),
    )
    return kkt.explain(name, found, limits, coordinates.eps)


def _place(index: Any) -> str:
    return f"[{', '.join(map(str, index))}]" if index.size else ""


def _dependent(at: Functions, v: Tree, active_set: ActiveSet, free: Any, near: float) -> bool:
    """Whether the gradients of the constraints that hold at x are, in the space that bounds leave;
    those that hold, and not those with a multiplier, which then is not determined."""
    matrix, values = rows_of(at, v)
    if not values:
        return False
    keep = np.ones(matrix.shape[0], bool)
    if active_set.inequality is not None:
        keep[-active_set.gaps[2].size :] = jnp.abs(active_set.gaps[2]) <= near
    rows = np.asarray(matrix * flat(active_set.size))[keep][:, free]
    largest = np.max(np.abs(rows), axis=1, initial=0, keepdims=True)
    rows = rows / np.where(largest > 0, largest, 1)
    eps = float(np.finfo(rows.dtype).eps)
    return bool(np.linalg.matrix_rank(rows, tol=10 * eps * max(rows.shape, default=1)) < len(rows))
