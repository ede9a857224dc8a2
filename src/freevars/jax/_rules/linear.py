"""The linear system of an implicit derivative: which solver, and how its failure shows.

A small system is written out as a matrix and factorised once, for the solution and its transpose; a
large one is only ever applied to vectors, by a solver of lineax's. Either way the solve sits in
`jax.lax.custom_linear_solve`, so that its derivatives of any order and its transpose come from the
system and not from the steps of a solver. A solver that was told a system is symmetric, and one
that stops short, give numbers in any case; so what they give is put back into the system. Not here:
where the system comes from, and what is done about a failure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from freevars.jax._rules.diagnostics import tolerance

__all__ = ["DIRECT_LIMIT", "LinearSolve", "System", "check_linear_solve", "prepare"]

Vector: TypeAlias = Any  # Float[Array, "n"]
MatVec: TypeAlias = Callable[[Vector], Vector]
Solve: TypeAlias = Callable[[Vector], Vector]  # b -> x
LinearSolve: TypeAlias = Any  # None, a lineax solver, or a callable solve(matvec, b) -> x

# Up to this size the matrix is written out. Below it a factorisation costs less than an iteration's
# bookkeeping, and tells a singular system from a slow one.
DIRECT_LIMIT = 512


class System(NamedTuple):
    """A system A x = b, prepared for any number of b.

    `solve(b)` is linear in b and differentiable. The rest is for the check and depends on A and on
    the residual of the solution alone: see `diagnostics.Diagnostics`.
    """

    solve: Callable[[Vector], Vector]
    size: Any  # of A, in some norm: finite if A is
    rcond: Any
    residual: Any
    asymmetry: Any
    newton_step: Any  # the norm of the solution for b = residual


def check_linear_solve(linear_solve: LinearSolve, *, least_squares: bool) -> None:
    """Refuse what is neither a lineax solver nor a function, or finds no shortest solution."""
    if linear_solve is None:
        return
    if _is_lineax(linear_solve):
        lx = _lineax()
        if least_squares and not isinstance(linear_solve, (lx.SVD, lx.LSMR)):
            msg = (
                'on_failure="least_squares" needs a linear solver that finds the shortest solution'
                " of a singular system: None, lineax.SVD() or lineax.LSMR(...), got"
                f" {linear_solve!r}."
            )
            raise ValueError(msg)
        return
    if isinstance(linear_solve, type) or not callable(linear_solve):
        msg = (
            "linear_solve: expected None, a lineax solver such as lineax.LU(), or a function"
            f" solve(matvec, b), got {linear_solve!r}."
        )
        raise TypeError(msg)


def prepare(
    matvec: MatVec,
    example: Vector,
    residual: Vector,
    *,
    symmetric: bool,
    linear_solve: LinearSolve = None,
    least_squares: bool = False,
    check: bool = True,
) -> System:
    """The system of `matvec`, on real vectors like `example` and `residual`.

    `symmetric` says that the system is a second derivative. That is told to a solver which needs to
    know it, and is checked; `least_squares` says that there may be no exact solution.
    """
    if example.size == 0:
        return _unmeasured(lambda b: b, example.dtype)
    if linear_solve is not None and not _is_lineax(linear_solve):
        return _matrix_free(
            matvec, example, residual, linear_solve, check=check, least_squares=least_squares
        )
    n, dtype = example.size, example.dtype
    if linear_solve is None and n <= DIRECT_LIMIT and not least_squares:
        return _direct(matvec, example, residual, _lu, least_squares=False, check=check)
    lx = _lineax()
    solver = linear_solve
    if solver is None:
        solver = _default(n, dtype, symmetric=symmetric, least_squares=least_squares)
    if not isinstance(solver, (lx.CG, lx.BiCGStab, lx.GMRES, lx.LSMR, lx.Normal)):
        factorise = functools.partial(_by_lineax, solver, symmetric)
        return _direct(
            matvec, example, residual, factorise, least_squares=least_squares, check=check
        )
    # Only a solver for symmetric systems rests on symmetry.
    symmetric = symmetric and isinstance(solver, lx.CG)
    tags = lx.positive_semidefinite_tag if symmetric else frozenset()

    def solve(apply: MatVec, b: Vector) -> Vector:
        struct = jax.ShapeDtypeStruct(b.shape, b.dtype)
        operator = lx.FunctionLinearOperator(apply, struct, tags)
        return solver.compute(solver.init(operator, {}), b, {})[0]

    return _matrix_free(
        matvec,
        example,
        residual,
        solve,
        check=check,
        symmetric=symmetric,
        least_squares=least_squares,
    )


def _default(n: int, dtype: Any, *, symmetric: bool, least_squares: bool) -> Any:
    lx = _lineax()
    if n <= DIRECT_LIMIT:
        return lx.SVD()
    rtol = tolerance(dtype) ** 3  # eps ** 0.75
    if least_squares:
        return lx.LSMR(rtol=rtol, atol=0.0)
    if symmetric:
        return lx.CG(rtol=rtol, atol=0.0)
    return lx.GMRES(rtol=rtol, atol=0.0, restart=50, stagnation_iters=50)


def _lu(matrix: Any) -> tuple[Solve, Solve]:
    # Not lineax's, which inside shard_map takes two vectors of one type for different.
    lu = jax.scipy.linalg.lu_factor(matrix)
    return (
        lambda b: jax.scipy.linalg.lu_solve(lu, b),
        lambda b: jax.scipy.linalg.lu_solve(lu, b, trans=1),
    )


def _by_lineax(solver: Any, symmetric: bool, matrix: Any) -> tuple[Solve, Solve]:  # noqa: FBT001
    lx = _lineax()
    # Only a solver that asks for a definite matrix is told that it is one; the residual shows if
    # it is not.
    tags = lx.positive_semidefinite_tag if symmetric and isinstance(solver, lx.Cholesky) else ()
    state = solver.init(lx.MatrixLinearOperator(matrix, tags), {})
    transposed_state, options = solver.transpose(state, {})
    return (
        lambda b: solver.compute(state, b, {})[0],
        lambda b: solver.compute(transposed_state, b, options)[0],
    )


def _direct(
    matvec: MatVec,
    example: Vector,
    residual: Vector,
    factorise: Callable[[Any], tuple[Solve, Solve]],
    *,
    least_squares: bool,
    check: bool,
) -> System:
    """Write the matrix out and factorise it once."""
    n, dtype = example.size, example.dtype
    # Zeros like the example bring along over which axes of an enclosing shard_map it varies.
    columns = jnp.eye(n, dtype=dtype) + jnp.zeros_like(example)[:, None]
    matrix = jax.vmap(matvec, in_axes=1, out_axes=1)(columns)
    constant = jax.lax.stop_gradient(matrix)
    solve, transpose_solve = factorise(constant)

    def linear(b: Vector) -> Vector:
        return jax.lax.custom_linear_solve(
            lambda v: matrix @ v, b, lambda _, b: solve(b), lambda _, b: transpose_solve(b)
        )

    if not check:
        return _unmeasured(linear, dtype)
    # Both at once: two right-hand sides cost little more than one. For a random v, |A^-1 v| / |v|
    # is within a factor of about sqrt(n) of |A^-1|.
    v = _probe(example, 0)
    x, step = jax.vmap(solve, in_axes=1, out_axes=1)(jnp.stack([v, residual], axis=1)).T
    size = jnp.linalg.norm(constant)
    system = _unmeasured(linear, dtype)._replace(size=size, newton_step=jnp.linalg.norm(step))
    if not least_squares:
        rcond = jnp.linalg.norm(v) / (jnp.linalg.norm(x) * size)
        rcond = jnp.where(jnp.isfinite(rcond), rcond, 0.0)
        unsolved = jnp.linalg.norm(constant @ x - v) / jnp.linalg.norm(v)
        system = system._replace(rcond=rcond, residual=unsolved)
    return system


def _matrix_free(
    matvec: MatVec,
    example: Vector,
    residual: Vector,
    solve: Callable[[MatVec, Vector], Vector],
    *,
    check: bool,
    symmetric: bool = False,
    least_squares: bool = False,
) -> System:
    """Apply the system to vectors only; a solution that does not solve it is NaN."""
    dtype = example.dtype
    tol = tolerance(dtype)

    def checked(apply: MatVec, b: Vector) -> Vector:
        x = solve(apply, b)
        if not check:
            return x
        left = apply(x) - b
        good = jnp.linalg.norm(left) <= tol * jnp.linalg.norm(b)
        if least_squares:  # then the normal equations hold
            transpose = jax.linear_transpose(apply, b)
            normal, scale = (jnp.linalg.norm(transpose(r)[0]) for r in (left, b))
            good |= normal <= tol * scale
        return jnp.where(good, x, jnp.nan)

    def linear(b: Vector) -> Vector:
        # Not told to be symmetric: then the solution of the transposed system is checked in that.
        return jax.lax.custom_linear_solve(matvec, b, checked, checked)

    if not check:
        return _unmeasured(linear, dtype)
    constant = jax.lax.stop_gradient
    u, v = _probe(example, 0), _probe(example, 1)
    au, av = constant(matvec(u)), constant(matvec(v))
    size = jnp.linalg.norm(au) / jnp.linalg.norm(u)
    system = _unmeasured(linear, dtype)._replace(size=size)
    if symmetric:
        scale = jnp.linalg.norm(u) * jnp.linalg.norm(av) + jnp.linalg.norm(v) * jnp.linalg.norm(au)
        # Of a system that is 0, which is symmetric, the quotient is 0 / 1.
        asymmetry = jnp.abs(u @ av - v @ au) / jnp.where(scale > 0, scale, 1)
        system = system._replace(asymmetry=asymmetry)
    if least_squares:
        inverse_size = 1 / size
    else:
        x = constant(jax.lax.custom_linear_solve(matvec, v, solve, solve))
        inverse_size = jnp.linalg.norm(x) / jnp.linalg.norm(v)
        rcond = 1 / (size * inverse_size)
        unsolved = jnp.linalg.norm(constant(matvec(x)) - v) / jnp.linalg.norm(v)
        unsolved = jnp.where(jnp.isfinite(unsolved), unsolved, jnp.inf)
        system = system._replace(rcond=rcond, residual=unsolved)
    # The step is only estimated here: a solve of its own would cost as much as the derivative.
    return system._replace(newton_step=jnp.linalg.norm(residual) * inverse_size)


def _unmeasured(solve: Solve, dtype: Any) -> System:
    """A system of which nothing is measured, and so nothing held against it. Not NaN: that is for
    whoever searches for NaN (`jax_debug_nans`) to find."""
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    return System(solve, size=zero, rcond=one, residual=zero, asymmetry=zero, newton_step=zero)


def _probe(example: Vector, seed: int) -> Vector:
    """A fixed vector with a bit of every direction. A random one would take longer to compile than
    all the rest."""
    k = jnp.arange(example.size, dtype=example.dtype)
    return jnp.sin((k + (seed + 1)) ** 2) + jnp.zeros_like(example)


def _lineax() -> Any:
    try:
        import lineax  # noqa: PLC0415 (an extra: importing freevars.jax needs only JAX)
    except ImportError as error:
        msg = (
            "the linear system of an implicit derivative is solved by lineax:"
            " pip install 'freevars[rules]', or give a linear_solve=solve(matvec, b) of your own"
        )
        raise ImportError(msg) from error
    return lineax


def _is_lineax(x: Any) -> bool:
    return any(kind.__module__.split(".")[0] == "lineax" for kind in type(x).__mro__)
