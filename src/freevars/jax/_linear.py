"""The linear system of an implicit derivative: which solver, and how its failure shows.

The solvers are lineax's. A small system is written out as a matrix and factorised once, for the
solution and its transpose; a large one is only ever applied to vectors. Either way the solve sits in
`jax.lax.custom_linear_solve`, so that its derivatives of any order and its transpose come from the
system and not from the steps of a solver. A failure cannot raise inside a compiled program: it turns
the result into NaN there, and `Health` carries what is needed to raise outside. Not here: where the
system comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

__all__ = ["Health", "LinearSolve", "Solver", "prepare"]

Vector: TypeAlias = Any  # Float[Array, "n"]
MatVec: TypeAlias = Callable[[Vector], Vector]
LinearSolve: TypeAlias = Any  # None, a lineax solver, or a callable solve(matvec, b) -> x

# Up to this size the matrix is written out. Below it a factorisation costs less than an iteration's
# bookkeeping, and tells a singular system from a slow one.
DIRECT_LIMIT = 512


class Health(NamedTuple):
    """What says whether a linear system can be trusted; every entry depends on primals alone."""

    rcond: Any  # Float[Array, ""]: estimated reciprocal condition number; NaN where not estimated
    asymmetry: Any  # Float[Array, ""]: |u.Av - v.Au| relative to |u||Av|; 0 where nothing rests on it


class Solver(NamedTuple):
    """A prepared system. `solve(b)` is linear in b and differentiable; `size_of(b)` estimates the norm
    of the solution without a derivative; `health` tells whether to trust them."""

    solve: Callable[[Vector], Vector]
    size_of: Callable[[Vector], Any]
    health: Health


def tolerance(dtype: Any) -> float:
    """The relative error up to which a computed derivative counts as one: the fourth root of the
    spacing of the dtype, 1.2e-4 for float64 and 1.9e-2 for float32."""
    return float(jnp.finfo(dtype).eps) ** 0.25


def prepare(
    matvec: MatVec,
    example: Vector,
    *,
    symmetric: bool,
    linear_solve: LinearSolve = None,
    least_squares: bool = False,
    check: bool = True,
) -> Solver:
    """A solver for `matvec(x) = b`, with x and b like `example`, a real vector."""
    if callable(linear_solve) and not _is_lineax(linear_solve):
        return _matrix_free(matvec, example, _plain(linear_solve), symmetric=False, check=check)
    lx = _lineax()
    n = example.size
    solver = linear_solve
    if solver is None:
        solver = _default(n, example.dtype, symmetric=symmetric, least_squares=least_squares)
    if isinstance(solver, _iterative_types()):
        tags = lx.positive_semidefinite_tag if symmetric else frozenset()

        def solve(apply: MatVec, b: Vector) -> Vector:
            operator = lx.FunctionLinearOperator(apply, jax.eval_shape(lambda: b), tags)
            return lx.linear_solve(operator, b, solver, throw=False).value

        return _matrix_free(
            matvec, example, solve, symmetric=symmetric, check=check and not least_squares
        )
    return _direct(matvec, example, solver, symmetric=symmetric, check=check and not least_squares)


def _default(n: int, dtype: Any, *, symmetric: bool, least_squares: bool) -> Any:
    lx = _lineax()
    if n <= DIRECT_LIMIT:
        return lx.SVD() if least_squares else lx.LU()
    rtol = float(jnp.finfo(dtype).eps) ** 0.75
    if least_squares:
        return lx.LSMR(rtol=rtol, atol=0.0)
    if symmetric:
        return lx.CG(rtol=rtol, atol=0.0)
    return lx.GMRES(rtol=rtol, atol=0.0, restart=min(n, 50), stagnation_iters=50)


def _direct(
    matvec: MatVec, example: Vector, solver: Any, *, symmetric: bool, check: bool
) -> Solver:
    """Write the matrix out and factorise it once."""
    lx = _lineax()
    n = example.size
    matrix = jax.vmap(matvec, in_axes=1, out_axes=1)(jnp.eye(n, dtype=example.dtype))
    constant = jax.lax.stop_gradient(matrix)
    # Only a solver that asks for a definite matrix is told that it is one; the residual is checked.
    tags = lx.positive_semidefinite_tag if symmetric and isinstance(solver, lx.Cholesky) else ()
    operator = lx.MatrixLinearOperator(constant, tags)
    state = solver.init(operator, {})
    transposed_state, options = solver.transpose(state, {})

    def solve(_: MatVec, b: Vector) -> Vector:
        return lx.linear_solve(operator, b, solver, state=state, throw=False).value

    def transpose_solve(_: MatVec, b: Vector) -> Vector:
        return lx.linear_solve(
            operator.T, b, solver, state=transposed_state, options=options, throw=False
        ).value

    rcond = jnp.asarray(jnp.nan, example.dtype)
    scale = jnp.ones((), example.dtype)
    if check:
        # |A^-1 v| / |v| for a random v is within a factor of about sqrt(n) of |A^-1|.
        v = _probe(n, example.dtype, 0)
        size = jnp.linalg.norm(constant)
        rcond = jnp.linalg.norm(v) / (jnp.linalg.norm(solve(matvec, v)) * size)
        rcond = jnp.where(jnp.isfinite(rcond), rcond, 0.0)
        scale = jnp.where(rcond > least_rcond(n, example.dtype), 1.0, jnp.nan).astype(example.dtype)
    scale = jax.lax.stop_gradient(scale)

    def linear(b: Vector) -> Vector:
        x = jax.lax.custom_linear_solve(lambda v: matrix @ v, b, solve, transpose_solve)
        return x * scale if check else x

    def size_of(b: Vector) -> Any:
        return jnp.linalg.norm(solve(matvec, b))

    health = Health(jax.lax.stop_gradient(rcond), jnp.zeros((), example.dtype))
    return Solver(linear, size_of, health)


def least_rcond(n: int, dtype: Any) -> float:
    """Below this reciprocal condition number rounding alone decides the solution."""
    return 10 * n * float(jnp.finfo(dtype).eps)


def _matrix_free(
    matvec: MatVec,
    example: Vector,
    solve: Callable[[MatVec, Vector], Vector],
    *,
    symmetric: bool,
    check: bool,
) -> Solver:
    """Apply the system to vectors only; check each solution by applying it once more."""
    dtype = example.dtype
    tol = tolerance(dtype)

    def checked(apply: MatVec, b: Vector) -> Vector:
        x = solve(apply, b)
        error = jnp.linalg.norm(apply(x) - b)
        return jnp.where(error <= tol * jnp.linalg.norm(b), x, jnp.nan)

    use = checked if check else solve
    asymmetry = jnp.zeros((), dtype)
    if check and symmetric:
        u, v = _probe(example.size, dtype, 1), _probe(example.size, dtype, 2)
        au, av = matvec(u), matvec(v)
        size = jnp.linalg.norm(u) * jnp.linalg.norm(av) + jnp.linalg.norm(v) * jnp.linalg.norm(au)
        asymmetry = jnp.abs(u @ av - v @ au) / jnp.maximum(size, jnp.finfo(dtype).tiny)
        asymmetry = jax.lax.stop_gradient(asymmetry)
    scale = jnp.where(asymmetry <= tol, 1.0, jnp.nan).astype(dtype)

    def linear(b: Vector) -> Vector:
        x = jax.lax.custom_linear_solve(matvec, b, use, use, symmetric=symmetric)
        return x * scale if check and symmetric else x

    def size_of(b: Vector) -> Any:
        v = _probe(example.size, dtype, 0)
        return jnp.linalg.norm(b) * jnp.linalg.norm(v) / jnp.linalg.norm(matvec(v))

    return Solver(linear, size_of, Health(jnp.asarray(jnp.nan, dtype), asymmetry))


def _probe(n: int, dtype: Any, seed: int) -> Vector:
    """A fixed vector of random signs: no direction is special to it."""
    bits = jax.random.bernoulli(jax.random.key(seed, impl="threefry2x32"), shape=(n,))
    return jnp.where(bits, 1.0, -1.0).astype(dtype)


def _plain(linear_solve: Callable[..., Any]) -> Callable[[MatVec, Vector], Vector]:
    return lambda matvec, b: linear_solve(matvec, b)


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


def _iterative_types() -> tuple[type, ...]:
    lx = _lineax()
    return (lx.CG, lx.BiCGStab, lx.GMRES, lx.LSMR, lx.Normal)
