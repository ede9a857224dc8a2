"""scipy's bounds and constraints as those of `argmin`: two sides, c(x) = 0 and g(x) >= 0.

The same in both hosts, so it tells scipy's classes by their attributes. What is an equation and
what has no limit is read off the limits, where these are known; one that is traced counts as
finite. Not here: what follows for a derivative (`kkt`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias

import numpy as np

from freevars._solvers.scipy_calls import (
    are_pairs,
    as_tuple,
    check_constraint,
    dense,
    listed,
)

__all__ = ["Function", "Vectors", "as_functions", "as_sides"]

Function: TypeAlias = Callable[[Any], Any]  # of x


class Vectors(Protocol):
    """How a host makes vectors of what scipy is given."""

    xp: Any  # its functions of arrays, by their common names

    def size(self, x: Any) -> int:
        """How many numbers a pytree has."""

    def ravel(self, x: Any) -> Any:
        """The numbers of a pytree as one vector."""

    def like(self, vector: Any, x: Any) -> Any:
        """The entries of a vector in the structure and shapes of x."""

    def array(self, a: Any, like: Any) -> Any:
        """A number, an array, or lists of these as one array, of the dtype of an array."""

    def values(self, a: Any) -> Any:
        """The same as an array of NumPy, NaN where a value is traced."""

    def is_array(self, x: Any) -> bool:
        """Whether it is an array, and no structure of them."""

    def refuse_derivatives(self, name: str, /, **given: Any) -> None:
        """As `scipy_calls.refuse_derivatives`."""


def as_sides(
    bounds: Any, x0: Any, name: str, host: Vectors, *, pairs: bool = True
) -> tuple[Any, Any]:
    """(lower, upper) as `argmin` takes them, or None; and scipy's `keep_feasible`.

    With `pairs`, a pair for each unknown may be given, as to scipy's `minimize`.

    Raises:
        TypeError: they are neither pairs nor two sides, or may be both.
    """
    if bounds is None:
        return None, False
    bounds, n = listed(bounds), host.size(x0)
    if hasattr(bounds, "lb"):  # scipy's
        sides = [np.broadcast_to(side, (n,)) for side in (bounds.lb, bounds.ub)]
        keep = bounds.keep_feasible
        return tuple(host.like(side, x0) for side in sides), bool(np.any(keep)) and keep
    if pairs and are_pairs(bounds, n, name, x0):
        columns = [
            [default if pair[i] is None else pair[i] for pair in bounds]
            for i, default in enumerate((-math.inf, math.inf))
        ]
        return tuple(host.like(column, x0) for column in columns), False
    if host.is_array(x0) and isinstance(bounds, (tuple, list)):
        # A list for an array, as everywhere in scipy.
        bounds = tuple(host.array(b, x0) if isinstance(b, (tuple, list)) else b for b in bounds)
    return bounds, False


def as_functions(
    constraints: Any, name: str, host: Vectors
) -> tuple[Function | None, Function | None]:
    """What is zero, and what is not negative, as functions of x; None where there is nothing.

    Args:
        constraints: as `minimize` takes them: one or a sequence.
        name: the solver's.
        host: the host.

    Raises:
        TypeError: one is no constraint, or brings a derivative or `keep_feasible`.
        ValueError: the type of a dict is missing, or unknown to scipy.
    """
    one = not isinstance(constraints, Iterable) or isinstance(constraints, dict)
    if constraints is None:
        constraints, one = (), False
    equal: list[Function] = []
    positive: list[Function] = []
    for i, constraint in enumerate([constraints] if one else list(constraints)):
        where = f"{name}: constraints[{i}]"
        if isinstance(constraint, dict):
            check_constraint(where, constraint)
            host.refuse_derivatives(where, jac=constraint.get("jac"))
            kind = str(constraint["type"]).lower()
            fun = _with(constraint["fun"], as_tuple(constraint.get("args", ())))
            (equal if kind == "eq" else positive).append(fun)
            continue
        if not _has_limits(constraint):
            advice = " Bounds of x itself go into bounds=." if hasattr(constraint, "lb") else ""
            message = (
                f"{where}: expected a dict, a NonlinearConstraint or a LinearConstraint of scipy,"
                f" got {constraint!r}.{advice}"
            )
            raise TypeError(message)
        if hasattr(constraint, "A"):
            fun = _product(dense(constraint.A), host)
        else:
            fun, jac, hess = constraint.fun, constraint.jac, constraint.hess
            host.refuse_derivatives(
                where,
                jac=None if isinstance(jac, str) else jac,
                hess=hess if callable(hess) else None,
            )
        _check_feasible(where, constraint.keep_feasible)
        equations, inequalities = _between(fun, constraint.lb, constraint.ub, host)
        equal += equations
        positive += inequalities
    return _together(equal), _together(positive)


def _between(
    fun: Function, lower: Any, upper: Any, host: Vectors
) -> tuple[list[Function], list[Function]]:
    """The equations and the inequalities of lower <= fun(x) <= upper."""
    low, up = host.values(lower), host.values(upper)
    is_equal = (low == up) | (lower is upper)

    def rows(which: Any, sign: float, side: Any) -> list[Function]:
        def part(x: Any) -> Any:
            value = host.ravel(fun(x))
            limit = host.array(side, value)
            # An infinite limit, which is seen here if it is traced, is kept at a distance of 1.
            xp = host.xp
            distance = xp.where(xp.isinf(limit), -xp.sign(limit), value - limit)
            (kept,) = np.nonzero(np.broadcast_to(which, tuple(value.shape)))
            return sign * distance[kept]

        return [part] if np.any(which) else []

    above = rows(~is_equal & ~np.isinf(low), 1, lower)
    below = rows(~is_equal & ~np.isinf(up), -1, upper)
    return rows(is_equal, 1, lower), above + below


def _has_limits(constraint: Any) -> bool:
    """Whether it is a constraint of scipy other than a dict. `Bounds` have limits of x alone."""
    return hasattr(constraint, "lb") and (hasattr(constraint, "A") or hasattr(constraint, "fun"))


def _with(fun: Callable[..., Any], args: tuple[Any, ...]) -> Function:
    return lambda x: fun(x, *args)


def _product(A: Any, host: Vectors) -> Function:
    def product(x: Any) -> Any:
        vector = host.ravel(x)
        return host.array(A, vector) @ vector

    return product


def _together(functions: list[Function]) -> Function | None:
    return (lambda x: [f(x) for f in functions]) if functions else None


def _check_feasible(where: str, keep_feasible: Any) -> None:
    flags = keep_feasible.flat if hasattr(keep_feasible, "flat") else [keep_feasible]
    if any(flags):
        message = (
            f"{where}: keep_feasible: expected False, got {keep_feasible!r}. Bounds may have it."
        )
        raise TypeError(message)
