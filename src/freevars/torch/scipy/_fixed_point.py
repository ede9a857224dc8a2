"""`scipy.optimize.fixed_point`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from freevars._solvers.scipy_calls import as_tuple
from freevars.torch import _compat
from freevars.torch._rules.rule import OnFailure
from freevars.torch._rules.rules import fixed_point as fixed_point_rule
from freevars.torch.scipy._host import HostFunction
from freevars.torch.scipy._scipy import optimize, start_and_value

__all__ = ["fixed_point"]


def _run(fun: Any, x0: Any, args: tuple[Any, ...], *, xtol: Any, maxiter: Any, method: Any) -> Any:
    """Run scipy."""
    host = HostFunction(fun, x0, args, equations=True)
    return host.x(optimize.fixed_point(host, host.vector(x0), (), xtol, maxiter, method))


_run.__name__ = _run.__qualname__ = "fixed_point"  # what errors call it


@functools.cache
def _solver(on_failure: OnFailure, polish: bool) -> Any:  # noqa: FBT001
    return fixed_point_rule(on_failure=on_failure, polish=polish)(_run)


@_compat.uncompiled
def fixed_point(
    func: Callable[..., Any],
    x0: Any,
    args: Any = (),
    xtol: Any = 1e-8,
    maxiter: Any = 500,
    method: Any = "del2",
    *,
    on_failure: OnFailure = "raise",
    polish: bool = True,
) -> Any:
    """`scipy.optimize.fixed_point` of a function in PyTorch, differentiable by all it captures.

    Args:
        func: `func(x, *args)`, in PyTorch, gives an x.
        x0: a pytree of floating or complex tensors, NumPy arrays or numbers, and x is such a one of
            tensors, as `func` is given.
        args: extra arguments of `func`.
        xtol: as in scipy.
        maxiter: as in scipy.
        method: as in scipy.
        on_failure: as for `freevars.torch.root`.
        polish: as for `minimize`.

    Returns:
        x alone, as in scipy.

    Raises:
        TypeError: `func` is not written in PyTorch.
        freevars.errors.FreevarsError: as for `freevars.torch.fixed_point`.
        Exception: whatever scipy raises, as it is, where it does not converge too.

    Example:
        >>> import torch, freevars.torch.scipy
        >>> solve = lambda a: freevars.torch.scipy.fixed_point(lambda x: torch.cos(x) * a, 0.5)
        >>> print(f"{torch.func.grad(solve)(torch.tensor(1.0)):.4f}")  # cos x / (1 + sin x)
        0.4416
    """
    args = as_tuple(args)
    x0, _ = start_and_value("fixed_point", func, x0, args)
    return _solver(on_failure, polish)(func, x0, args, xtol=xtol, maxiter=maxiter, method=method)
