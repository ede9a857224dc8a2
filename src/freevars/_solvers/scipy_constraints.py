"""scipy's constraints as the functions of `argmin`: what is zero, and what is not negative.

The same in both hosts, so it tells scipy's classes by their attributes. Not here: which rows of a
function are equations, which a host reads off the limits (`between`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from freevars._solvers.scipy_calls import as_tuple, check_constraint, dense

__all__ = ["Function", "sorted_constraints"]

Function: TypeAlias = Callable[[Any], Any]  # of x


def sorted_constraints(
    constraints: Any,
    name: str,
    *,
    refuse_derivatives: Callable[..., None],
    times: Callable[[Any, Any], Any],
    between: Callable[[Function, Any, Any], tuple[list[Function], list[Function]]],
) -> tuple[Function | None, Function | None]:
    """What is zero, and what is not negative, as functions of x; None where there is nothing.

    Args:
        constraints: as `minimize` takes them: one or a sequence.
        name: the solver's.
        refuse_derivatives: refuses derivatives that a constraint brings.
        times: (A, x) -> the product of a matrix with the entries of x.
        between: (fun, lower, upper) -> the equations and the inequalities of lower <= fun <= upper.

    Raises:
        TypeError: one is no constraint, or brings a derivative or `keep_feasible`.
        ValueError: the type of a dict is missing, or unknown to scipy.
    """
    one = isinstance(constraints, dict) or _has_limits(constraints)
    equal: list[Function] = []
    positive: list[Function] = []
    for i, constraint in enumerate([constraints] if one else list(constraints or ())):
        where = f"{name}: constraints[{i}]"
        if isinstance(constraint, dict):
            check_constraint(where, constraint)
            refuse_derivatives(where, jac=constraint.get("jac"))
            kind = str(constraint["type"]).lower()
            fun = _with(constraint["fun"], as_tuple(constraint.get("args", ())))
            (equal if kind == "eq" else positive).append(fun)
            continue
        if not _has_limits(constraint):
            message = (
                f"{where}: expected a dict, a NonlinearConstraint or a LinearConstraint of scipy,"
                f" got {constraint!r}."
            )
            raise TypeError(message)
        if hasattr(constraint, "A"):
            fun = _product(times, dense(constraint.A))
        else:
            fun, jac, hess = constraint.fun, constraint.jac, constraint.hess
            refuse_derivatives(
                where,
                jac=None if isinstance(jac, str) else jac,
                hess=hess if callable(hess) else None,
            )
        _check_feasible(where, constraint.keep_feasible)
        equations, inequalities = between(fun, constraint.lb, constraint.ub)
        equal += equations
        positive += inequalities
    return _together(equal), _together(positive)


def _has_limits(constraint: Any) -> bool:
    """Whether it is a constraint of scipy other than a dict. `Bounds` have limits of x alone."""
    return hasattr(constraint, "lb") and (hasattr(constraint, "A") or hasattr(constraint, "fun"))


def _with(fun: Callable[..., Any], args: tuple[Any, ...]) -> Function:
    return lambda x: fun(x, *args)


def _product(times: Callable[[Any, Any], Any], A: Any) -> Function:
    return lambda x: times(A, x)


def _together(functions: list[Function]) -> Function | None:
    return (lambda x: [f(x) for f in functions]) if functions else None


def _check_feasible(where: str, keep_feasible: Any) -> None:
    flags = keep_feasible.flat if hasattr(keep_feasible, "flat") else [keep_feasible]
    if any(flags):
        message = (
            f"{where}: keep_feasible: expected False, got {keep_feasible!r}. Bounds may have it."
        )
        raise TypeError(message)
