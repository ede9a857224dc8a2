"""`scipy.optimize.fixed_point`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from freevars._solvers.scipy_calls import as_tuple
from freevars._solvers.verdict import OnFailure
from freevars.jax._host.on_host import on_host
from freevars.jax._rules.rules import fixed_point as fixed_point_rule
from freevars.jax.scipy._scipy import as_start, optimize, tracing

__all__ = ["fixed_point"]


def _run(fun: Any, x0: Any, args: tuple[Any, ...], *, xtol: Any, maxiter: Any, method: Any) -> Any:
    """Run scipy on the host."""
    return optimize.fixed_point(fun, x0, args, xtol, maxiter, method)


_run.__name__ = "fixed_point"  # what errors call it


@functools.cache
def _solver(on_failure: OnFailure, polish: bool) -> Any:  # noqa: FBT001
    return fixed_point_rule(on_failure=on_failure, polish=polish)(on_host(_run))


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
    """`scipy.optimize.fixed_point` of a function in JAX, differentiable by all it captures.

    Args:
        func: `func(x, *args)`, in JAX, gives an x.
        x0: as for `minimize`: a pytree of arrays, and x is like it.
        args: extra arguments of `func`.
        xtol: as in scipy.
        maxiter: as in scipy.
        method: as in scipy.
        on_failure: as for `freevars.jax.root`.
        polish: as for `minimize`.

    Returns:
        x alone, as in scipy.

    Raises:
        TypeError: `func` cannot be traced by JAX.
        freevars.errors.FreevarsError: as for `freevars.jax.fixed_point`.
        Exception: whatever scipy raises, where it does not converge too, as for
            `freevars.jax.on_host`.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax.scipy
        >>> solve = lambda a: freevars.jax.scipy.fixed_point(lambda x: jnp.cos(x) * a, 0.5)
        >>> print(f"{jax.grad(solve)(1.0):.4f}")  # cos x / (1 + sin x)
        0.4416
    """
    x0, args = as_start(x0), as_tuple(args)
    with tracing("fixed_point", func):
        return _solver(on_failure, polish)(
            func, x0, args, xtol=xtol, maxiter=maxiter, method=method
        )
