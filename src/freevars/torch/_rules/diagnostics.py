"""The figures of the verdict in this host: one for each problem of a batch.

`freevars._solvers.verdict` defines them and their limits. This host measures the step differently.
With s = A^-1 F, the Newton step, and d, the size of a component (`sizes.py`),

    step = max |A_ki s_i| / sum_j |A_kj| d_j   over equations k and components i:

the change of one term of an equation by the step, relative to the sum of its terms. Multiplying an
equation by a number, or measuring an unknown in another unit, changes nothing. A component that
happens to be small (a feature of a deep-equilibrium layer) is measured by its effect in the
equations; one that dominates an equation is measured relative to itself.

Not here: how the figures are computed (`dense.py`, `iterative.py`, `closer.py`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from freevars._solvers import verdict
from freevars._solvers.verdict import Limits

__all__ = ["Figures", "limits_of", "units"]


def limits_of(dtype: torch.dtype, tol: float | None = None) -> Limits:
    """For an unknown of `dtype`; linear algebra is done in single precision at least."""
    eps = float(torch.finfo(dtype).eps)
    linear = float(torch.finfo(torch.promote_types(dtype, torch.float32)).eps)
    return Limits.of(eps, linear, tol=tol)


class Figures(NamedTuple):
    """Each Float[Tensor, "problems"] (`finite`: Bool), as good as can be if not measured."""

    finite: Tensor
    step: Tensor
    change: Tensor
    rcond: Tensor
    residual: Tensor
    conserved: Tensor

    @staticmethod
    def unmeasured(like: Tensor) -> "Figures":
        zero = torch.zeros(len(like), dtype=like.dtype, device=like.device)
        one = torch.ones_like(zero)
        return Figures(torch.isfinite(like).all(1), zero, zero, one, zero, zero)

    def good(self, limits: Limits, *, least_squares: bool) -> Tensor:
        zero = torch.zeros_like(self.step)
        figures = verdict.Figures(
            finite=self.finite,
            step=self.step,
            change=self.change,
            rcond=self.rcond,
            residual=self.residual,
            asymmetry=zero,
            conserved=self.conserved,
        )
        good: Tensor = verdict.accepted(figures, limits, least_squares=least_squares)
        return good

    def of(self, k: int) -> verdict.Figures:
        """Those of problem `k`, as Python numbers."""
        finite, step, change, rcond, residual, conserved = (float(figure[k]) for figure in self)
        return verdict.Figures(bool(finite), step, change, rcond, residual, 0.0, conserved)


def units(size: Tensor) -> Tensor:
    """The unit d of each component, from how large it is or how far the solver moved it: at least
    what rounding leaves of a component next to the largest one."""
    d = size
    if d.shape[1]:
        d = torch.maximum(d, float(torch.finfo(d.dtype).eps) ** 0.5 * d.amax(1, keepdim=True))
    return torch.where((d > 0) & torch.isfinite(d), d, 1)
