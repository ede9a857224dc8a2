"""scipy's solvers, run on NumPy functions with exact derivatives; the same in both hosts.

This is the only shared file that imports scipy. The functions are `HostFunction`s of a
host and already contain the extra arguments; `args` is in the signatures because the host reads off
them what a call passes on to the function. Not here: those functions, and what becomes of a result.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy import integrate, optimize

from freevars._solvers.scipy_calls import HESSIAN, IMPLICIT, JACOBIAN, NO_GRADIENT, PRODUCTS
from freevars._solvers.scipy_results import Said, ivp_said, root_said, solver_said

__all__ = [
    "inside",
    "least_squares",
    "linprog",
    "minimize",
    "quad",
    "root",
    "root_scalar",
    "scalar_method",
    "solve_ivp",
]


class _Curvature(optimize.BFGS):  # type: ignore[misc]
    """trust-constr's approximation of the constraints' second derivatives: scipy's default, without
    its warning about linear constraints."""

    def update(self, delta_x: Any, delta_grad: Any) -> None:
        if np.any(delta_grad):
            super().update(delta_x, delta_grad)


def minimize(
    fun: Any,
    x0: Any,
    args: tuple[Any, ...] = (),
    *,
    method: Any,
    tol: Any,
    callback: Any,
    options: Any,
    keep_feasible: Any,
    bounds: Any = None,
    equality: Any = None,
    inequality: Any = None,
) -> tuple[Any, Said]:
    """`bounds` are two vectors; `equality` is zero, and `inequality` is not negative."""
    del args
    how = {"tol": tol, "callback": callback, "options": options}
    name = method.lower() if isinstance(method, str) else method
    if name not in NO_GRADIENT:
        how["jac"] = True
    if name in HESSIAN or callable(method):
        how["hess"] = fun.hessian
    elif name in PRODUCTS:
        how["hessp"] = fun.hvp
    if bounds is not None:
        how["bounds"] = optimize.Bounds(*bounds, keep_feasible=keep_feasible)
    how["constraints"] = [
        optimize.NonlinearConstraint(c, 0.0, upper, jac=c.jacobian, hess=_Curvature())
        for c, upper in ((equality, 0.0), (inequality, np.inf))
        if c is not None
    ]
    value = fun.value_and_grad if "jac" in how else fun
    result = optimize.minimize(value, x0, method=method, **how)
    return result.x, solver_said(result)


def root(
    fun: Any,
    x0: Any,
    args: tuple[Any, ...] = (),
    *,
    method: Any,
    tol: Any,
    callback: Any,
    options: Any,
) -> tuple[Any, Said]:
    """With the exact Jacobian, where the method takes one."""
    del args
    how = {"tol": tol, "callback": callback, "options": options}
    if callable(method) or str(method).lower() in JACOBIAN:
        how["jac"] = fun.jacobian
    result = optimize.root(fun, x0, method=method, **how)
    return result.x, solver_said(result)


def least_squares(
    fun: Any, x0: Any, args: tuple[Any, ...] = (), *, how: dict[str, Any], bounds: Any = None
) -> tuple[Any, Said]:
    """With the exact Jacobian; `bounds` are two vectors."""
    del args
    sides = (-np.inf, np.inf) if bounds is None else bounds
    # What is None was added to scipy, or has another default in each release.
    how = {name: value for name, value in how.items() if value is not None}
    result = optimize.least_squares(fun, x0, jac=fun.jacobian, bounds=sides, **how)
    return result.x, solver_said(result)


def scalar_method(method: Any, bracket: Any, x0: Any, x1: Any) -> tuple[Any, int]:
    """The method that `root_scalar` takes, and how many derivatives that takes."""
    if bracket is None and x0 is None:
        optimize.root_scalar(lambda x: x, method=method)  # raises what scipy raises
    if method is None:
        method = "brentq" if bracket is not None else "newton" if x1 is None else "secant"
    return method, {"newton": 1, "halley": 2}.get(str(method).lower(), 0)


def root_scalar(
    values: Callable[[float], Any], *, order: int, bracket: Any, x0: Any, x1: Any, **how: Any
) -> tuple[Any, Said]:
    """`values(x)` are the value and as many derivatives as the method takes."""

    def f(x: float) -> Any:
        found = tuple(map(float, values(x)))
        return found if order else found[0]

    result = optimize.root_scalar(
        f,
        bracket=None if bracket is None else [float(end) for end in bracket],
        fprime=order > 0 or None,
        fprime2=order > 1 or None,
        x0=None if x0 is None else float(x0),
        x1=None if x1 is None else float(x1),
        **how,
    )
    return result.root, root_said(result)


def linprog(
    fun: Any,
    zero: Any,
    *,
    method: Any,
    options: Any,
    bounds: Any,
    equality: Any = None,
    inequality: Any = None,
) -> tuple[Any, Said]:
    """With the matrices of the functions, which are linear, taken at `zero`; else as `minimize`."""
    how = {"method": method, "options": options}
    if inequality is not None:  # b - A x >= 0
        how |= {"A_ub": -inequality.jacobian(zero), "b_ub": inequality(zero)}
    if equality is not None:  # A x - b = 0
        how |= {"A_eq": equality.jacobian(zero), "b_eq": -equality(zero)}
    result = optimize.linprog(fun.grad(zero), bounds=np.stack(bounds, axis=1), **how)
    x = np.full_like(zero, np.nan) if result.x is None else result.x
    return x, solver_said(result)


def inside(a: float, b: float) -> float:
    """A point between two limits."""
    if np.isfinite(a + b):
        return (a + b) / 2
    return a + 1 if np.isfinite(a) else min(b - 1, 0.0)


def quad(
    func: Callable[[float], Any], a: float, b: float, size: int, **how: Any
) -> tuple[Any, Any]:
    """Once for each of the `size` numbers of the integrand; and the norm of the errors."""
    parts = [lambda t, k=k: np.ravel(func(t))[k] for k in range(size)]
    each = [integrate.quad(part, a, b, **how) for part in parts]
    values, errors = np.ascontiguousarray(np.reshape(each, (-1, 2)).T)
    return values, np.linalg.norm(errors)


def solve_ivp(
    fun: Any, jacobian: Any, y0: Any, ts: Any, *, method: Any, options: dict[str, Any]
) -> tuple[Any, Said]:
    """A state, which is a vector, for each of `ts`, which may repeat each other.

    NaN from where scipy stopped short.
    """
    forwards = ts[-1] >= ts[0]
    times, place = np.unique(ts if forwards else -ts, return_inverse=True)
    times, place = times if forwards else -times, np.reshape(place, -1)
    if times.size == 1:
        return np.tile(y0, (ts.size, 1)), ivp_said()
    options = {**options, "atol": _of_size(options["atol"], y0.size)}
    if str(method) in IMPLICIT:
        options["jac"] = jacobian
    rows = np.full((times.size, y0.size), np.nan)
    try:
        result = integrate.solve_ivp(fun, (times[0], times[-1]), y0, method, times, **options)
    except ValueError as error:
        # An implicit method met a state that is not finite, as for a stiff equation solved
        # backwards.
        if "infs or NaNs" not in str(error):
            raise
        result = SimpleNamespace(success=False, status=-1, message=str(error))
    else:
        rows[: result.y.shape[1]] = result.y.T
    return rows[place], ivp_said(result)


def _of_size(atol: Any, n: int) -> Any:
    """For each number of a state, which is larger where a derivative is solved for."""
    if np.ndim(atol) == 0 or np.size(atol) >= n:
        return atol
    return np.concatenate([atol, np.full(n - np.size(atol), np.min(atol))])
