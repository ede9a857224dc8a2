"""`scipy.integrate.solve_ivp`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freevars._solvers.integration import OnDoubt, Reverse
from freevars._solvers.scipy_calls import as_tuple, check_span, check_times, ends, ivp_options
from freevars.torch import _compat
from freevars.torch._compat import pytree, transforms_active
from freevars.torch._rules.integrals import odeint
from freevars.torch.scipy._host import HostFunction
from freevars.torch.scipy._result import OdeResult, as_tensors
from freevars.torch.scipy._scipy import (
    as_start,
    as_tensor,
    refuse_derivatives,
    runs,
    value_in_pytorch,
)

__all__ = ["solve_ivp"]


def _run(
    fun: Any, y0: Any, ts: Tensor, args: tuple[Any, ...], *, method: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """Run scipy."""
    del args

    def at(t: float) -> HostFunction:
        return HostFunction(functools.partial(fun, t), y0, equations=True)

    host = at(float(ts[0]))
    rows, said = runs.solve_ivp(
        lambda t, y: at(t)(y),
        lambda t, y: at(t).jacobian(y),
        host.vector(y0),
        ts.detach().cpu().numpy().astype(np.float64),
        method=method,
        options=options,
    )
    return pytree.tree_map(lambda *ys: torch.stack(ys), *map(host.x, rows)), as_tensors(said)


_run.__name__ = _run.__qualname__ = "solve_ivp"  # what errors call it


@functools.cache
def _solver(on_failure: OnDoubt, reverse: Reverse, tol: float | None) -> Any:
    how: dict[str, Any] = {"on_failure": on_failure, "reverse": reverse, "tol": tol}
    return odeint(has_aux=True, takes="array", **how)(_run)


def _as_vector(fun: Callable[..., Any], *args: Any) -> Any:
    """A list of numbers as the vector that it is to scipy."""
    value = fun(*args)
    return as_tensor(value) if isinstance(value, (list, tuple)) else value


@_compat.uncompiled
def solve_ivp(
    fun: Callable[..., Any],
    t_span: Any,
    y0: Any,
    method: Any = "RK45",
    t_eval: Any = None,
    dense_output: Any = False,  # noqa: FBT002 (scipy's)
    events: Any = None,
    vectorized: Any = False,  # noqa: FBT002 (scipy's)
    args: Any = None,
    *,
    on_failure: OnDoubt = "raise",
    reverse: Reverse = "adjoint",
    tol: float | None = None,
    **options: Any,
) -> OdeResult:
    """`scipy.integrate.solve_ivp` of a function in PyTorch, differentiable by all it captures.

    By y0, `args`, the first time and `t_eval` too. "Radau", "BDF" and "LSODA" are given the exact
    Jacobian, also of the larger system that a derivative is solved for with.

    Args:
        fun: `fun(t, y, *args)`, in PyTorch, gives a value like y, or a list of tensors for a
            vector.
        t_span: the first and the last time; it is solved up to the last of `t_eval`.
        y0: a vector, or any pytree of floating or complex tensors, NumPy arrays or numbers.
        method: as in scipy.
        t_eval: the times at which y is returned. It is needed, as in `freevars.jax.scipy`.
        dense_output: not supported, and refused.
        events: not supported, and refused.
        vectorized: not supported, and refused.
        args: extra arguments of `fun`.
        on_failure: as for `freevars.torch.odeint`.
        reverse: as for `freevars.torch.odeint`; for a stiff equation "sensitivities".
        tol: as for `freevars.torch.odeint`.
        **options: `rtol`, `atol` (default: 1e-6 and 1e-9, in float32 1e-4 and 1e-7: a derivative
            needs more than scipy's 1e-3), `first_step`, `max_step`, `min_step`, as in scipy. An
            `atol` for each component holds for y; the rest of a larger system has the least of it.

    Returns:
        The times, the states, and what scipy said (`OdeResult`).

    Raises:
        TypeError: `fun` is not written in PyTorch, `t_eval` is missing, or an option has no
            place here.
        ValueError: times of `t_eval` lie outside of `t_span`.
        freevars.errors.FreevarsError: as for `freevars.torch.odeint`.

    Example:
        >>> import torch, freevars.torch.scipy
        >>> def end(rate):
        ...     decay = lambda t, y: -rate * y
        ...     ts = torch.tensor([1.0, 2.0])
        ...     result = freevars.torch.scipy.solve_ivp(decay, (0.0, 2.0), torch.ones(1), t_eval=ts)
        ...     return result.y[0, -1]
        >>> rate = torch.tensor(0.5)
        >>> print(f"{end(rate):.3f} {torch.func.grad(end)(rate):.3f}")  # exp(-2 rate), -2 times it
        0.368 -0.736
    """
    refuse_derivatives("solve_ivp", jac=options.pop("jac", None))
    y0 = as_start(y0)
    dtypes = {getattr(y, "dtype", None) for y in pytree.tree_leaves(y0)}
    single = dtypes.isdisjoint({torch.float64, torch.complex128})
    of_call = {"dense_output": dense_output, "events": events, "vectorized": vectorized}
    given = ivp_options(t_eval, of_call, options, single=single, times="torch.tensor(t_span)")
    times = as_tensor(t_eval)
    check_times(times.shape)
    first, last = map(as_tensor, ends(t_span))
    dtype = torch.promote_types(first.dtype, times.dtype)
    if not transforms_active():
        check_span([float(first.detach()), float(last.detach())], times.detach().tolist())
    ts = torch.cat([first.reshape(1).to(times.device, dtype), times.to(dtype)])
    args = () if args is None else as_tuple(args)
    value_in_pytorch("solve_ivp", functools.partial(fun, ts[0]), y0, args, by_x=False)
    field = functools.partial(_as_vector, fun) if isinstance(y0, Tensor) else fun
    ys, status = _solver(on_failure, reverse, tol)(
        field, y0, ts, args, method=method, options=given
    )
    return OdeResult(ts[1:], pytree.tree_map(lambda y: y[1:].movedim(0, -1), ys), **status)
