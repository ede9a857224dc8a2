"""`scipy.optimize.minimize`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from freevars._solvers.scipy_calls import as_tuple, check_objective
from freevars._solvers.verdict import OnFailure
from freevars.jax._rules.rules import argmin
from freevars.jax.scipy._constraints import as_functions, as_sides
from freevars.jax.scipy._result import OptimizeResult
from freevars.jax.scipy._scipy import (
    as_start,
    converted,
    on_host_as,
    refuse_derivatives,
    runs,
    tracing,
    value_at,
)

__all__ = ["minimize"]


@functools.cache
def _solver(on_failure: OnFailure, one_sided: bool, polish: bool) -> Any:  # noqa: FBT001
    rule = argmin(has_aux=True, on_failure=on_failure, one_sided=one_sided, polish=polish)
    return rule(on_host_as(runs.minimize))


def _as_number(fun: Callable[..., Any], *args: Any) -> Any:
    return jnp.reshape(fun(*args), ())


def minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    method: Any = None,
    jac: Any = None,
    hess: Any = None,
    hessp: Any = None,
    bounds: Any = None,
    constraints: Any = (),
    tol: Any = None,
    callback: Any = None,
    options: Any = None,
    *,
    on_failure: OnFailure = "raise",
    one_sided: bool = False,
    polish: bool = True,
) -> OptimizeResult:
    """`scipy.optimize.minimize` of a function in JAX, differentiable by everything it captures.

    Every method runs as scipy has it, with the exact gradient, and Hessian or products with it, of
    `fun`, and the exact Jacobians of the constraints. Derivatives, in both modes and of any order,
    flow into `args`, `bounds`, and whatever `fun` and the constraints capture; into `x0` and the
    options they are zero. Inside `jit`, `vmap` and `scan` it is as `freevars.jax.on_host` says.

    Args:
        fun: `fun(x, *args)`, in JAX, gives a real number of shape ().
        x0: a pytree of floating or complex arrays, and x is like it; `fun` is given such a one. A
            list or tuple of numbers is an array, as in scipy, and integers are floats.
        args: extra arguments of `fun`.
        method: as in scipy.
        jac: refused, because it is not needed: the function has exact derivatives.
        hess: refused, as `jac`.
        hessp: refused, as `jac`.
        bounds: scipy's `Bounds` or a sequence of pairs (min, max), over the numbers of x0 in order;
            or a pair (lower, upper), each like x0, a number or None. Values may be traced, except
            in `Bounds`.
        constraints: as in scipy: dicts, `NonlinearConstraint`, `LinearConstraint`, or a sequence of
            these. Functions are in JAX and take x like x0. Limits may be traced, except in
            `LinearConstraint`, which makes NumPy arrays of what it is given.
        tol: as in scipy.
        callback: as in scipy: it is given NumPy vectors, and may not call JAX.
        options: as in scipy. Its defaults of tolerance will do: see `polish`.
        on_failure: what happens where a derivative cannot be trusted, as for
            `freevars.jax.root`.
        one_sided: as for `freevars.jax.argmin`.
        polish: adds a Newton step to the result of scipy, of the Karush-Kuhn-Tucker system where
            there are constraints, unless a second one would be no shorter. False returns it as it
            is; a derivative is then refused where it is too far from the minimum.

    Returns:
        x, `fun` at x, and what scipy said (`OptimizeResult`). `success` alone reports
        that scipy failed; a derivative depends on whether x is a minimum.

    Raises:
        TypeError: `fun` cannot be traced by JAX, or a derivative is given.
        freevars.errors.FreevarsError: as for `freevars.jax.argmin`.
        Exception: whatever scipy raises, as for `freevars.jax.on_host`.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax.scipy
        >>> def lowest(a):  # of the Rosenbrock function: (a, a^2)
        ...     rosen = lambda x: (a - x[0]) ** 2 + 10 * (x[1] - x[0] ** 2) ** 2
        ...     return freevars.jax.scipy.minimize(rosen, jnp.zeros(2)).x
        >>> print(jax.jit(jax.jacobian(lowest))(1.5).round(2))
        [1. 3.]

        >>> def nearest(cap):
        ...     distance = lambda x: jnp.sum((x - jnp.array([1.0, 3.0])) ** 2)
        ...     return freevars.jax.scipy.minimize(distance, jnp.zeros(2), bounds=(0.0, cap)).x
        >>> print(nearest(2.0), jax.jacobian(nearest)(2.0))
        [1. 2.] [0. 1.]
    """
    name = "minimize"
    refuse_derivatives(name, jac=jac, hess=hess, hessp=hessp)
    x0, args = as_start(x0), as_tuple(args)
    sides, keep_feasible = as_sides(bounds, x0, name)
    equality, inequality = as_functions(constraints, name)

    def solve(fun: Callable[..., Any]) -> tuple[Any, Any]:
        found: tuple[Any, Any] = _solver(on_failure, one_sided, polish)(
            fun,
            x0,
            args,
            method=method,
            tol=tol,
            callback=callback,
            options=options,
            keep_feasible=keep_feasible,
            bounds=sides,
            equality=equality,
            inequality=inequality,
        )
        return found

    with tracing(name, fun):
        try:
            function = converted(fun, x0, args, name)
            x, status = solve(function)
        except TypeError:
            value = jax.eval_shape(fun, x0, *args)
            if getattr(value, "size", None) != 1 or value.shape == ():
                check_objective(value, "jnp.sum")
                raise
            # scipy takes an array of one number.
            function = converted(functools.partial(_as_number, fun), x0, args, name)
            x, status = solve(function)
        value = value_at(function, x, args)
    check_objective(value, "jnp.sum")
    return OptimizeResult(x, value, **status)
