"""`scipy.optimize.root`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from freevars._solvers.scipy_calls import as_tuple
from freevars._solvers.verdict import OnFailure
from freevars.jax._rules.rules import root as root_rule
from freevars.jax.scipy._result import OptimizeResult
from freevars.jax.scipy._scipy import (
    as_start,
    converted,
    on_host_as,
    refuse_derivatives,
    runs,
    tracing,
    value_at,
)

__all__ = ["root"]


@functools.cache
def _solver(on_failure: OnFailure, polish: bool) -> Any:  # noqa: FBT001
    rule = root_rule(has_aux=True, on_failure=on_failure, polish=polish)
    return rule(on_host_as(runs.root))


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
    """`scipy.optimize.root` of a function in JAX, differentiable by everything it captures.

    "hybr" and "lm" are given the exact Jacobian. The other methods take none: they build their own
    from their own steps, and "krylov" from differences, whose step (`jac_options={"rdiff": ...}`)
    has to be larger than the default in float32.

    Args:
        fun: `fun(x, *args)`, in JAX, gives as many numbers as x has, in any structure.
        x0: as for `minimize`: a pytree of arrays, and x is like it.
        args: extra arguments of `fun`.
        method: as in scipy.
        jac: refused, because it is not needed: the function has exact derivatives.
        tol: as in scipy.
        callback: as in scipy: it is given NumPy vectors, and may not call JAX.
        options: as in scipy.
        on_failure: as for `freevars.jax.root`.
        polish: as for `minimize`.

    Returns:
        x, `fun` at x, and what scipy said (`OptimizeResult`).

    Raises:
        TypeError: `fun` cannot be traced by JAX, or a derivative is given.
        freevars.errors.FreevarsError: as for `freevars.jax.root`.
        Exception: whatever scipy raises, as for `freevars.jax.on_host`.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax.scipy
        >>> def meet(radius):  # of a circle with the diagonal
        ...     system = lambda p: (p["x"] ** 2 + p["y"] ** 2 - radius**2, p["x"] - p["y"])
        ...     return freevars.jax.scipy.root(system, {"x": 1.0, "y": 0.5}).x["y"]
        >>> print(f"{jax.grad(meet)(2.0):.4f}")  # 1 / sqrt(2)
        0.7071
    """
    refuse_derivatives("root", jac=jac)
    x0, args = as_start(x0), as_tuple(args)
    with tracing("root", fun):
        function = converted(fun, x0, args, "root")
        x, status = _solver(on_failure, polish)(
            function, x0, args, method=method, tol=tol, callback=callback, options=options
        )
        value = value_at(function, x, args)
    return OptimizeResult(x, value, **status)
