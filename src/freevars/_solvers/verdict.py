"""When the derivative at a solution can be trusted: the figures measured, and their limits.

The implicit function theorem gives a number for any x, solution or not, regular or not. What tells
them apart is asked in the problem's own units, so that equations multiplied by numbers of their
own, or unknowns measured in other units, give the same verdict. Let A = dF/dx and f = F(x) at the
solution x that a solver found from x0, and let, component by component,

    far = max(|x|, |x - x0|)                   what the solver worked with
    d   = max(far, sqrt(eps) max|x|)           the size of a component (1 where all of it is 0)
    S   = R A D,  D = diag(d)                  R makes the largest entry of each row 1.

A complex number is two components, which are both as large as it: it has one unit, and what is
rounded by the size of it moves both.

*Regular.* The smallest relative change of x that rounding cannot tell from none is about the
reciprocal condition number of S, times d. Below 10 eps the system is singular. (Columns of S may be
scaled to 1 as well, with a size of the component between far and eps^(1/4) max|x|: one that happens
to be zero, or is far smaller than others, is no sign of a singular system.)

*Converged.* The Newton step s = A^-1 f tells how far x is from the solution. Let

    r = |A^-1| |A| |x|                         rounding x moves x by eps r
    u = max(|x|, min(sqrt(eps) r, sqrt(eps) max|x|), 4 eps^(3/4) r)

The step in units of u is the relative error of x. Beside |x| there is a second unit because a
component may be a difference of others. Where the step is `negligible`, x is a solution. Up to
`step` it is one if the derivative is the same along the step: a small step is no reason to believe
that, for dF/dx and dF/dt may be differences of nearly equal terms. That is asked twice. Of A along
s: then the second simplified Newton step, A^-1 F(x - s), is much smaller than the first. And of the
derivative itself, y = -A^-1 dF/dt p, in a few directions p of what it is asked by: with dF/dx and
dF/dt at x - s it changes by -A^-1 (dF/dx y + dF/dt p), to first order, each component relative to
the largest that it is in these. For a component may move little where its derivative moves much: of
tanh(z), 1 - tanh(z)^2 where z is large. One that is small in a single direction says nothing.

Where a component of the solution is zero, all that the solver leaves there is an error, and no unit
can be read off x. How far the solver came gives one, |x - x0|; or, where x0 is zero as well, what
the other components move it by, min(r, max|x|). But only for what is zero: from x0 = 1 a
solver may find x = 1e-9 to a few percent, and that is wrong by a few percent. So it is asked for,
by values of F. F does not see x change by a part of the step: x is what rounding leaves, and the
unit what the solver could see, sqrt(eps) |x - x0|. Or x - s is zero as far as F sees, and the
second step is much smaller than the first: the solver was on its way to zero, and the unit is
eps^(1/4) |x - x0|, a part that solvers leave. Else the unit is u, from wherever the solver came.

F may be computed in fewer digits than its dtype has: on a GPU, products of float32 matrices are
by default in TF32. How few is measured: along half of s, A^-1 (F(x) - F(x - s/2)) differs from s/2
by a quarter of the second step, which is curvature, and by e r, where e is a relative error in the
terms of F. If s is no longer than 4 e r, no solver comes nearer, and the step counts by min(r,
max|x|). What e explains of a change of the derivative is not counted as one.

This costs values of F, so it is done only where the step is not negligible. Where the derivative
cannot be computed at x - s, a step that is not `certain` to be small is refused.

Sources: r is the condition of Skeel 1979, "Scaling for numerical stability in Gaussian
elimination"; the second step is the natural monotonicity test of Deuflhard 2004, "Newton Methods
for Nonlinear Problems", section 3. Not here: how a host computes the figures.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

__all__ = ["Figures", "Kind", "Limits", "OnFailure", "accepted", "is_minimum"]

# What holds at the result. Of "implicit" a function of the user's says it.
Kind: TypeAlias = Literal["root", "argmin", "fixed_point", "least_squares", "implicit"]
OnFailure: TypeAlias = Literal["raise", "warn", "nan", "least_squares"]

_SINGLE = 1e-6  # the eps of float32 is below, those of the half precisions are above


def is_minimum(kind: Kind) -> bool:
    """Whether the equations are the gradient of an objective, so that their system is symmetric."""
    return kind in {"argmin", "least_squares"}


class Limits(NamedTuple):
    """The limits of the figures, for an unknown of some precision."""

    negligible: float  # a step after which nothing is asked
    certain: float  # the largest one where nothing is known of the derivative on the way
    step: float  # the largest step
    change: float  # of the derivative along the step, relative
    rcond: float  # the least reciprocal condition number
    residual: float  # of the linear solver, relative
    asymmetry: float
    column: float  # the least size of a component, relative to the largest: sqrt(eps)
    rounding: float  # the least unit of a component, relative to r: 4 eps^(3/4)

    @staticmethod
    def of(eps: float, eps_linear: float | None = None, *, tol: float | None = None) -> Limits:
        """The limits for an unknown with the spacing `eps`.

        Args:
            eps: of the dtype of the unknown, the coarsest if there are several.
            eps_linear: of the dtype that the linear algebra is done in; None: the same.
            tol: the largest step that the user accepts, whatever the derivative does on the way.
        """
        linear = eps if eps_linear is None else eps_linear
        step = max(1e-2, eps**0.25) if tol is None else tol
        negligible = eps**0.5 if eps < _SINGLE else eps**0.25
        certain = min(eps**0.25, 1e-3) if eps < _SINGLE else eps**0.25
        return Limits(
            negligible=negligible if tol is None else tol,
            certain=certain if tol is None else tol,
            step=step,
            change=0.02,
            rcond=10 * linear,
            residual=linear**0.25,
            asymmetry=linear**0.25,
            column=eps**0.5,
            rounding=4 * eps**0.75,
        )


class Figures(NamedTuple):
    """The measured figures: scalars of the host, each perfect where it is not measured.

    They depend on values alone, not on directions of differentiation.
    """

    finite: Any  # bool: x, F there, and A are finite
    step: Any  # the largest component of the Newton step in its unit
    change: Any  # of the derivative along the step, relative; 0 where the step is negligible
    rcond: Any  # the reciprocal condition number of S
    residual: Any  # |A u - b| / |b| of an iterative solver, or of what has to be answered (below)
    asymmetry: Any  # of a second derivative: |A - A^T| / 2|A| in units of x, or by vectors
    conserved: Any  # |A^T p| over |A|^T |p| for a p with A p = 0: 0 for a gauge freedom, up to 1


def accepted(figures: Figures, limits: Limits, *, least_squares: bool = False) -> Any:
    """Whether to trust the derivative, as a bool of the host; a NaN is never trusted.

    With `least_squares` a singular system is accepted, unless it conserves totals: then its
    shortest solution is not the one that the solver finds. Nor is one accepted that has no solution
    for dF/dt p: `residual` is then what is left of that.
    """
    good = figures.finite & (figures.step <= limits.step)
    good &= (figures.step <= limits.negligible) | (figures.change <= limits.change)
    if least_squares:
        good &= figures.conserved <= limits.residual
    else:
        good &= figures.rcond > limits.rcond
    good &= figures.residual <= limits.residual
    return good & (figures.asymmetry <= limits.asymmetry)
