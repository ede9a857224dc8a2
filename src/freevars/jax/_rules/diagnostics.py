"""Whether a computed derivative can be trusted, and the error that says why not.

A rule built on the implicit function theorem gives a number for any x, solution or not. What tells
the two apart are a few numbers that come with the derivative; each depends on values alone, not on
directions, so that it costs no derivative itself. Not here: how they are computed (`linear`,
`rules`).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from freevars.errors import FreevarsError, NotASolutionError, SingularError
from freevars.jax._rules.coordinates import probe
from freevars.jax._rules.krylov import combine
from freevars.jax._rules.linear import LinearSystem

__all__ = ["Diagnostics", "OnFailure", "failure", "least_rcond", "measure", "tolerance"]

OnFailure: TypeAlias = Literal["raise", "nan", "least_squares"]


def tolerance(dtype: Any) -> float:
    """The relative error up to which a computed derivative counts as one: the fourth root of the
    spacing of the dtype, 1.2e-4 for float64 and 1.9e-2 for float32."""
    return float(_eps(dtype) ** 0.25)


def least_rcond(n: int, dtype: Any) -> float:
    """The reciprocal condition number of n equations below which rounding decides the solution."""
    return 10 * n * _eps(dtype)


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)


class Diagnostics(NamedTuple):
    """What tells whether a derivative can be trusted: scalars, each as good as can be where it was
    not measured."""

    good: Any  # bool: nothing below is wrong
    tol: Any  # what is accepted of `error`
    finite: Any  # bool: x, its optimality and the matrix are finite
    error: Any  # the norm of a Newton step relative to the norm of x, absolute below 1
    rcond: Any  # an estimate of the reciprocal condition number
    residual: Any  # of the linear solver for a random right-hand side, relative
    asymmetry: Any  # |u.Av - v.Au| relative to |u||Av| + |v||Au|

    @staticmethod
    def of(
        n: int, *, finite: Any, error: Any, tol: float, rcond: Any, residual: Any, asymmetry: Any
    ) -> Diagnostics:
        """Judge each by the spacing of its own dtype; a NaN is never good."""
        good = finite & (error <= tol) & (rcond > least_rcond(n, rcond.dtype))
        good &= residual <= tolerance(residual.dtype)
        good &= asymmetry <= tolerance(asymmetry.dtype)
        return Diagnostics(
            good, jnp.asarray(tol, error.dtype), finite, error, rcond, residual, asymmetry
        )


def measure(system: LinearSystem, eps: float, v: Any, f: Any) -> Diagnostics:
    """What the system of a derivative tells of it, at x with the optimality f, both in real
    coordinates; `eps` is the spacing of the dtype of x."""
    v, f = jax.lax.stop_gradient((v, f))
    operator, space = system.operator, system.space
    dtype = jax.tree.leaves(v)[0].dtype if operator.size else jnp.zeros(()).dtype
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    size, rcond, residual, asymmetry, step = zero, one, zero, zero, zero
    if operator.size and system.exact:
        # For a random w, |A^-1 w| / |w| is within a factor of about sqrt(n) of |A^-1|.
        w = probe(v, 0)
        fixed = jax.lax.stop_gradient
        if system.matrix is not None:
            solution, newton = system.apply_inverse([w, f])
            size = jnp.linalg.norm(system.matrix)
            step = space.norm(newton)
        else:
            u = probe(v, 1)
            image, other = fixed(operator.matvec(w)), fixed(operator.matvec(u))
            size = space.norm(image) / space.norm(w)
            (solution,) = [w] if system.least_squares else system.apply_inverse([w])
            # Only estimated: a solve of its own would cost as much as the derivative.
            step = space.norm(f) * space.norm(solution) / space.norm(w)
            if system.least_squares:
                step = space.norm(f) / size
            if system.rests_on_symmetry:
                scale = space.norm(w) * space.norm(other) + space.norm(u) * space.norm(image)
                difference = jnp.abs(space.dot(u, image) - space.dot(w, other))
                # Of a system that is 0, which is symmetric, the quotient is 0 / 1.
                asymmetry = difference / jnp.where(scale > 0, scale, 1)
        if not system.least_squares:
            rcond = space.norm(w) / (space.norm(solution) * size)
            rcond = jnp.where(jnp.isfinite(rcond), rcond, 0.0)
            left = combine(-1, w, fixed(operator.matvec(solution)))
            residual = space.norm(left) / space.norm(w)
            residual = jnp.where(jnp.isfinite(residual), residual, jnp.inf)
    elif operator.size:
        step = space.norm(system.apply_inverse([f])[0])
    error = step / jnp.maximum(space.norm(v), 1.0) if operator.size else zero
    largest = space.max(v) + space.max(f) if operator.size else zero
    found = Diagnostics.of(
        operator.size,
        finite=jnp.isfinite(largest) & jnp.isfinite(size),
        error=error,
        tol=eps**0.25,
        rcond=rcond,
        residual=residual,
        asymmetry=asymmetry,
    )
    return Diagnostics(*map(jax.lax.stop_gradient, found))


def failure(diagnostics: Diagnostics, n: int, name: str) -> FreevarsError:
    """The error for diagnostics that is not good."""
    tol = tolerance(diagnostics.residual.dtype)
    error, rcond, residual, asymmetry = map(float, diagnostics[3:])
    if not diagnostics.finite:
        return NotASolutionError(
            f"{name}: the solver returned a value that is not finite, or its optimality or the"
            " derivative of that is not finite there."
        )
    if not rcond > least_rcond(n, diagnostics.rcond.dtype):
        return SingularError(
            f"{name}: the system of the derivative is singular (reciprocal condition number about"
            f" {rcond:.1e}), so the solution is not a differentiable function of the captured"
            ' values there. on_failure="least_squares" takes the shortest solution.'
        )
    if not asymmetry <= tol:
        return SingularError(
            f"{name}: the second derivative of the objective is not symmetric (by {asymmetry:.1e},"
            " relative): a custom rule in it is not a gradient. Mend that rule, or give"
            " linear_solve=lineax.GMRES(...), which does not rest on symmetry."
        )
    if not residual <= tol:
        return SingularError(
            f"{name}: the linear solver leaves a residual of {residual:.1e}, relative; up to"
            f" {tol:.1e} is accepted. The system is singular, or linear_solve needs more steps, or"
            " a system of another kind (a symmetric positive definite one, say)."
        )
    return NotASolutionError(
        f"{name}: the solver did not converge: a Newton step from its result would still move it by"
        f" {error:.1e}, relative to its norm (absolute below norm 1); up to"
        f" {float(diagnostics.tol):.1e} is accepted."
        " Let it run longer, or declare the result good with check=False."
    )
