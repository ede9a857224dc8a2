"""`scipy.optimize.least_squares`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from freevars._solvers.scipy_calls import as_tuple, is_open, refuse_loss
from freevars.torch import _compat
from freevars.torch._compat import pytree
from freevars.torch._rules.rule import OnFailure
from freevars.torch._rules.rules import least_squares as least_squares_rule
from freevars.torch.scipy._constraints import as_sides
from freevars.torch.scipy._host import on_tensors
from freevars.torch.scipy._result import OptimizeResult
from freevars.torch.scipy._scipy import refuse_derivatives, runs, start_and_value

__all__ = ["least_squares"]


@functools.cache
def _solver(on_failure: OnFailure, one_sided: bool, polish: bool) -> Any:  # noqa: FBT001
    how: dict[str, Any] = {"on_failure": on_failure, "one_sided": one_sided, "polish": polish}
    return least_squares_rule(has_aux=True, **how)(on_tensors(runs.least_squares, equations=True))


@_compat.uncompiled
def least_squares(
    fun: Callable[..., Any],
    x0: Any,
    jac: Any = None,
    bounds: Any = None,
    method: Any = "trf",
    ftol: Any = 1e-8,
    xtol: Any = 1e-8,
    gtol: Any = 1e-8,
    x_scale: Any = None,
    loss: Any = "linear",
    f_scale: Any = 1.0,
    diff_step: Any = None,
    tr_solver: Any = None,
    tr_options: Any = None,
    jac_sparsity: Any = None,
    max_nfev: Any = None,
    verbose: Any = 0,
    args: Any = (),
    kwargs: Any = None,
    callback: Any = None,
    *,
    on_failure: OnFailure = "raise",
    one_sided: bool = False,
    polish: bool = True,
) -> OptimizeResult:
    """`scipy.optimize.least_squares` of a function in PyTorch, differentiable by all it captures.

    The solver is given the exact Jacobian; the derivative is that of the minimum, with the whole
    second derivative, exact where residuals remain.

    Args:
        fun: `fun(x, *args, **kwargs)`, in PyTorch, gives the residuals: real tensors in any
            structure.
        x0: a pytree of floating or complex tensors, NumPy arrays or numbers, and x is such a one of
            tensors, as `fun` is given.
        jac: refused, because it is not needed: the function has exact derivatives.
        bounds: a pair (lower, upper), each like x0, a number or None; or scipy's `Bounds`.
        method: as in scipy.
        ftol: as in scipy.
        xtol: as in scipy.
        gtol: as in scipy.
        x_scale: as in scipy.
        loss: "linear". Another one is another objective: give it to `minimize`.
        f_scale: not used by the linear loss.
        diff_step: refused, as `jac`.
        tr_solver: as in scipy.
        tr_options: as in scipy.
        jac_sparsity: refused, as `jac`.
        max_nfev: as in scipy.
        verbose: as in scipy.
        args: extra arguments of `fun`.
        kwargs: extra keyword arguments of `fun`.
        callback: as in scipy: it is given NumPy vectors, and has no part in the result.
        on_failure: as for `freevars.torch.root`.
        one_sided: as for `freevars.torch.argmin`.
        polish: as for `minimize`.

    Returns:
        x, `fun` and `cost` at x, and what scipy said (`OptimizeResult`).

    Raises:
        TypeError: `fun` is not written in PyTorch, a derivative is given, or another loss.
        freevars.errors.FreevarsError: as for `freevars.torch.least_squares`.
        Exception: whatever scipy raises, as it is.

    Example:
        >>> import torch, freevars.torch.scipy
        >>> t = torch.tensor([0.0, 1.0, 2.0])
        >>> def slope(y):
        ...     residuals = lambda x: x[0] + x[1] * t - y
        ...     return freevars.torch.scipy.least_squares(residuals, torch.zeros(2)).x[1]
        >>> print(torch.func.grad(slope)(torch.tensor([1.0, 2.0, 4.0])).round(decimals=3) + 0.0)
        tensor([-0.5000,  0.0000,  0.5000])
    """
    name = "least_squares"
    del f_scale
    refuse_derivatives(name, jac=jac, diff_step=diff_step, jac_sparsity=jac_sparsity)
    refuse_loss(name, loss)
    args, kwargs = as_tuple(args), kwargs or {}
    x0, _ = start_and_value(name, functools.partial(fun, **kwargs), x0, args)
    sides, _ = as_sides(None if is_open(bounds) else bounds, x0, name, pairs=False)
    how = {
        "method": method,
        "ftol": ftol,
        "xtol": xtol,
        "gtol": gtol,
        "tr_solver": tr_solver,
        "tr_options": tr_options,
        "max_nfev": max_nfev,
        "verbose": verbose,
        "x_scale": x_scale,
        "callback": callback,
    }

    def residuals(x: Any, *args: Any) -> Any:
        # In a list, so that two residuals are not taken for one and its aux.
        return [fun(x, *args, **kwargs)]

    x, status = _solver(on_failure, one_sided, polish)(residuals, x0, args, how=how, bounds=sides)
    (value,) = residuals(x, *args)
    cost = sum((r.abs() ** 2).sum() for r in pytree.tree_leaves(value)) / 2
    return OptimizeResult(x, value, **status, cost=cost)
