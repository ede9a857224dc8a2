"""`scipy.optimize.linprog`, with derivatives."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from freevars._solvers.scipy_calls import check_pair, dense, pairs_of, refuse_of_linprog
from freevars.torch import _compat
from freevars.torch._rules.rule import OnFailure
from freevars.torch._rules.rules import argmin
from freevars.torch.scipy._constraints import as_sides
from freevars.torch.scipy._host import on_tensors
from freevars.torch.scipy._result import OptimizeResult
from freevars.torch.scipy._scipy import as_tensor, runs

__all__ = ["linprog"]


@functools.cache
def _solver(on_failure: OnFailure, one_sided: bool) -> Any:  # noqa: FBT001
    return argmin(has_aux=True, on_failure=on_failure, one_sided=one_sided)(
        on_tensors(runs.linprog, equations=False)
    )


@_compat.uncompiled
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
        c: Float[Tensor, "n"]; each of these may be a NumPy array or a list too.
        A_ub: Float[Tensor, "m n"] or None.
        b_ub: Float[Tensor, "m"] or None.
        A_eq: Float[Tensor, "k n"] or None.
        b_eq: Float[Tensor, "k"] or None.
        bounds: as in scipy: a pair (min, max) for all, or one for each of x, None for no bound.
        method: as in scipy.
        callback: not supported by scipy's methods, and refused.
        options: as in scipy.
        x0: not used by scipy's methods, and refused.
        integrality: refused: what is a whole number has no derivative.
        on_failure: as for `freevars.torch.root`.
        one_sided: as for `freevars.torch.argmin`.

    Returns:
        x, `fun` at x, and what scipy said (`OptimizeResult`). x is NaN where scipy found none.

    Raises:
        TypeError: a matrix is given without its vector, or see above.
        freevars.errors.FreevarsError: as for `freevars.torch.argmin`.
        Exception: whatever scipy raises, as it is.

    Example:
        >>> import torch, freevars.torch.scipy
        >>> def plan(hours):  # the most of 2 x + 3 y
        ...     limits = {"A_ub": torch.ones(1, 2), "b_ub": hours[None]}
        ...     gain = torch.tensor([2.0, 3.0])
        ...     return freevars.torch.scipy.linprog(-gain, **limits, bounds=[(0, None), (0, 3.0)]).x
        >>> hours = torch.tensor(8.0)
        >>> print(plan(hours), torch.autograd.functional.jacobian(plan, hours) + 0.0)
        tensor([5., 3.]) tensor([1., 0.])
    """
    refuse_of_linprog(callback=callback, x0=x0, integrality=integrality)
    c = as_tensor(c)
    functions: dict[str, Any] = {}
    for kind, end, A, b in (("inequality", "ub", A_ub, b_ub), ("equality", "eq", A_eq, b_eq)):
        check_pair("linprog", end, A, b)
        if A is not None:
            sign = -1 if end == "ub" else 1
            rows = (sign * as_tensor(part).to(c) for part in (dense(A), b))
            functions[kind] = functools.partial(_rows, *rows)
    zero = torch.zeros_like(c)
    sides, _ = as_sides(pairs_of(bounds, c.numel()), zero, "linprog")
    x, status = _solver(on_failure, one_sided)(
        lambda x: (c * x).sum(), zero, method=method, options=options, bounds=sides, **functions
    )
    return OptimizeResult(x, (c * x).sum(), **status)


def _rows(matrix: Tensor, vector: Tensor, x: Tensor) -> Tensor:
    return matrix @ x - vector
