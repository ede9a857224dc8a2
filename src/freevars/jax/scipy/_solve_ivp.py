"""`scipy.integrate.solve_ivp`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freevars._solvers.integration import OnDoubt, Reverse
from freevars._solvers.scipy_calls import as_tuple, check_span, check_times, ends, ivp_options
from freevars._solvers.scipy_results import ivp_said
from freevars.jax import _compat
from freevars.jax._host.on_host import on_host
from freevars.jax._rules.integrals import odeint
from freevars.jax.scipy._result import OdeResult, as_arrays
from freevars.jax.scipy._scipy import as_start, refuse_derivatives, runs, tracing

__all__ = ["solve_ivp"]


def _run(
    fun: Any, y0: Any, ts: Any, args: tuple[Any, ...], *, method: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Run scipy on the host."""
    del args
    rows, said = runs.solve_ivp(
        fun, fun.jacobian, np.reshape(y0, -1), ts, method=method, options=options
    )
    return rows, as_arrays(said)


_run.__name__ = "solve_ivp"  # what errors call it


@functools.cache
def _solver(on_failure: OnDoubt, reverse: Reverse, tol: float | None) -> Any:
    rule = odeint(has_aux=True, on_failure=on_failure, reverse=reverse, tol=tol)
    return rule(on_host(_run, aux=as_arrays(ivp_said())))


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
    """`scipy.integrate.solve_ivp` of a function in JAX, differentiable by everything it captures.

    By y0, `args`, the first time and `t_eval` too. "Radau", "BDF" and "LSODA" are given the exact
    Jacobian, also of the larger system that a derivative is solved for with.

    Args:
        fun: `fun(t, y, *args)`, in JAX, gives a value like y, or a list of numbers for a vector.
        t_span: the first and the last time; it is solved up to the last of `t_eval`.
        y0: a vector, a list of numbers, or any pytree of floating or complex arrays.
        method: as in scipy.
        t_eval: the times at which y is returned. It is needed: how many steps the solver takes is
            not known when a program is compiled.
        dense_output: not supported, and refused.
        events: not supported, and refused.
        vectorized: not supported, and refused.
        args: extra arguments of `fun`.
        on_failure: as for `freevars.jax.odeint`.
        reverse: as for `freevars.jax.odeint`; for a stiff equation "sensitivities".
        tol: as for `freevars.jax.odeint`.
        **options: `rtol`, `atol` (default: 1e-6 and 1e-9, in float32 1e-4 and 1e-7: a derivative
            needs more than scipy's 1e-3), `first_step`, `max_step`, `min_step`, as in scipy. An
            `atol` for each component holds for y; the rest of a larger system has the least of it.

    Returns:
        The times, the states, and what scipy said (`OdeResult`).

    Raises:
        TypeError: `fun` cannot be traced by JAX; `t_eval` is missing; an option has no place here.
        ValueError: times of `t_eval` that are known lie outside of `t_span`.
        freevars.errors.FreevarsError: as for `freevars.jax.odeint`.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax.scipy
        >>> def end(rate):
        ...     decay = lambda t, y: -rate * y
        ...     ts = jnp.array([1.0, 2.0])
        ...     span, y0 = (0.0, 2.0), jnp.ones(1)
        ...     return freevars.jax.scipy.solve_ivp(decay, span, y0, t_eval=ts).y[0, -1]
        >>> print(f"{end(0.5):.3f} {jax.grad(end)(0.5):.3f}")  # exp(-2 rate), -2 exp(-2 rate)
        0.368 -0.736
    """
    refuse_derivatives("solve_ivp", jac=options.pop("jac", None))
    y0 = as_start(y0)
    field = functools.partial(_as_array, fun) if _compat.is_array(y0) else fun
    leaves = jax.tree.leaves(y0)
    single = all(jnp.finfo(jnp.result_type(float, y)).eps > 1e-9 for y in leaves)  # noqa: PLR2004
    of_call = {"dense_output": dense_output, "events": events, "vectorized": vectorized}
    given = ivp_options(t_eval, of_call, options, single=single, times="jnp.array(t_span)")
    times = jnp.asarray(t_eval)
    check_times(times.shape)
    first, last = ends(t_span)
    dtype = jnp.result_type(float, times, first, last)
    ts = jnp.concatenate([jnp.asarray(first, dtype)[None], times.astype(dtype)])
    _check_span((first, last), t_eval)
    with tracing("solve_ivp", fun):
        ys, status = _solver(on_failure, reverse, tol)(
            field, y0, ts, () if args is None else as_tuple(args), method=method, options=given
        )
    return OdeResult(ts[1:], jax.tree.map(lambda y: jnp.moveaxis(y[1:], 0, -1), ys), **status)


def _as_array(fun: Callable[..., Any], *args: Any) -> Any:
    """A list of numbers as the array that it is to scipy."""
    value = fun(*args)
    return jnp.array(value) if isinstance(value, (list, tuple)) else value


def _check_span(t_span: Any, times: Any) -> None:
    known = not any(isinstance(t, _compat.Tracer) for t in jax.tree.leaves((t_span, times)))
    if known:  # by NumPy: inside `jit` an operation of JAX gives what is not known
        check_span([float(t) for t in t_span], np.ravel(np.asarray(times)).tolist())
