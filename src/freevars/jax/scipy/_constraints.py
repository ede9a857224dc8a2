"""scipy's bounds and constraints as those of `argmin`: two sides, c(x) = 0 and g(x) >= 0.

What is an equation and what has no limit is read off the limits, which are known; a limit that is
traced counts as finite. Not here: what follows for a derivative (`freevars._solvers.kkt`).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util
from jax.flatten_util import ravel_pytree

from freevars._solvers.scipy_calls import are_pairs, listed
from freevars._solvers.scipy_constraints import Function, sorted_constraints
from freevars.jax import _compat
from freevars.jax.scipy._scipy import optimize, refuse_derivatives

__all__ = ["as_functions", "as_sides"]


def as_sides(bounds: Any, x0: Any, name: str, *, pairs: bool = True) -> tuple[Any, Any]:
    """(lower, upper) as `argmin` takes them, or None; and scipy's `keep_feasible`.

    With `pairs`, a pair for each unknown may be given, as to scipy's `minimize`.
    """
    if bounds is None:
        return None, False
    bounds = listed(bounds)
    n = sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(x0))
    if isinstance(bounds, optimize.Bounds):
        sides = tuple(_like(jnp.broadcast_to(side, (n,)), x0) for side in (bounds.lb, bounds.ub))
        return sides, bool(np.any(bounds.keep_feasible)) and bounds.keep_feasible
    if not (pairs and are_pairs(bounds, n, name, x0)):
        if tree_util.all_leaves([x0]) and isinstance(bounds, (tuple, list)):
            # A list for an array, as everywhere in scipy.
            bounds = [jnp.array(b) if isinstance(b, (tuple, list)) else b for b in bounds]
        return bounds, False
    lower, upper = (
        jnp.array([default if pair[i] is None else pair[i] for pair in bounds])
        for i, default in enumerate((-np.inf, np.inf))
    )
    return (_like(lower, x0), _like(upper, x0)), False


def _like(values: Any, x0: Any) -> Any:
    """The entries of a vector in the structure and shapes of x0."""
    leaves, tree = tree_util.tree_flatten(x0)
    sizes = [math.prod(np.shape(leaf)) for leaf in leaves]
    parts = jnp.split(values, np.cumsum(sizes)[:-1])
    return tree.unflatten(
        [jnp.reshape(a, np.shape(leaf)) for a, leaf in zip(parts, leaves, strict=True)]
    )


def as_functions(constraints: Any, name: str) -> tuple[Function | None, Function | None]:
    """What is zero, and what is not negative, as functions of x; None where there is nothing."""
    return sorted_constraints(
        constraints, name, refuse_derivatives=refuse_derivatives, times=_times, between=_between
    )


def _times(A: Any, x: Any) -> Any:
    return A @ ravel_pytree(x)[0]


def _between(fun: Function, lower: Any, upper: Any) -> tuple[list[Function], list[Function]]:
    """The rows of lower <= fun(x) <= upper: equations, and inequalities."""
    known = not any(isinstance(side, _compat.Tracer) for side in (lower, upper))
    is_equal = np.equal(lower, upper) if known else np.bool_(lower is upper)

    def finite(side: Any) -> Any:
        return True if isinstance(side, _compat.Tracer) else np.isfinite(side)

    def rows(which: Any, sign: float, side: Any) -> list[Function]:
        def part(x: Any) -> Any:
            value = ravel_pytree(fun(x))[0]
            keep = np.broadcast_to(which, value.shape)
            limit = jnp.asarray(side, value.dtype)
            # An infinite limit, which is seen here if it is traced, is kept at a distance of 1.
            distance = jnp.where(jnp.isinf(limit), -jnp.sign(limit), value - limit)
            return (sign * distance)[keep]

        return [part] if np.any(which) else []

    above = rows(~is_equal & finite(lower), 1, lower)
    below = rows(~is_equal & finite(upper), -1, upper)
    return rows(is_equal, 1, lower), above + below
