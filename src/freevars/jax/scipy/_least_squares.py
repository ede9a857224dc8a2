"""`scipy.optimize.least_squares`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from freevars._solvers.scipy_calls import as_tuple, is_open, refuse_loss
from freevars._solvers.verdict import OnFailure
from freevars.jax._rules.rules import least_squares as least_squares_rule
from freevars.jax.scipy._constraints import as_sides
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

__all__ = ["least_squares"]


@functools.cache
def _solver(on_failure: OnFailure, one_sided: bool, polish: bool) -> Any:  # noqa: FBT001
    rule = least_squares_rule(
        has_aux=True, on_failure=on_failure, one_sided=one_sided, polish=polish
    )
    return rule(on_host_as(runs.least_squares))


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
    """`scipy.optimize.least_squares` of a function in JAX, differentiable by all it captures.

    The solver is given the exact Jacobian; the derivative is that of the minimum, with the whole
    second derivative, exact where residuals remain.

    Args:
        fun: `fun(x, *args, **kwargs)`, in JAX, gives the residuals, real arrays in any structure.
        x0: as for `minimize`: a pytree of arrays, and x is like it.
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
        callback: as in scipy: it is given NumPy vectors, and may not call JAX.
        on_failure: as for `freevars.jax.root`.
        one_sided: as for `freevars.jax.argmin`.
        polish: as for `minimize`.

    Returns:
        x, `fun` and `cost` at x, and what scipy said (`OptimizeResult`).

    Raises:
        TypeError: `fun` cannot be traced by JAX, a derivative is given, or another loss.
        freevars.errors.FreevarsError: as for `freevars.jax.least_squares`.
        Exception: whatever scipy raises, as for `freevars.jax.on_host`.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax.scipy
        >>> t = jnp.array([0.0, 1.0, 2.0])
        >>> def slope(y):
        ...     residuals = lambda x: x[0] + x[1] * t - y
        ...     return freevars.jax.scipy.least_squares(residuals, jnp.zeros(2)).x[1]
        >>> print(jax.grad(slope)(jnp.array([1.0, 2.0, 4.0])).round(3) + 0.0)
        [-0.5  0.   0.5]
    """
    name = "least_squares"
    del f_scale
    refuse_derivatives(name, jac=jac, diff_step=diff_step, jac_sparsity=jac_sparsity)
    refuse_loss(name, loss)
    x0 = as_start(x0)
    sides, _ = as_sides(None if is_open(bounds) else bounds, x0, name, pairs=False)
    args, kwargs = as_tuple(args), kwargs or {}
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

    with tracing(name, fun):
        function = converted(residuals, x0, args, name)
        x, status = _solver(on_failure, one_sided, polish)(
            function, x0, args, how=how, bounds=sides
        )
        (value,) = value_at(function, x, args)
    # Not by `vdot`, which gathers what is sharded, or asks how.
    cost = sum(jnp.sum(jnp.abs(r) ** 2) for r in map(jnp.asarray, jax.tree.leaves(value))) / 2
    return OptimizeResult(x, value, **status, cost=cost)
