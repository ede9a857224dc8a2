"""scipy's bounds and constraints as those of `argmin`: two sides, c(x) = 0 and g(x) >= 0.

What is an equation and what has no limit is read off the limits. Not here: what follows for a
derivative (`freevars._solvers.kkt`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freevars._solvers.scipy_calls import are_pairs, listed
from freevars._solvers.scipy_constraints import Function, sorted_constraints
from freevars.torch._compat import pytree
from freevars.torch.scipy._scipy import optimize, refuse_derivatives

__all__ = ["as_functions", "as_sides"]


def as_sides(bounds: Any, x0: Any, name: str, *, pairs: bool = True) -> tuple[Any, Any]:
    """(lower, upper) as `argmin` takes them, or None; and scipy's `keep_feasible`.

    With `pairs`, a pair for each unknown may be given, as to scipy's `minimize`.
    """
    if bounds is None:
        return None, False
    bounds = listed(bounds)
    leaves = pytree.tree_leaves(x0)
    n = sum(leaf.numel() for leaf in leaves)
    if isinstance(bounds, optimize.Bounds):
        lower, upper = (
            _like(torch.as_tensor(np.broadcast_to(side, (n,)).copy()), x0)
            for side in (bounds.lb, bounds.ub)
        )
        return (lower, upper), bool(np.any(bounds.keep_feasible)) and bounds.keep_feasible
    if pairs and are_pairs(bounds, n, name):
        rows = [_row(pair, leaves[0]) for pair in bounds]
        both = torch.stack(rows).reshape(n, 2)
        return (_like(both[:, 0], x0), _like(both[:, 1], x0)), False
    if isinstance(x0, Tensor) and isinstance(bounds, (tuple, list)):
        # A list for an array, as everywhere in scipy.
        return tuple(_side(b, x0) for b in bounds), False
    return bounds, False


def _side(side: Any, x0: Tensor) -> Any:
    if isinstance(side, (tuple, list, np.ndarray)):
        return torch.stack([torch.as_tensor(b).to(x0.dtype) for b in side])
    return side


def _row(pair: Any, like: Tensor) -> Tensor:
    ends = zip(pair, (-math.inf, math.inf), strict=True)
    return torch.stack(
        [torch.as_tensor(default if end is None else end).to(like) for end, default in ends]
    )


def _like(values: Tensor, x0: Any) -> Any:
    """The entries of a vector in the structure and shapes of x0."""
    leaves, tree = pytree.tree_flatten(x0)
    parts = torch.split(values, [leaf.numel() for leaf in leaves])
    return pytree.tree_unflatten(
        [part.reshape(leaf.shape).to(leaf) for part, leaf in zip(parts, leaves, strict=True)], tree
    )


def as_functions(constraints: Any, name: str) -> tuple[Function | None, Function | None]:
    """What is zero, and what is not negative, as functions of x; None where there is nothing."""
    return sorted_constraints(
        constraints, name, refuse_derivatives=refuse_derivatives, times=_times, between=_between
    )


def _vector(values: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(values)])


def _times(A: Any, x: Any) -> Tensor:
    vector = _vector(x)
    return _tensor(A).to(vector) @ vector


def _between(fun: Function, lower: Any, upper: Any) -> tuple[list[Function], list[Function]]:
    """The rows of lower <= fun(x) <= upper: equations, and inequalities."""
    low, up = map(_known, (lower, upper))
    is_equal = np.equal(low, up)

    def rows(which: Any, sign: float, side: Any) -> list[Function]:
        def part(x: Any) -> Any:
            value = _vector(fun(x))
            keep = torch.as_tensor(np.broadcast_to(which, tuple(value.shape)).copy())
            return (sign * (value - _tensor(side).to(value)))[keep.to(value.device)]

        return [part] if np.any(which) else []

    above = rows(~is_equal & np.isfinite(low), 1, lower)
    below = rows(~is_equal & np.isfinite(up), -1, upper)
    return rows(is_equal, 1, lower), above + below


def _tensor(side: Any) -> Tensor:
    # A copy of an array, which scipy may have made read-only.
    return side if isinstance(side, Tensor) else torch.as_tensor(np.array(side))


def _known(side: Any) -> Any:
    return side.detach().cpu().numpy() if isinstance(side, Tensor) else np.asarray(side)
