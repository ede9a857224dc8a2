"""`scipy.optimize.root_scalar`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from freevars._solvers.scipy_calls import as_tuple
from freevars.torch import _compat
from freevars.torch._rules.rule import OnFailure
from freevars.torch._rules.rules import root as root_rule
from freevars.torch.scipy._host import HostFunction
from freevars.torch.scipy._result import RootResults, as_tensors
from freevars.torch.scipy._scipy import (
    as_number,
    as_start,
    refuse_derivatives,
    runs,
    start_and_value,
)

__all__ = ["root_scalar"]


def _run(
    fun: Any,
    x0: Any,
    args: tuple[Any, ...],
    *,
    method: Any,
    order: int,
    bracket: Any,
    starts: bool,
    x1: Any,
    xtol: Any,
    rtol: Any,
    maxiter: Any,
    options: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """Run scipy."""
    host = HostFunction(fun, x0, args, equations=True)
    root, said = runs.root_scalar(
        lambda x: host.derivatives(x, order),
        order=order,
        method=method,
        bracket=bracket,
        x0=x0 if starts else None,
        x1=x1,
        xtol=xtol,
        rtol=rtol,
        maxiter=maxiter,
        options=options,
    )
    return host.x(root), as_tensors(said)


_run.__name__ = _run.__qualname__ = "root_scalar"  # what errors call it


@functools.cache
def _solver(on_failure: OnFailure, polish: bool) -> Any:  # noqa: FBT001
    return root_rule(has_aux=True, on_failure=on_failure, polish=polish)(_run)


@_compat.uncompiled
def root_scalar(
    f: Callable[..., Any],
    args: Any = (),
    method: Any = None,
    bracket: Any = None,
    fprime: Any = None,
    fprime2: Any = None,
    x0: Any = None,
    x1: Any = None,
    xtol: Any = None,
    rtol: Any = None,
    maxiter: Any = None,
    options: Any = None,
    *,
    on_failure: OnFailure = "raise",
    polish: bool = True,
) -> RootResults:
    """`scipy.optimize.root_scalar` of a function in PyTorch, differentiable by all it captures.

    "newton" and "halley" are given exact derivatives. Derivatives by the bracket and the starting
    points are zero: a root does not depend on where it was looked for.

    Args:
        f: `f(x, *args)`, in PyTorch, gives a real number for one of shape ().
        args: extra arguments of `f`.
        method: as in scipy; None: "brentq" with a bracket, "secant" with `x1`, else "newton".
        bracket: two numbers at which f has different signs.
        fprime: refused, because it is not needed: the function has exact derivatives.
        fprime2: refused, as `fprime`.
        x0: a number to start from.
        x1: a second one.
        xtol: as in scipy.
        rtol: as in scipy.
        maxiter: as in scipy.
        options: as in scipy.
        on_failure: as for `freevars.torch.root`.
        polish: as for `minimize`.

    Returns:
        `root`, and what scipy said (`RootResults`).

    Raises:
        TypeError: `f` is not written in PyTorch, a derivative is given, or x0, x1 or a side of the
            bracket is not one number: many roots at once are `torch.func.vmap` of this.
        freevars.errors.FreevarsError: as for `freevars.torch.root`.
        Exception: whatever scipy raises, as it is.

    Example:
        >>> import torch, freevars.torch.scipy
        >>> def kepler(eccentricity, mean):  # E = M + e sin E
        ...     f = lambda angle: angle - eccentricity * torch.sin(angle) - mean
        ...     return freevars.torch.scipy.root_scalar(f, bracket=(mean - 1, mean + 1)).root
        >>> slope = torch.func.grad(kepler)(torch.tensor(0.1), torch.tensor(1.0))
        >>> print(f"{slope:.4f}")  # sin E / (1 - e cos E)
        0.9291
    """
    name = "root_scalar"
    refuse_derivatives(name, fprime=fprime, fprime2=fprime2)
    method, order = runs.scalar_method(method, bracket, x0, x1)
    ends = None if bracket is None else tuple(_number(end, name) for end in bracket)
    start = None if x0 is None else _number(x0, name)
    second = None if x1 is None else _number(x1, name)
    args = as_tuple(args)
    first, value = start_and_value(name, f, bracket[0] if start is None and ends else x0, args)
    f = as_number(f, value)
    x, status = _solver(on_failure, polish)(
        f,
        first,
        args,
        method=method,
        order=order,
        bracket=ends,
        starts=start is not None,
        x1=second,
        xtol=xtol,
        rtol=rtol,
        maxiter=maxiter,
        options=options,
    )
    return RootResults(x, **status)


def _number(a: Any, name: str) -> Tensor:
    found = as_start(a)
    if not isinstance(found, Tensor) or found.shape != () or found.is_complex():
        message = (
            f"{name}: expected real numbers of shape () for x0, x1 and the bracket, got {a!r}. Many"
            " roots at once are torch.func.vmap of this; a complex one is found by root."
        )
        raise TypeError(message)
    return found
