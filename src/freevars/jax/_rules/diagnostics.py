"""Whether a computed derivative can be trusted, and the error that says why not.

A rule built on the implicit function theorem gives a number for any x, solution or not. What tells
the two apart are a few numbers that come with the derivative; each depends on values alone, not on
directions, so that it costs no derivative itself. Not here: how they are computed (`linear`,
`rules`).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from freevars.errors import FreevarsError, NotASolutionError, SingularError

__all__ = ["Diagnostics", "OnFailure", "failure", "least_rcond", "tolerance"]

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
    finite: Any  # bool: x, its optimality and the matrix are finite
    error: Any  # the norm of a Newton step relative to the norm of x, absolute below 1
    rcond: Any  # an estimate of the reciprocal condition number
    residual: Any  # of the linear solver for a random right-hand side, relative
    asymmetry: Any  # |u.Av - v.Au| relative to |u||Av| + |v||Au|

    @staticmethod
    def of(
        n: int, *, finite: Any, error: Any, rcond: Any, residual: Any, asymmetry: Any
    ) -> Diagnostics:
        """Judge each by the spacing of its own dtype; a NaN is never good."""
        good = finite & (error <= tolerance(error.dtype)) & (rcond > least_rcond(n, rcond.dtype))
        good &= residual <= tolerance(residual.dtype)
        good &= asymmetry <= tolerance(asymmetry.dtype)
        return Diagnostics(good, finite, error, rcond, residual, asymmetry)


def failure(diagnostics: Diagnostics, n: int, name: str) -> FreevarsError:
    """The error for diagnostics that is not good."""
    tol = tolerance(diagnostics.residual.dtype)
    error, rcond, residual, asymmetry = map(float, diagnostics[2:])
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
        f" {tolerance(diagnostics.error.dtype):.1e} is accepted."
        " Let it run longer, or declare the result good with check=False."
    )
