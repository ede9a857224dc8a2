"""`scipy.optimize.linprog`, with derivatives."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from freevars._solvers.scipy_calls import check_pair, dense, pairs_of, refuse_of_linprog
from freevars._solvers.verdict import OnFailure
from freevars.jax import _compat
from freevars.jax._rules.rules import argmin
from freevars.jax.scipy._constraints import as_sides
from freevars.jax.scipy._result import OptimizeResult
from freevars.jax.scipy._scipy import on_host_as, runs

__all__ = ["linprog"]


@functools.cache
def _solver(on_failure: OnFailure, one_sided: bool) -> Any:  # noqa: FBT001
    rule = argmin(has_aux=True, on_failure=on_failure, one_sided=one_sided)
    return rule(on_host_as(runs.linprog))


def linprog(
    c: Any,
    A_ub: Any = None,
    b_ub: Any = None,
    A_eq: Any = None,
    b_eq: Any = None,
    bounds: Any = (0, None),
    method: Any = "highs",
    callback: Any = None,
    options: Any = None,
    x0: Any = None,
    integrality: Any = None,
    *,
    on_failure: OnFailure = "raise",
    one_sided: bool = False,
) -> OptimizeResult:
    """`scipy.optimize.linprog`, differentiable by the matrices, the vectors and the bounds.

    The minimum of c x with A_ub x <= b_ub, A_eq x = b_eq and bounds. At a vertex x changes with the
    constraints that meet there, and not with c; where it is not the only minimum, or more
    constraints meet than x has numbers, there is no derivative, and it is refused.

    Args:
        c: Float[Array, "n"]; each of these may be a list too.
        A_ub: Float[Array, "m n"] or None.
        b_ub: Float[Array, "m"] or None.
        A_eq: Float[Array, "k n"] or None.
        b_eq: Float[Array, "k"] or None.
        bounds: as in scipy: a pair (min, max) for all, or one for each of x, None for no bound.
        method: as in scipy.
        callback: not supported by scipy's methods, and refused.
        options: as in scipy.
        x0: not used by scipy's methods, and refused.
        integrality: refused: what is a whole number has no derivative.
        on_failure: as for `freevars.jax.root`.
        one_sided: as for `freevars.jax.argmin`.

    Returns:
        x, `fun` at x, and what scipy said (`OptimizeResult`). x is NaN where scipy found none.

    Raises:
        TypeError: a matrix is given without its vector, or see above.
        freevars.errors.FreevarsError: as for `freevars.jax.argmin`.
        Exception: whatever scipy raises, as for `freevars.jax.on_host`.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax.scipy
        >>> def plan(hours, cap):  # the most of 2 x + 3 y
        ...     limits = {"A_ub": jnp.ones((1, 2)), "b_ub": jnp.array([hours])}
        ...     gain = jnp.array([2.0, 3.0])
        ...     return freevars.jax.scipy.linprog(-gain, **limits, bounds=[(0, None), (0, cap)]).x
        >>> print(plan(8.0, 3.0), jax.jacobian(plan)(8.0, 3.0) + 0.0)
        [5. 3.] [1. 0.]
    """
    name = "linprog"
    refuse_of_linprog(callback=callback, x0=x0, integrality=integrality)
    c = _compat.whole(jnp.asarray(c))  # a small program: its matrices are multiplied as they are
    c = c.astype(jnp.result_type(float, c))
    functions: dict[str, Any] = {}
    for kind, end, A, b in (("inequality", "ub", A_ub, b_ub), ("equality", "eq", A_eq, b_eq)):
        check_pair(name, end, A, b)
        if A is not None:
            matrix, vector = (_compat.whole(jnp.asarray(a, c.dtype)) for a in (dense(A), b))
            sign = -1 if end == "ub" else 1
            functions[kind] = functools.partial(_rows, sign * matrix, sign * vector)
    zero = jnp.zeros_like(c)
    (lower, upper), _ = as_sides(pairs_of(bounds, c.size), zero, name)
    sides = (lower.astype(c.dtype), upper.astype(c.dtype))
    x, status = _solver(on_failure, one_sided)(
        lambda x: jnp.vdot(c, x), zero, method=method, options=options, bounds=sides, **functions
    )
    return OptimizeResult(x, jnp.vdot(c, x), **status)


def _rows(matrix: Any, vector: Any, x: Any) -> Any:
    return matrix @ x - vector
