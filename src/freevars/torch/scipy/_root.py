"""`scipy.optimize.root`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from freevars._solvers.scipy_calls import as_tuple
from freevars.torch import _compat
from freevars.torch._rules.rule import OnFailure
from freevars.torch._rules.rules import root as root_rule
from freevars.torch.scipy._host import on_tensors
from freevars.torch.scipy._result import OptimizeResult
from freevars.torch.scipy._scipy import refuse_derivatives, runs, start_and_value

__all__ = ["root"]


@functools.cache
def _solver(on_failure: OnFailure, polish: bool) -> Any:  # noqa: FBT001
    rule = root_rule(has_aux=True, on_failure=on_failure, polish=polish)
    return rule(on_tensors(runs.root, equations=True))


@_compat.uncompiled
def root(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    method: Any = "hybr",
    jac: Any = None,
    tol: Any = None,
    callback: Any = None,
    options: Any = None,
    *,
    on_failure: OnFailure = "raise",
    polish: bool = True,
) -> OptimizeResult:
    """`scipy.optimize.root` of a function in PyTorch, differentiable by everything it captures.

    "hybr" and "lm" are given the exact Jacobian. The other methods take none: they build their own
    from their own steps, and "krylov" from differences, whose step (`jac_options={"rdiff": ...}`)
    has to be larger than the default in float32.

    Args:
        fun: `fun(x, *args)`, in PyTorch, gives as many numbers as x has, in any structure.
        x0: a pytree of floating or complex tensors, NumPy arrays or numbers, and x is such a one of
            tensors, as `fun` is given.
        args: extra arguments of `fun`.
        method: as in scipy.
        jac: refused, because it is not needed: the function has exact derivatives.
        tol: as in scipy.
        callback: as in scipy: it is given NumPy vectors, and has no part in the result.
        options: as in scipy.
        on_failure: as for `freevars.torch.root`.
        polish: as for `minimize`.

    Returns:
        x, `fun` at x, and what scipy said (`OptimizeResult`).

    Raises:
        TypeError: `fun` is not written in PyTorch, or a derivative is given.
        freevars.errors.FreevarsError: as for `freevars.torch.root`.
        Exception: whatever scipy raises, as it is.

    Example:
        >>> import torch, freevars.torch.scipy
        >>> def meet(radius):  # of a circle with the diagonal
        ...     system = lambda p: (p["x"] ** 2 + p["y"] ** 2 - radius**2, p["x"] - p["y"])
        ...     return freevars.torch.scipy.root(system, {"x": 1.0, "y": 0.5}).x["y"]
        >>> print(f"{torch.func.grad(meet)(torch.tensor(2.0)):.4f}")  # 1 / sqrt(2)
        0.7071
    """
    refuse_derivatives("root", jac=jac)
    args = as_tuple(args)
    x0, _ = start_and_value("root", fun, x0, args)
    x, status = _solver(on_failure, polish)(
        fun, x0, args, method=method, tol=tol, callback=callback, options=options
    )
    return OptimizeResult(x, fun(x, *args), **status)
