"""Solve systems that are only applied to pytrees, never written out.

By default conjugate gradients for a second derivative, and BiCGStab(2) otherwise, for a fixed point
after Richardson's iteration; where these stall, the matrix if it fits, then least squares. Results
are checked in the system; those that do not solve it become NaN. Not here: the methods (`krylov`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from freevars._solvers.verdict import Limits
from freevars.jax import _compat
from freevars.jax._rules import krylov, scaled
from freevars.jax._rules.coordinates import Space, probe
from freevars.jax._rules.krylov import Solution, System
from freevars.jax._rules.operator import LinearOperator, lineax_module
from freevars.jax._rules.powers import exponent, power_of_two, two_to
from freevars.jax._rules.system import times, where
from freevars.jax._solver.unknown import like

__all__ = [
    "DENSE_FALLBACK",
    "Choice",
    "Tried",
    "Units",
    "is_sharded",
    "nan_unless_solved",
    "solve_by_default",
    "solve_by_lineax",
    "solve_transposed",
    "symmetric_units",
]

Tree: TypeAlias = Any  # a pytree of real arrays of one dtype
Solve: TypeAlias = Callable[[Tree], Tree]  # b -> x

# Up to this size the matrix is written out where an iteration stalls: 32 MB in float64.
DENSE_FALLBACK = 2048

_SWEEPS = 2  # each leaves the root of how far the rows differ
_ALIKE = 10  # up to 2 to this they do not: an estimate may be small by chance


class Choice(NamedTuple):
    """What the caller of the default method chose."""

    preconditioner: Callable[[LinearOperator], Solve] | None
    dense_limit: int
    least_squares: bool
    check: bool


def solve_by_default(
    choice: Choice,
    operator: LinearOperator,
    space: Space,
    eps: float,
    b: Tree,
    *,
    tol: float | None = None,
    units: Units | None = None,
) -> tuple[Tree, Any]:
    """The solution of A x = b, and |A x - b| / |b|; `tol` in place of eps^(3/4). `units` of a
    symmetric system: then D A D y = D b is solved, for x = D y."""
    tol = eps**0.75 if tol is None else tol
    iterates = operator.fixed_point and not (choice.preconditioner or choice.least_squares)
    method = _by_iteration if iterates else _by_krylov
    found = method(choice, operator, space, eps, b, tol, units)
    return found.x, jnp.sqrt(found.rr)


def _by_iteration(
    choice: Choice,
    operator: LinearOperator,
    space: Space,
    eps: float,
    b: Tree,
    tol: float,
    units: Units | None,
) -> Solution:
    """The same as `_by_krylov`, for the system I - J of a fixed point. Where J contracts, its
    powers solve the system, just as iterating `fun` finds the solution; a Krylov method solves what
    they leave."""
    bb = space.dot(b, b)

    def correct(x: Tree, turns: Any) -> Solution:
        here = jax.tree.map(lambda leaf: jnp.where(turns < 0, 0, leaf), b)
        r = krylov.combine(-1, operator.matvec(x), here)
        part = krylov.divide(space.norm(here), space.norm(r))
        more = _by_krylov(choice, operator, space, eps, r, tol * part, units)
        rr = more.rr * krylov.divide(1.0, part * part)
        return more._replace(x=krylov.combine(1, more.x, x), rr=rr)

    system = System(operator.matvec, b, space.dot, tol, eps, 1.0, 20_000)
    first = krylov.richardson(system)
    return _unless_solved(first._replace(rr=krylov.divide(first.rr, bb)), correct)


def _by_krylov(
    choice: Choice,
    operator: LinearOperator,
    space: Space,
    eps: float,
    b: Tree,
    tol: Any,
    units: Units | None,
) -> Solution:
    """The solution, with the squared norm of the residual relative to that of b."""
    n = space.size(b)
    fits = n <= max(DENSE_FALLBACK, choice.dense_limit) and space.is_local
    fits = fits and not is_sharded(operator)

    def by(v: Tree) -> Tree:
        return v if units is None else units.times(v)

    def over(v: Tree) -> Tree:
        return v if units is None else units.times(v, -1)

    # In units in which b and A b are about 1, no square of anything overflows.
    b = by(b)
    b_scale = power_of_two(space.max(b))
    # Behind a barrier, as XLA joins the factors of a product with a constant b otherwise.
    b = jax.lax.optimization_barrier(times(1 / b_scale, b))
    image = by(operator.matvec(by(b)))
    scale = power_of_two(space.max(image))

    def matvec(v: Tree) -> Tree:
        return times(1 / scale, by(operator.matvec(by(v))))

    def rmatvec(v: Tree) -> Tree:
        return times(1 / scale, by(operator.rmatvec(by(v))))

    bb = space.dot(b, b)
    size = jnp.sqrt(krylov.divide(space.dot(image, image), bb)) / scale
    precondition = None
    if choice.preconditioner is not None:
        about_inverse = choice.preconditioner(operator)
        name = "preconditioner: the result"
        precondition = lambda v: times(scale, over(like(about_inverse(over(v)), v, name)))  # noqa: E731
    steps = 4 * n + 100 if fits else min(10 * n + 100, 20_000)
    symmetric = operator.symmetric
    # Of conjugate gradients, the residual that they carry along is close to the true one.
    verify = choice.check or fits or not symmetric
    system = System(matvec, b, space.dot, tol, eps, size, steps, precondition, verify)
    if choice.least_squares:
        found = krylov.least_squares(system._replace(max_steps=2 * steps), rmatvec)
        # There is none; what is left of the normal equations tells.
        found = found._replace(rr=jnp.where(found.solved, 0, jnp.inf))
    else:
        found = (krylov.conjugate_gradients if symmetric else krylov.bicgstab)(system)
        if fits:
            found = _unless_solved(
                found, lambda _, zero: _by_matrix(system, operator, scale, by, zero)
            )
        elif not symmetric:
            found = _unless_solved(found, lambda x, _: krylov.least_squares(system, rmatvec, x))
    x = by(times(b_scale / scale, found.x))
    return found._replace(x=x, rr=krylov.divide(found.rr, bb))


class Units(NamedTuple):
    """A diagonal D of powers of two, which is kept beside a solve: in a quarter of the memory."""

    exponents: Tree  # int16

    @staticmethod
    def of(v: Tree) -> Units:
        """D = 1."""
        return Units(jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.int16), v))

    def times(self, v: Tree, sign: int = 1) -> Tree:
        """D v, or v / D for the sign -1."""

        def product(e: Any, v: Any) -> Any:
            # It depends on v, or XLA would write D out before a loop and keep it.
            return two_to(jnp.where(v == v, sign * e, 0), v.dtype) * v  # noqa: PLR0124

        return jax.tree.map(product, self.exponents, v)

    def up(self, exponents: Tree) -> Units:
        """D times powers of two."""
        return Units(jax.tree.map(jnp.add, self.exponents, exponents))


class Tried(NamedTuple):
    """What images of vectors without a pattern show about a symmetric system; constant."""

    units: Units  # in which its rows are about of one size
    rows: Tree  # the size of each, in units of its own
    asymmetry: Any  # |A - A^T| / 2|A|, about


def symmetric_units(operator: LinearOperator, space: Space) -> Tried:
    """D for which the rows of D A D have about the same size, and what is found on the way.

    The size of a row is estimated by images of vectors without a pattern. A row of D A D is scaled
    by D twice, once as a column; so D takes the root of what is missing, more than once. Rows that
    are within a factor stay as they are: of a system in one unit, D is 1.

    References:
        Bradley 2010, "Algorithms for the equilibration of matrices and their application to
        limited-memory quasi-Newton methods", chapter 3.
    """
    units = Units.of(operator.example)
    for sweep in range(_SWEEPS):
        pair = [probe(operator.example, 2 * sweep + k) for k in (0, 1)]
        images = [units.times(operator.matvec(units.times(v))) for v in pair]
        images = jax.lax.stop_gradient(images)
        scaled_rows = jax.tree.map(lambda a, b: jnp.maximum(jnp.abs(a), jnp.abs(b)), *images)
        rows = units.times(scaled_rows, -1)
        largest = space.max(scaled_rows)

        def missing(row: Any, largest: Any = largest) -> Any:
            above = exponent(largest) - exponent(row)
            wide = (row > 0) & jnp.isfinite(largest) & (above > _ALIKE)
            return jnp.where(wide, above // 2, 0)

        units = units.up(jax.tree.map(missing, scaled_rows))
    # u'Aw = w'Au of a symmetric system. Both are about 1 / sqrt(n) of what they may be, and the
    # norm of such a vector is sqrt(n / 3).
    difference = jnp.abs(space.dot(pair[0], images[1]) - space.dot(pair[1], images[0]))
    scale = space.norm(images[0]) + space.norm(images[1])
    return Tried(units, rows, krylov.divide(3**0.5 * difference, scale))


def _unless_solved(first: Solution, then: Callable[[Tree, Any], Solution]) -> Solution:
    """The solution of a second method, which runs only if the first fails.

    A loop of at most one iteration, not a `cond`, which would compute both for every member under
    `vmap`. `then` takes the current x, and the number of iterations, 0. What depends on these is
    computed in the loop; XLA moves the rest out of it, and computes it in any case.
    """

    def turn(state: tuple[Solution, Any]) -> tuple[Solution, Any]:
        first, turns = state
        second = then(first.x, turns)
        return second._replace(steps=first.steps + second.steps), turns + 1

    return _compat.while_loop(lambda s: ~s[0].solved & (s[1] < 1), turn, (first, 0))[0]


def _by_matrix(
    system: System, operator: LinearOperator, scale: Any, by: Solve, zero: Any
) -> Solution:
    columns = operator.columns(jnp.arange(operator.size) + zero)
    matrix = jax.lax.stop_gradient(columns).T / scale
    units = operator.ravel(by(jax.tree.map(jnp.ones_like, system.b)))
    matrix = units[:, None] * matrix * units
    alike = jnp.ones(operator.size, matrix.dtype)  # the sizes are not known here
    limits = Limits.of(float(jnp.finfo(matrix.dtype).eps))
    factors = scaled.factorise(matrix, alike, alike, alike, limits)
    x = operator.unravel(factors.of(operator.ravel(system.b)))
    r = krylov.combine(-1, system.matvec(x), system.b)
    rr = system.dot(r, r)
    return Solution(x, rr, jnp.isfinite(rr), zero)


def solve_transposed(solve: Solve, again: Solve, b: Tree) -> Tree:
    """The transpose of a caller's solver.

    Where JAX can transpose the function, that is the transpose, even for a function that has its
    own factors and never applies the operator. What JAX cannot transpose, such as a loop with a
    stopping criterion, is called `again`, for the transposed operator.
    """
    try:
        transpose = jax.linear_transpose(solve, b)
        jax.eval_shape(transpose, b)
    except Exception:  # noqa: BLE001 (JAX says so with many classes; `solve` itself has run before)
        return again(b)
    return transpose(b)[0]


def solve_by_lineax(solver: Any, operator: LinearOperator, space: Space, b: Tree) -> Tree:
    if not space.is_local:
        message = (
            f"linear_solve: {solver!r} sums over one device only, and the function couples the"
            " unknowns of several by a collective. Leave linear_solve out, or give a function"
            " solve(operator, b)."
        )
        raise NotImplementedError(message)
    lx = lineax_module()
    definite = operator.symmetric and isinstance(solver, lx.CG)
    # Only a solver for symmetric systems rests on symmetry.
    plain = LinearOperator(operator.matvec, operator.structure, rmatvec=operator.rmatvec)
    return solver.compute(solver.init(plain.as_lineax(definite=definite), {}), b, {})[0]


def nan_unless_solved(
    operator: LinearOperator, space: Space, x: Tree, b: Tree, *, least_squares: bool
) -> Tree:
    tol = float(jnp.finfo(jax.tree.leaves(b)[0].dtype).eps) ** 0.25
    left = krylov.combine(-1, b, operator.matvec(x))
    good = space.norm(left) <= tol * space.norm(b)
    if least_squares:  # then the normal equations hold
        normal, scale = (space.norm(operator.rmatvec(r)) for r in (left, b))
        good |= normal <= tol * scale
    return where(good, x)


def is_sharded(operator: LinearOperator) -> bool:
    return any(_compat.is_sharded(leaf) for leaf in jax.tree.leaves(operator.example))
