"""scipy's bounds and constraints as those of `argmin`: two sides, c(x) = 0 and g(x) >= 0.

What is an equation and what has no limit is read off the limits. Not here: what follows for a
derivative (`freevars._solvers.kkt`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freevars._solvers.scipy_calls import are_pairs, as_tuple, check_constraint, listed
from freevars.torch._compat import pytree
from freevars.torch.scipy._scipy import optimize, refuse_derivatives

__all__ = ["as_functions", "as_sides"]

Function = Callable[[Any], Any]


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
    one = isinstance(constraints, (dict, optimize.NonlinearConstraint, optimize.LinearConstraint))
    given = [constraints] if one else list(constraints or ())
    equal: list[Function] = []
    positive: list[Function] = []
    for i, constraint in enumerate(given):
        _add(constraint, f"{name}: constraints[{i}]", equal, positive)
    return _together(equal), _together(positive)


def _together(functions: Sequence[Function]) -> Function | None:
    return (lambda x: [f(x) for f in functions]) if functions else None


def _add(constraint: Any, where: str, equal: list[Function], positive: list[Function]) -> None:
    if isinstance(constraint, dict):
        check_constraint(where, constraint)
        kind, fun = str(constraint["type"]).lower(), constraint["fun"]
        refuse_derivatives(where, jac=constraint.get("jac"))
        args = as_tuple(constraint.get("args", ()))
        (equal if kind == "eq" else positive).append(lambda x: fun(x, *args))
        return
    if isinstance(constraint, optimize.LinearConstraint):
        A = constraint.A if isinstance(constraint.A, np.ndarray) else constraint.A.toarray()
        _add_limits(lambda x: _times(A, x), constraint, where, equal, positive)
    elif isinstance(constraint, optimize.NonlinearConstraint):
        jac, hess = constraint.jac, constraint.hess
        refuse_derivatives(
            where, jac=None if isinstance(jac, str) else jac, hess=hess if callable(hess) else None
        )
        _add_limits(constraint.fun, constraint, where, equal, positive)
    else:
        message = (
            f"{where}: expected a dict, a NonlinearConstraint or a LinearConstraint of scipy, got"
            f" {constraint!r}."
        )
        raise TypeError(message)


def _vector(values: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(values)])


def _times(A: Any, x: Any) -> Tensor:
    vector = _vector(x)
    return _tensor(A).to(vector) @ vector


def _add_limits(
    fun: Function, constraint: Any, where: str, equal: list[Function], positive: list[Function]
) -> None:
    """The rows of lb <= fun(x) <= ub, each where it belongs."""
    if np.any(constraint.keep_feasible):
        message = (
            f"{where}: keep_feasible: expected False, got {constraint.keep_feasible!r}. Bounds may"
            " have it."
        )
        raise TypeError(message)
    lower, upper = constraint.lb, constraint.ub
    low, up = map(_known, (lower, upper))
    is_equal = np.equal(low, up)

    def rows(which: Any, sign: float, side: Any) -> Function:
        def part(x: Any) -> Any:
            value = _vector(fun(x))
            keep = torch.as_tensor(np.broadcast_to(which, tuple(value.shape)).copy())
            return (sign * (value - _tensor(side).to(value)))[keep.to(value.device)]

        return part

    for which, sign, side, found in (
        (is_equal, 1, lower, equal),
        (~is_equal & np.isfinite(low), 1, lower, positive),
        (~is_equal & np.isfinite(up), -1, upper, positive),
    ):
        if np.any(which):
            found.append(rows(which, sign, side))


def _tensor(side: Any) -> Tensor:
    # A copy of an array, which scipy may have made read-only.
    return side if isinstance(side, Tensor) else torch.as_tensor(np.array(side))


def _known(side: Any) -> Any:
    return side.detach().cpu().numpy() if isinstance(side, Tensor) else np.asarray(side)
