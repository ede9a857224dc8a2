"""`scipy.optimize.minimize`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from freevars._solvers.scipy_calls import as_tuple, check_objective
from freevars.torch import _compat
from freevars.torch._rules.rule import OnFailure
from freevars.torch._rules.rules import argmin
from freevars.torch.scipy._constraints import as_functions, as_sides
from freevars.torch.scipy._host import on_tensors
from freevars.torch.scipy._result import OptimizeResult
from freevars.torch.scipy._scipy import (
    as_number,
    is_number,
    refuse_derivatives,
    runs,
    start_and_value,
)

__all__ = ["minimize"]


@functools.cache
def _solver(on_failure: OnFailure, one_sided: bool, polish: bool) -> Any:  # noqa: FBT001
    how: dict[str, Any] = {"on_failure": on_failure, "one_sided": one_sided, "polish": polish}
    return argmin(has_aux=True, **how)(on_tensors(runs.minimize, equations=False))


@_compat.uncompiled
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
    """`scipy.optimize.minimize` of a function in PyTorch, differentiable by everything it captures.

    Every method runs as scipy has it, with the exact gradient, and Hessian or products with it, of
    `fun`, and the exact Jacobians of the constraints. Derivatives, in both modes and of any order,
    flow into `args`, `bounds`, and whatever `fun` and the constraints capture; into `x0` and the
    options they are zero.

    Args:
        fun: `fun(x, *args)`, in PyTorch, gives a real number of shape ().
        x0: a pytree of floating or complex tensors, NumPy arrays or numbers, and x is such a one of
            tensors, as `fun` is given. A list or tuple of numbers is a tensor, as in scipy, and
            integers are floats. Python's numbers have the precision of the tensors beside them,
            or else are double where `fun` makes that of them.
        args: extra arguments of `fun`.
        method: as in scipy.
        jac: refused, because it is not needed: the function has exact derivatives.
        hess: refused, as `jac`.
        hessp: refused, as `jac`.
        bounds: scipy's `Bounds` or a sequence of pairs (min, max), over the numbers of x0 in order;
            or a pair (lower, upper), each like x0, a number or None. A derivative is taken by
            these two; `Bounds` makes NumPy arrays of what it is given, as `LinearConstraint` does.
        constraints: as in scipy: dicts, `NonlinearConstraint`, `LinearConstraint`, or a sequence of
            these. Functions are in PyTorch and take x like x0; they and the limits of
            `NonlinearConstraint` have derivatives.
        tol: as in scipy.
        callback: as in scipy: it is given NumPy vectors, and has no part in the result.
        options: as in scipy. Its defaults of tolerance will do: see `polish`.
        on_failure: what happens where a derivative cannot be trusted, as for
            `freevars.torch.root`.
        one_sided: as for `freevars.torch.argmin`.
        polish: adds a Newton step to the result of scipy, of the Karush-Kuhn-Tucker system where
            there are constraints, unless a second one would be no shorter. False returns it as it
            is; a derivative is then refused where it is too far from the minimum.

    Returns:
        x, `fun` at x, and what scipy said (`OptimizeResult`). `success` alone reports
        that scipy failed; a derivative depends on whether x is a minimum.

    Raises:
        TypeError: `fun` is not written in PyTorch, or a derivative is given.
        freevars.errors.FreevarsError: as for `freevars.torch.argmin`.
        Exception: whatever scipy raises, as it is.

    Example:
        >>> import torch, freevars.torch.scipy
        >>> def lowest(a):  # of the Rosenbrock function: (a, a^2)
        ...     rosen = lambda x: (a - x[0]) ** 2 + 10 * (x[1] - x[0] ** 2) ** 2
        ...     return freevars.torch.scipy.minimize(rosen, torch.zeros(2)).x
        >>> print(torch.autograd.functional.jacobian(lowest, torch.tensor(1.5)).round(decimals=2))
        tensor([1., 3.])
    """
    name = "minimize"
    refuse_derivatives(name, jac=jac, hess=hess, hessp=hessp)
    args = as_tuple(args)
    x0, value = start_and_value(name, fun, x0, args)
    sides, keep_feasible = as_sides(bounds, x0, name)
    equality, inequality = as_functions(constraints, name)
    fun = as_number(fun, value)
    if not is_number(value):
        check_objective(value, ".sum()")
    x, status = _solver(on_failure, one_sided, polish)(
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
    return OptimizeResult(x, fun(x, *args), **status)
