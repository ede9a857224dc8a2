"""`scipy.integrate.quad`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freevars._solvers.integration import OnDoubt
from freevars._solvers.scipy_calls import as_tuple, refuse_integrand, refuse_of_quad
from freevars.torch import _compat
from freevars.torch._compat import pytree
from freevars.torch._rules.integrals import integral
from freevars.torch.scipy._scipy import not_in_pytorch, runs

__all__ = ["quad"]


def _run(
    func: Any, a: Any, b: Any, args: tuple[Any, ...], *, points: Any, limits: Any, options: Any
) -> tuple[Any, Tensor]:
    """Run scipy."""
    del args
    low, high = float(a), float(b)
    example = func(runs.inside(low, high))
    like = _real(example)
    values, error = runs.quad(
        lambda t: _real(func(t)).detach().cpu().double().numpy(),
        low,
        high,
        like.numel(),
        limit=limits,
        points=points,
        **options,
    )
    found = torch.as_tensor(values).to(like).reshape(like.shape)
    out = torch.view_as_complex(found) if example.is_complex() else found
    return out, torch.as_tensor(error).to(like)


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


_run.__name__ = _run.__qualname__ = "quad"  # what errors call it


@functools.cache
def _solver(on_failure: OnDoubt, check: bool, tol: float | None) -> Any:  # noqa: FBT001
    how: dict[str, Any] = {"on_failure": on_failure, "check": check, "tol": tol}
    return integral(has_aux=True, takes="array", **how)(_run)


@_compat.uncompiled
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
    *,
    on_failure: OnDoubt = "raise",
    check: bool = True,
    tol: float | None = None,
) -> tuple[Any, Any]:
    """`scipy.integrate.quad` of a function in PyTorch, differentiable by limits and captures.

    A backward pass integrates once for each number that is differentiated by, since scipy's method
    takes numbers alone; for many of them, `freevars.torch.integral` of a rule in PyTorch is faster.

    Args:
        func: `func(t, *args)`, in PyTorch, gives a number for one of shape ().
        a: a real number. An infinite one has derivative zero.
        b: as `a`.
        args: extra arguments of `func`.
        full_output: not supported, and refused.
        epsabs: as in scipy.
        epsrel: as in scipy.
        limit: as in scipy.
        points: as in scipy.
        weight: not supported, and refused. Write the weight into `func`.
        wvar: not supported, and refused.
        wopts: not supported, and refused.
        maxp1: not used without a weight.
        limlst: not used without a weight.
        complex_func: whether func gives complex numbers, as in scipy.
        on_failure: as for `freevars.torch.integral`; scipy's `epsabs` is absolute, and too large
            for a derivative that is small.
        check: as for `freevars.torch.integral`.
        tol: as for `freevars.torch.integral`.

    Returns:
        The integral, and scipy's estimate of its error, which has derivative zero.

    Raises:
        TypeError: `func` is not written in PyTorch or gives no number, or see above.
        freevars.errors.FreevarsError: as for `freevars.torch.integral`.

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
            refuse_integrand(value, "freevars.torch", is_complex=is_complex)
        return value

    ends = (float(end) if _is_numpy_number(end) else end for end in (a, b))
    # The integral does not depend on where it is cut.
    points = pytree.tree_map_only(Tensor, torch.detach, points)
    options = {"epsabs": epsabs, "epsrel": epsrel}
    result: tuple[Any, Any] = _solver(on_failure, check, tol)(
        number, *ends, as_tuple(args), points=points, limits=limit, options=options
    )
    return result


def _is_numpy_number(x: Any) -> bool:
    return isinstance(x, (np.ndarray, np.generic)) and x.ndim == 0 and not np.iscomplexobj(x)
