"""The errors for a derivative that cannot be trusted: what was measured, what is accepted, what to
do next. The same text in both hosts. Not here: the measuring, and when to raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from freevars._solvers.verdict import Figures, Kind, Limits, is_minimum
from freevars.errors import FreevarsError, NotASolutionError, SingularError

__all__ = ["Context", "failure", "option_matters"]


class Context(NamedTuple):
    """Whose derivative it is, and what else is known about it."""

    name: str  # the solver's
    kind: Kind
    least_squares: bool = False  # on_failure="least_squares"
    bounded: Sequence[str] = ()  # components that seem to lie on a bound, as a person writes them
    at_start: bool = False  # the solver returned its starting point
    polish: bool = False  # the rule adds a Newton step already


def failure(figures: Figures, limits: Limits, context: Context) -> FreevarsError:
    """The error for figures that are not accepted, from Python numbers."""
    name = context.name
    if not figures.finite:
        return NotASolutionError(
            f"{name}: the solver returned a value that is not finite, or its optimality or the"
            " derivative of that is not finite there. Look at what the solver reports of itself, or"
            " start it elsewhere; if the function has no derivative at x, as a square root has none"
            " at zero, write it in another form."
        )
    if not figures.asymmetry <= limits.asymmetry:
        return SingularError(
            f"{name}: the second derivative of the objective is not symmetric (by"
            f" {figures.asymmetry:.1e}, relative): a custom rule in it is not a gradient. Fix that"
            " rule; or, if the solver stops where that rule's value is zero, state it so: a solver"
            " under root, for jax.grad of the objective."
        )
    if context.least_squares and not figures.conserved <= limits.residual:
        return SingularError(
            f"{name}: the system of the derivative is singular, and its null vectors are not those"
            " of its transpose: the equations keep totals of the unknowns, which the solver takes"
            ' over from x0. on_failure="least_squares" would change these totals. State them:'
            " conserved=lambda x: ... returns what stays as it was in x0, an array or a pytree."
        )
    if not context.least_squares and not figures.rcond > limits.rcond:
        return SingularError(_singular(figures, limits, context))
    if context.least_squares and not figures.residual <= limits.residual:
        return SingularError(
            f"{name}: the system of the derivative is singular, and has no solution for a change of"
            f" what is differentiated by (a part of {figures.residual:.1e} of that change is left;"
            f" up to {limits.residual:.1e} is accepted), so x has no derivative there: two"
            " conditions that hold at one place move apart, or the objective is flat at these"
            " values alone. Leave a condition out, or differentiate by what moves all of them. A"
            " linear_solve of your own may also need more steps."
        )
    if not figures.residual <= limits.residual:
        return SingularError(
            f"{name}: the linear solver leaves a residual of {figures.residual:.1e}, relative; up"
            f" to {limits.residual:.1e} is accepted. The system is singular, linear_solve needs"
            " more steps, or it is made for systems of another kind (symmetric positive definite"
            " ones, say)."
        )
    return NotASolutionError(_not_converged(figures, limits, context))


_STATE_IT = (
    "give it to a solver under argmin in a parameter named bounds, equality or inequality, or write"
    " the problem as a root of its Karush-Kuhn-Tucker conditions"
)


def _singular(figures: Figures, limits: Limits, context: Context) -> str:
    text = (
        f"{context.name}: the system of the derivative is singular (reciprocal condition number"
        f" about {figures.rcond:.1e} in the units of the unknowns; above {limits.rcond:.1e} is"
        " accepted), so the solution is not a differentiable function of the captured values"
        " there."
    )
    if figures.conserved <= limits.residual:
        return (
            f"{text} Solutions differ by a freedom that the equations do not see (a shift, a"
            ' constant): on_failure="least_squares" takes the shortest derivative, or fix the'
            " freedom by one more condition."
        )
    if is_minimum(context.kind):
        return (
            f"{text} Two equations repeat each other, or the objective is flat along a curve: leave"
            " out what the objective does not depend on, or add a term that determines it."
        )
    return (
        f"{text} Its null vectors are not those of its transpose: the equations repeat each other,"
        " as they do where totals are conserved. If the solver keeps such totals from x0, state"
        " them: conserved=lambda x: ... returns what stays as it was in x0."
    )


def _not_converged(figures: Figures, limits: Limits, context: Context) -> str:
    name, step = context.name, figures.step
    if context.bounded:
        some = ", ".join(context.bounded)
        return (
            f"{name}: a bound or constraint is active: the solver stopped at {some} although the"
            f" condition of {context.kind} does not hold there (a Newton step would move a"
            f" component by {step:.1e}, relative). The derivative of a constrained solution needs"
            f" the constraint: {_STATE_IT}."
        )
    if context.at_start:
        advice = (
            "The solver returned its starting point: it failed, or took no step. Look at what it"
            " reports of itself."
        )
    else:
        add = "" if context.polish else ", let polish=True add the Newton step"
        advice = (
            f"Let it run longer or to a tighter tolerance{add}, or accept more by tol= where the"
            " solver is decorated."
        )
    if not step <= limits.step:
        return (
            f"{name}: the solver did not converge: a Newton step from its result would still move a"
            f" component by {step:.1e}, relative to its size; up to {limits.step:.1e} is accepted."
            f" {advice}"
        )
    return (
        f"{name}: the solver did not converge: a Newton step from its result would still move a"
        f" component by {step:.1e}, relative to its size, and the derivative changes by"
        f" {figures.change:.1e} on the way. Up to {limits.change:.1e} is accepted, and a step of"
        f" {limits.negligible:.1e} whatever the derivative does. {advice}"
    )


def option_matters(
    name: str, kind: Kind, step: float, limit: float, by: Sequence[str] = ()
) -> NotASolutionError:
    """The error for a derivative with respect to a solver option on which the solution depends.

    `by`: what the derivative is by, where a host can tell.
    """
    what = "an option of the solver (or by what the solver captures)"
    if by:
        what = f"{', '.join(by)} (an option of the solver, or what it captures)"
    return NotASolutionError(
        f"{name}: a bound or constraint is active: a derivative by {what} is asked for, and it is"
        f" not zero, because the condition of {kind} does not hold at the result (a Newton step"
        f" would move a component by {step:.1e}, relative to its size; up to {limit:.1e} is"
        f" accepted). For a constraint, {_STATE_IT}; anything else that x depends on belongs in"
        " fun."
    )
