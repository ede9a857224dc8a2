"""Which constraints are active at a point, on pytrees as they are.

`freevars._solvers.kkt` explains the decision. Not here: the system that holds there
(`constrained`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from freevars._solvers import kkt
from freevars._solvers.kkt import Pair
from freevars.jax import _compat
from freevars.jax._rules.coordinates import Coordinates, firm_probe, max_abs, split_like
from freevars.jax._solver.problem import Problem

__all__ = ["ActiveSet", "Functions", "flat", "pairs", "positive", "rows_of"]

Tree: TypeAlias = Any  # a pytree of real arrays


class Functions(NamedTuple):
    """Everything at one point of the unknown."""

    objective: Callable[[Tree], Any]  # of x, in real coordinates
    constraints: Callable[[Tree], dict[str, Any]]  # vectors, by name
    lower: Tree  # infinite where there is no bound
    upper: Tree
    way: Any  # how far x is from where the solver began

    @staticmethod
    def of(problem: Problem, x: Any, x0: Any, *, has_aux: bool, squares: bool) -> Functions:
        """At x, found from x0."""
        of_x = Coordinates(x)
        way = jax.tree.map(jnp.subtract, of_x.to_real(x), of_x.to_real(x0))
        way = max_abs(flat(jax.lax.stop_gradient(way)))

        def objective(v: Tree) -> Any:
            value = problem.parts_at(of_x.from_real(v))["fun"]
            value = value[0] if has_aux else value
            if not squares:
                return value
            parts = jax.tree.leaves(Coordinates(value).to_real(value))
            return sum(jnp.sum(part.astype(of_x.dtype) ** 2) for part in parts) / 2

        def constraints(v: Tree) -> dict[str, Any]:
            values = problem.parts_at(of_x.from_real(v))
            return {name: _vector(values[name], of_x.dtype) for name in problem.constraints}

        return Functions(objective, constraints, *_sides(problem, x), way)

    @property
    def fixed(self) -> Tree:
        """The components that the bounds fix."""
        return jax.tree.map(lambda low, up: low == up, self.lower, self.upper)

    def size(self, v: Tree) -> Tree:
        """The sizes of the components of x, also where one happens to be zero."""
        return jax.tree.map(functools.partial(_size, self.way), v, self.lower, self.upper)

    def gradient(self, v: Tree, multipliers: dict[str, Any]) -> Tree:
        """Of the Lagrangian."""
        gradient = jax.grad(self.objective)(v)
        if not multipliers:
            return gradient
        (by_constraints,) = jax.vjp(self.constraints, v)[1](multipliers)
        return jax.tree.map(jnp.subtract, gradient, by_constraints)


class ActiveSet(NamedTuple):
    """The gaps and pulls of all inequalities, constant."""

    lower: Tree  # of Pair
    upper: Tree
    inequality: Pair | None
    gaps: tuple[Tree, Tree, Any]
    pulls: tuple[Tree, Any]
    violated: Any  # of the equalities, relative
    left: Any  # of all equations, relative
    size: Tree  # of x

    @staticmethod
    def of(
        at: Functions, v: Tree, multipliers: dict[str, Any], gradient: Tree, values: Any
    ) -> ActiveSet:
        """At a point, with the gradient of the Lagrangian and the constraints' values there."""
        size = at.size(v)
        along = jax.tree.map(jnp.multiply, size, firm_probe(v, 11))
        plain = jax.grad(at.objective)(v)
        change = jax.jvp(lambda v: at.gradient(v, multipliers), (v,), (along,))[1]
        unit = jax.tree.map(
            lambda h, g, total: positive(jnp.abs(h) + jnp.abs(g) + jnp.abs(g - total)),
            change,
            plain,
            gradient,
        )
        pull = jax.tree.map(jnp.divide, gradient, unit)
        eps = float(jnp.finfo(flat(v).dtype).eps)
        matrix = rows_of(at, v)[0]
        size = _natural(at, v, multipliers, size, unit, matrix, eps)
        below = jax.tree.map(lambda x, b, d: (x - b) / d, v, at.lower, size)
        above = jax.tree.map(lambda x, b, d: (b - x) / d, v, at.upper, size)
        lower = jax.tree.map(lambda gap, p: kkt.pair(jnp, gap, p, eps), below, pull)
        upper = jax.tree.map(lambda gap, p: kkt.pair(jnp, gap, -p, eps), above, pull)
        left = [p.left for p in pairs(lower) + pairs(upper)]
        violated, inequality, gap, force = jnp.zeros(()), None, None, None
        if values:
            matrix = jnp.abs(matrix)
            variation = positive(jnp.sum(matrix * flat(size), axis=1))
            weight = jnp.max(matrix / flat(unit), axis=1, initial=0)
        if "equality" in values:
            m = values["equality"].size
            violated = max_abs(values["equality"] / variation[:m])
            left.append(violated)
        if "inequality" in values:
            start = variation.size - values["inequality"].size
            gap = values["inequality"] / variation[start:]
            force = multipliers["inequality"] * weight[start:]
            inequality = kkt.pair(jnp, gap, force, eps)
            left.append(jnp.where(inequality.active, jnp.abs(gap), jnp.abs(force)))
        largest = jnp.zeros(())
        for part in left:
            largest = jnp.maximum(largest, max_abs(part))
        return ActiveSet(
            lower, upper, inequality, (below, above, gap), (pull, force), violated, largest, size
        )

    def crossed(self, at: Functions, near: float) -> Any:
        """Whether nothing lies between the bounds of a component."""
        found = jnp.asarray(False)
        sides = map(jax.tree.leaves, (at.lower, at.upper, self.size))
        for lower, upper, size in zip(*sides, strict=True):
            found |= jnp.any(kkt.are_crossed(lower, upper, size, near))
        return found

    def certain(self, at: Functions) -> Any:
        """The least certain of all decisions."""
        least = jnp.asarray(jnp.inf)
        for side in (self.lower, self.upper):
            for pair, fixed in zip(pairs(side), jax.tree.leaves(at.fixed), strict=True):
                least = jnp.minimum(
                    least, jnp.min(jnp.where(fixed, jnp.inf, pair.certain), initial=jnp.inf)
                )
        if self.inequality is not None:
            least = jnp.minimum(least, jnp.min(self.inequality.certain, initial=jnp.inf))
        return least


def _natural(
    at: Functions,
    v: Tree,
    multipliers: dict[str, Any],
    size: Tree,
    unit: Tree,
    matrix: Any,
    eps: float,
) -> Tree:
    """The sizes, including those that follow from the equations, whose terms are `unit`."""
    by_terms = jax.tree.map(jnp.divide, firm_probe(v, 12), unit)
    coupling = jax.jvp(lambda v: at.gradient(v, multipliers), (v,), (by_terms,))[1]
    rows = positive(jnp.sum(jnp.abs(matrix) * flat(size), axis=1))
    by_rows = matrix.T @ (firm_probe(rows, 13) / rows)
    largest = jnp.max(flat(size), initial=at.way)
    leaves, tree = jax.tree.flatten(size)
    found = [
        kkt.natural_size(jnp, d, jnp.abs(c) + jnp.abs(r), largest, eps)
        for d, c, r in zip(
            leaves, jax.tree.leaves(coupling), split_like(by_rows, leaves), strict=True
        )
    ]
    return tree.unflatten(found)


def rows_of(at: Functions, v: Tree) -> tuple[Any, dict[str, Any]]:
    """The Jacobian of the constraints, a row for each, and their values."""
    values, pull = jax.vjp(at.constraints, v)
    sizes = {name: value.size for name, value in values.items()}
    total = sum(sizes.values())
    dtype = jnp.result_type(*values.values()) if values else jnp.float32
    units, start = {}, 0
    for name, size in sizes.items():
        units[name] = jnp.eye(total, size, -start, dtype=dtype)
        start += size
    if not total:
        return jnp.zeros((0, flat(v).size), dtype), values
    return jax.vmap(lambda u: flat(pull(u)[0]))(units), values


def _sides(problem: Problem, x: Any) -> tuple[Tree, Tree]:
    if problem.bounds is not None:
        lower, upper = (Coordinates(side).to_real(side) for side in problem.bounds)
        return lower, upper
    parts = Coordinates(x).to_real(x)
    none = jax.tree.map(lambda part: jnp.full(part.shape, jnp.inf, part.dtype), parts)
    return jax.tree.map(jnp.negative, none), none


def _size(way: Any, x: Any, lower: Any, upper: Any) -> Any:
    eps = float(jnp.finfo(x.dtype).eps)
    least = kkt.least_size(way, eps).astype(x.dtype)
    farthest = kkt.reach(jnp, jnp.max(jnp.abs(x), initial=least), eps)
    ends = [jnp.where(jnp.abs(b) <= farthest, jnp.abs(b), 0) for b in (lower, upper)]
    largest = jnp.maximum(jnp.abs(x), jnp.maximum(*ends))
    return positive(jnp.maximum(largest, jnp.maximum(1e-3 * jnp.max(largest, initial=0), least)))


def positive(size: Any) -> Any:
    return jnp.where(size > 0, size, 1)


def pairs(tree: Tree) -> list[Pair]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Pair))


def flat(tree: Tree) -> Any:
    return jnp.concatenate([jnp.ravel(_compat.whole(leaf)) for leaf in jax.tree.leaves(tree)])


def _vector(tree: Any, dtype: Any) -> Any:
    """What a constraint returns, as a real vector."""
    parts = map(_compat.whole, jax.tree.leaves(Coordinates(tree).to_real(tree)))
    return jnp.concatenate([jnp.zeros(0, dtype), *(jnp.ravel(p).astype(dtype) for p in parts)])
