"""Totals that a solver keeps from its start, as further equations of the condition.

Where F leaves c(x) unchanged (of a reaction, the amount of each element), A = dF/dx is singular:
L^T A = 0 for some L of as many columns as there are totals. The solution is the one with
c(x) = c(x0). Let W be any constant matrix for which L^T W is regular. Then

    F(x) + W (c(x) - c(x0)) = 0

has the same solution and a regular derivative: multiplied by L^T, it says c(x) = c(x0), and then
F(x) = 0. This also holds around the solution, so derivatives of any order are right, and x0 is one
of the values that x depends on. So is what c reads: where L depends on a value, c has to read it
too. W is L here, in the units of the equations.
"""

import torch
from torch import Tensor

from freevars.errors import NotASolutionError
from freevars.torch._rules.derivative import Derivative
from freevars.torch._rules.diagnostics import limits_of

__all__ = ["completion"]


def completion(at: Tensor, f: Tensor, totals: Tensor, unit: Tensor, name: str) -> Tensor:
    """W of each problem, Float[Tensor, "problems n totals"]."""
    dtype = torch.promote_types(f.dtype, torch.float32)
    m = totals.shape[1]
    a = Derivative(at, f, symmetric=False).matrix().to(dtype) * unit[:, None, :]
    c = _rows(totals, at).to(dtype) * unit[:, None, :]
    largest = a.abs().amax(2, keepdim=True)
    rows = torch.where(largest > 0, largest, 1)
    left: Tensor
    left, singular, _ = torch.linalg.svd(a / rows)
    if m > singular.shape[1] or not bool(
        (singular[:, -m:] <= limits_of(f.dtype).residual * singular[:, :1]).all()
    ):
        message = (
            f"{name}: conserved= expected a function that leaves {m} totals unchanged, so that {m} "
            f"of its equations follow from the others, got one whose derivative has only smaller "
            "defects. Leave out the totals that follow from the equations."
        )
        raise NotASolutionError(message)
    # A total may have any unit: each column has the inverse of its total's unit.
    sizes = c.abs().amax(2)[:, None, :]
    columns = rows * left[:, :, -m:] / torch.where(sizes > 0, sizes, 1)
    return columns.to(f.dtype)


def _rows(totals: Tensor, at: Tensor) -> Tensor:
    """dc/dx, Float[Tensor, "problems totals n"]."""
    if not totals.requires_grad:
        return torch.zeros(*totals.shape, at.shape[1], dtype=at.dtype, device=at.device)
    rows = [
        torch.autograd.grad(totals[:, k].sum(), at, retain_graph=True, materialize_grads=True)[0]
        for k in range(totals.shape[1])
    ]
    return torch.stack(rows, 1)
