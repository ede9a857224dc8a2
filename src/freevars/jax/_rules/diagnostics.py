"""What is measured at a solution before its derivative is trusted.

`freevars._solvers.verdict` defines the figures and their limits; where the system is written out
they come from its factors (`scaled`). Where it is only applied, a solve costs as much as a
derivative, and one rough solve has to do for all figures: its right-hand side is the optimality F,
in units of the equations, with a small share of every direction added. It gives a Newton step of
the right size, and an estimate of the inverse; on a singular system it stalls or diverges. Each
figure depends on values alone, not on directions, so it needs no derivative itself. Not here: what
is done about a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from freevars._solvers.verdict import Figures, accepted
from freevars.jax._rules import scaled
from freevars.jax._rules.closer import look
from freevars.jax._rules.coordinates import Space, known_size, probe
from freevars.jax._rules.iterative import DENSE_FALLBACK
from freevars.jax._rules.krylov import combine, divide
from freevars.jax._rules.operator import LinearOperator
from freevars.jax._rules.seen import Equations, Step
from freevars.jax._rules.sizes import Unknown
from freevars.jax._rules.system import LinearSystem

__all__ = ["Diagnostics", "kept", "measure", "newton"]

Tree: TypeAlias = Any  # a pytree of real arrays
Along: TypeAlias = Callable[[Tree, Tree, Any], Tree]
RoughSolve: TypeAlias = Callable[..., tuple[Tree, Any]]

_EVERY = 4  # the number of a vector with a bit of every direction
_LOOSE = 0.1  # how exactly that share is taken out again
_SHARE = 0.3  # of every direction in the right-hand side of the rough solve, beside F


class Diagnostics(NamedTuple):
    """The verdict on one solution."""

    good: Any  # bool
    figures: Figures
    step: Tree  # the Newton step, to be subtracted from x
    final: Any = True  # bool: else `good` says what it will be if a closer look finds no fault

    def unless(self, finite: Any) -> Diagnostics:
        """The same, refused unless x was finite before it was replaced."""
        figures = self.figures._replace(finite=self.figures.finite & finite)
        return self._replace(good=self.good & finite, figures=figures)


def measure(
    system: LinearSystem,
    unknown: Unknown,
    equations: Equations,
    *,
    closely: bool = True,
) -> Diagnostics:
    """The verdict on x, where the system is dF/dx.

    Args:
        system: solves for directions of x.
        unknown: x.
        equations: F.
        closely: take a closer look at a step that is not negligible, which is most of the program.
            Otherwise the verdict is not final there.
    """
    equations = equations._replace(f=jax.lax.stop_gradient(equations.f))
    if not system.operator.size:
        nothing = jnp.zeros(())
        return Diagnostics(jnp.asarray(True), _unmeasured(nothing), equations.f)
    measured = _applied if system.scaled is None else _written_out
    figures, step = measured(system, unknown, equations, closely=closely)
    if system.least_squares:
        figures = figures._replace(conserved=_conserved(system))
    asked, final = figures, jnp.asarray(True)
    if not closely:
        final = ~jnp.isnan(figures.change)
        step_asked, change = (jnp.where(final, a, 0) for a in (figures.step, figures.change))
        asked = figures._replace(step=step_asked, change=change)
    good = accepted(asked, unknown.limits, least_squares=system.least_squares)
    return jax.lax.stop_gradient(Diagnostics(good, figures, step, final | ~good))


def newton(system: LinearSystem, unknown: Unknown, equations: Equations) -> tuple[Tree, Any]:
    """The x after a Newton step, unless a second would be no shorter; and whether it is shorter."""
    v, space = unknown.v, system.space
    if not system.operator.size:
        return v, jnp.asarray(True)
    (step,) = system.apply_inverse([equations.f])
    moved = combine(-1, step, v)
    (following,) = system.apply_inverse([equations.at(moved)])
    shorter = _largest(space, following, unknown.d) < _largest(space, step, unknown.d)
    return jax.tree.map(lambda a, b: jnp.where(shorter, a, b), moved, v), shorter


def _unmeasured(zero: Any) -> Figures:
    return Figures(jnp.asarray(True), zero, zero, zero + 1, zero, zero, zero)


def _written_out(
    system: LinearSystem, unknown: Unknown, equations: Equations, *, closely: bool
) -> tuple[Figures, Tree]:
    operator = system.operator
    ravel, unravel, along = operator.ravel, operator.unravel, equations.along
    v, near, far = map(ravel, unknown[:3])
    on_vectors = Equations(
        ravel(equations.f),
        lambda v: ravel(equations.at(unravel(v))),
        along and (lambda v, d, number: ravel(along(unravel(v), unravel(d), number))),
    )
    assert system.scaled is not None  # noqa: S101 (asked before)
    figures, step = scaled.measure(
        system.scaled,
        unknown.limits,
        v,
        near,
        far,
        on_vectors,
        closely=closely,
        least_squares=system.least_squares,
        symmetric=operator.symmetric,
        has_pairs=unknown.has_pairs,
    )
    return figures, unravel(step)


def _applied(
    system: LinearSystem, unknown: Unknown, equations: Equations, *, closely: bool
) -> tuple[Figures, Tree]:
    space, limits, v, f = system.space, unknown.limits, unknown.v, equations.f
    most = unknown.largest(v)
    least = jax.tree.map(lambda a: (limits.column * a).astype(a.dtype), most)
    unit = jax.tree.map(jnp.maximum, unknown.near, least)
    both = space.max(v) + space.max(f)
    figures = _unmeasured(jnp.zeros_like(both))._replace(finite=jnp.isfinite(both))
    if not system.exact:
        (step,) = system.apply_inverse([f])
        return figures._replace(step=_largest(space, step, unit)), step

    every = probe(v, _EVERY)
    rows, asymmetry = _sizes_of_equations(system, unknown, every, figures.asymmetry)
    figures = figures._replace(asymmetry=asymmetry)
    if system.least_squares:
        (step,) = system.apply_inverse([f])
        figures = figures._replace(step=_largest(space, step, unit))
        if equations.along is not None:
            figures = figures._replace(residual=_unanswered(system, v, equations.along, rows))
        return figures, step

    solve = _rough_solver(system, limits.residual)
    relative = jax.tree.map(jnp.divide, f, rows)
    norm = space.norm(relative)
    share = _SHARE / jnp.sqrt(space.dot(every, every))
    mixed = jax.tree.map(lambda a, w: divide(a, norm) + share * w, relative, every)
    found, residual = solve(_times(rows, mixed))
    step = jax.tree.map(lambda leaf: norm * leaf, found)
    inverse = jax.tree.map(jnp.divide, found, unknown.d)
    rcond = space.norm(mixed) / space.norm(inverse)

    def alone(step: Tree) -> Tree:
        others = jax.tree.map(lambda row, w: norm * share * row * w, rows, every)
        return combine(-1, solve(others, _LOOSE)[0], step)

    size, change = look(
        lambda b: solve(b)[0],
        equations._replace(at=lambda v: jax.lax.stop_gradient(equations.at(v))),
        # How far the solver came, and rounding, count by the largest component.
        Step(v, step, unit if unknown.has_pairs else least, unknown.largest(unknown.far), most),
        limits,
        space.max,
        floor=_SHARE,
        number=1,
        closely=closely,
        alone=alone if system.operator.fixed_point else None,
        mixed=True,
    )
    figures = figures._replace(
        step=size,
        change=change,
        rcond=jnp.where(jnp.isfinite(rcond), rcond, 0),
        residual=jnp.where(jnp.isfinite(residual), residual, jnp.inf),
    )
    return figures, step


def _rough_solver(system: LinearSystem, limit: float) -> RoughSolve:
    """(b, tol) -> A^-1 b, about, and the residual of that."""
    space = system.space
    # A random right-hand side has 1/sqrt(n) of each direction, a singular one too.
    enough = min(0.05 * _SHARE / space.size(system.operator.example) ** 0.5, limit / 2)

    def solve(b: Tree, tol: float = enough) -> tuple[Tree, Any]:
        if system.roughly is not None and not system.operator.symmetric:
            return system.roughly(b, tol)
        size = space.max(b)
        b = jax.tree.map(lambda leaf: leaf / jnp.where(size > 0, size, 1), b)
        if system.roughly is None:
            (x,) = system.apply_inverse([b])
        else:
            x, _ = system.roughly(b, tol)
        left = combine(-1, b, system.image(x))
        if system.tried is not None:  # in the units that it was solved in
            left, b = (system.tried.units.times(v) for v in (left, b))
        residual = divide(space.norm(left), space.norm(b))
        return jax.tree.map(lambda leaf: leaf * size, x), residual

    return solve


def _unanswered(system: LinearSystem, v: Tree, along: Along, rows: Tree) -> Any:
    """How much of dF/dt p no direction of x answers, relative."""
    b = along(v, jax.tree.map(jnp.zeros_like, v), jnp.uint32(0))
    (u,) = system.apply_inverse([b])
    left = jax.tree.map(jnp.divide, combine(-1, system.image(u), b), rows)
    whole = jax.tree.map(jnp.divide, b, rows)
    return divide(system.space.max(left), system.space.max(whole))


def _sizes_of_equations(
    system: LinearSystem, unknown: Unknown, every: Tree, zero: Any
) -> tuple[Tree, Any]:
    """The size of each equation, per unit of the unknowns; and the asymmetry of a second
    derivative. `every` is a vector with a share of every direction."""
    operator, space, d = system.operator, system.space, unknown.d
    if operator.fixed_point:  # its equations have the units of their unknowns
        image = system.image(_times(d, every))
        return jax.tree.map(lambda a, d: jnp.maximum(jnp.abs(a), d), image, d), zero
    if system.tried is not None:
        _, rows, asymmetry = system.tried
    else:
        probes = [_times(d, probe(d, seed)) for seed in (0, 1)]
        images = [*map(system.image, probes)]
        rows = jax.tree.map(lambda a, b: jnp.maximum(jnp.abs(a), jnp.abs(b)), *images)
        asymmetry = _asymmetry(space, probes, images) if operator.symmetric else zero
    rows = _at_least(rows, unknown.limits.rcond * space.max(rows))
    return jax.tree.map(lambda leaf: jnp.where(leaf > 0, leaf, 1), rows), asymmetry


def _asymmetry(space: Space, probes: list[Tree], images: list[Tree]) -> Any:
    u, w = (_over(p, jnp.maximum(*map(space.max, probes))) for p in probes)
    au, aw = (_over(a, jnp.maximum(*map(space.max, images))) for a in images)
    scale = space.norm(u) * space.norm(aw) + space.norm(w) * space.norm(au)
    # Both products are of vectors without a pattern: about 1 / sqrt(n) of what they may be. Of a
    # system that is 0, which is symmetric, the quotient is 0.
    return divide(jnp.abs(space.dot(u, aw) - space.dot(w, au)), scale) * space.size(u) ** 0.5


def _conserved(system: LinearSystem) -> Any:
    """How far a vector p with A p = 0 is from A^T p = 0; 0 where there is no such p."""
    operator, space = system.operator, system.space
    w = probe(operator.example, 3)
    zero = jnp.zeros_like(space.max(w))
    if operator.symmetric:
        return zero
    fixed = jax.lax.stop_gradient
    (back,) = system.apply_inverse([fixed(operator.matvec(w))])
    p = combine(-1, back, w)
    image, other = fixed(operator.rmatvec(p)), fixed(operator.rmatvec(w))
    ratio = divide(space.norm(image) * space.norm(w), space.norm(other) * space.norm(p))
    return jnp.where(space.norm(p) > 1e-3 * space.norm(w), ratio, zero)


def kept(operator: LinearOperator, space: Space) -> Any:
    """The same for a system that is known to be singular, by its matrix if that fits; else NaN:
    unknown."""
    if operator.symmetric:
        return jnp.zeros(())
    if known_size(operator.size) > DENSE_FALLBACK or not space.is_local:
        return jnp.asarray(jnp.nan)
    matrix = operator.as_matrix()
    matrix = matrix / jnp.maximum(jnp.max(jnp.abs(matrix)), jnp.finfo(matrix.dtype).tiny)
    p = jnp.linalg.svd(matrix)[2][-1]
    image, size = matrix.T @ p, jnp.abs(matrix.T) @ jnp.abs(p)
    # An entry of p that is zero is rounding, and so is what comes of it.
    size = jnp.maximum(size, jnp.finfo(matrix.dtype).eps ** 0.5 * jnp.max(size))
    return jnp.max(jnp.where(size > 0, jnp.abs(image) / jnp.where(size > 0, size, 1), 0))


def _largest(space: Space, v: Tree, unit: Tree) -> Any:
    return space.max(jax.tree.map(lambda a, u: jnp.where(a == 0, 0, a / u), v, unit))


def _at_least(v: Tree, least: Any) -> Tree:
    return jax.tree.map(lambda leaf: jnp.maximum(leaf, least.astype(leaf.dtype)), v)


def _times(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.multiply, a, b)


def _over(v: Tree, scalar: Any) -> Tree:
    return jax.tree.map(lambda leaf: divide(leaf, scalar), v)
