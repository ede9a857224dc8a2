"""`scipy.integrate.quad`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freevars._solvers.scipy_calls import as_tuple, refuse_of_quad
from freevars.torch._rules.integrals import integral
from freevars.torch.scipy._scipy import integrate, not_in_pytorch

__all__ = ["quad"]


def _run(
    func: Any, a: Any, b: Any, args: tuple[Any, ...], *, points: Any, limits: Any, options: Any
) -> tuple[Any, Tensor]:
    """Run scipy, once for each real number of the integrand."""
    del args
    given = {"limit": limits, "points": points, **options}
    low, high = float(a), float(b)
    example = func(_inside(low, high))
    of_one = torch.view_as_real(example) if example.is_complex() else example

    def part(t: float, k: int) -> float:
        value = func(t)
        real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        return float(real.reshape(-1)[k])

    each = [
        integrate.quad(functools.partial(part, k=k), low, high, **given)
        for k in range(of_one.numel())
    ]
    values = torch.tensor([value for value, _ in each], dtype=torch.float64)
    found = values.to(of_one).reshape(of_one.shape)
    error = torch.tensor(np.linalg.norm([error for _, error in each])).to(of_one)
    return torch.view_as_complex(found) if example.is_complex() else found, error


def _inside(a: float, b: float) -> float:
    if np.isfinite(a + b):
        return (a + b) / 2
    return a + 1 if np.isfinite(a) else min(b - 1, 0.0)


_run.__name__ = _run.__qualname__ = "quad"  # what errors call it
_solver: Any = integral(has_aux=True, takes="array")(_run)


def quad(
    func: Callable[..., Any],
    a: Any,
    b: Any,
    args: Any = (),
    full_output: Any = 0,
    epsabs: Any = 1.49e-8,
    epsrel: Any = 1.49e-8,
    limit: int = 50,
    points: Any = None,
    weight: Any = None,
    wvar: Any = None,
    wopts: Any = None,
    maxp1: Any = 50,
    limlst: Any = 50,
    complex_func: bool = False,  # noqa: FBT001, FBT002 (scipy's)
) -> tuple[Any, Any]:
    """`scipy.integrate.quad` of a function in PyTorch, differentiable by limits and captures.

    A backward pass integrates once for each number that is differentiated by, since scipy's method
    takes numbers alone; for many of them, `freevars.torch.integral` of a rule in PyTorch is faster.

    Args:
        func: `func(t, *args)`, in PyTorch, gives a number for one of shape ().
        a: a real number; so is `b`. An infinite one has derivative zero.
        b: see `a`.
        args: extra arguments of `func`.
        full_output: not here, and refused.
        epsabs: as in scipy; so are `epsrel`, `limit` and `points`.
        epsrel: see `epsabs`.
        limit: see `epsabs`.
        points: see `epsabs`.
        weight: not here, and refused; so are `wvar` and `wopts`. Write the weight into `func`.
        wvar: see `weight`.
        wopts: see `weight`.
        maxp1: of a weight.
        limlst: of a weight.
        complex_func: whether func gives complex numbers, as in scipy.

    Returns:
        The integral, and scipy's estimate of its error, which has derivative zero.

    Raises:
        TypeError: `func` is no PyTorch or gives no number, or see above.

    Example:
        >>> import torch, freevars.torch.scipy
        >>> def tail(rate, start):
        ...     density = lambda t: rate * torch.exp(-rate * t)
        ...     return freevars.torch.scipy.quad(density, start, torch.inf)[0]
        >>> slopes = torch.func.grad(tail, (0, 1))(torch.tensor(2.0), torch.tensor(0.5))
        >>> print([f"{s:.4f}" for s in slopes])  # of exp(-rate start)
        ['-0.1839', '-0.7358']
    """
    del maxp1, limlst
    refuse_of_quad(full_output=full_output, weight=weight, wvar=wvar, wopts=wopts)

    def number(t: Any, *args: Any) -> Any:
        value = func(t, *args)
        if isinstance(value, (float, int, np.ndarray, np.generic)):
            raise not_in_pytorch("quad", func, f"which returns {type(value).__name__}")
        is_number = isinstance(value, Tensor) and value.shape == ()
        is_complex = is_number and value.is_complex()
        if not is_number or (is_complex and not complex_func):
            what = "a complex number takes complex_func=True; " if is_complex else ""
            message = (
                f"quad: expected a function that returns a number of shape (), got {value!r}."
                f" {what}freevars.torch.integral takes a solver that integrates tensors."
            )
            raise TypeError(message)
        return value

    ends = (end if isinstance(end, Tensor) else float(end) for end in (a, b))
    options = {"epsabs": epsabs, "epsrel": epsrel}
    result: tuple[Any, Any] = _solver(
        number, *ends, as_tuple(args), points=points, limits=limit, options=options
    )
    return result
