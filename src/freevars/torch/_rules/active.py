"""Which constraints are active at a point, and the system that holds there.

Vectors are Float[Tensor, "problems n"], a row for each problem of a batch. `freevars._solvers.kkt`
explains the decision. Not here: whose functions these are (`constrained.py`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from freevars._solvers import kkt
from freevars._solvers.kkt import Pair
from freevars._solvers.verdict import Limits
from freevars.torch._rules.products import linearised, vjp
from freevars.torch._rules.vectors import firm_probe

__all__ = [
    "ActiveSet",
    "Functions",
    "Multipliers",
    "constraints_at",
    "multipliers_at",
    "system_at",
]

Vectors = Callable[[Tensor], Tensor]
Multipliers = dict[str, Tensor]


class Functions(NamedTuple):
    """The functions of a minimum, of x as real vectors."""

    objective: Vectors  # Float[Tensor, "problems"]
    constraints: dict[str, Vectors]  # equality, inequality
    lower: Tensor  # infinite where there is no bound
    upper: Tensor
    moved: Tensor  # from where the solver began

    @property
    def way(self) -> Tensor:
        """How far the solver came, Float[Tensor, "problems 1"]."""
        return _largest(self.moved.abs())[:, None]

    @property
    def fixed(self) -> Tensor:
        """The components that the bounds fix."""
        return self.lower == self.upper

    def lagrangian(self, x: Tensor, multipliers: Multipliers) -> Tensor:
        value = self.objective(x)
        for name, m in multipliers.items():
            value = value - (m * self.constraints[name](x)).sum(1)
        return value

    def gradient(self, x: Tensor, multipliers: Multipliers) -> Tensor:
        """Of the Lagrangian by x."""
        return vjp(lambda x: self.lagrangian(x, multipliers), x, x.new_ones(len(x)))


class ActiveSet(NamedTuple):
    """The gaps and pulls of all inequalities, and what they decide."""

    lower: Pair
    upper: Pair
    inequality: Pair | None
    gaps: tuple[Tensor, Tensor, Tensor]  # of lower bounds, upper bounds, inequalities
    pulls: tuple[Tensor, Tensor]  # of bounds, of inequalities
    violated: Tensor  # of the equalities, relative: one for each problem
    left: Tensor  # of all equations, relative: one for each problem
    size: Tensor

    @staticmethod
    def of(at: Functions, x: Tensor, multipliers: Multipliers) -> "ActiveSet":
        """At a point."""
        size = _size(x, at)
        probe = firm_probe(x.shape[1], x)
        gradient, hessian = linearised(lambda x: at.gradient(x, multipliers), x)
        values, matrix = constraints_at(at, x)
        of_constraints = (torch.cat([x[:, :0], *multipliers.values()], 1)[:, None] @ matrix)[:, 0]
        plain = gradient + of_constraints
        # A product with the second derivative is one with its transpose.
        change = hessian(size * probe)
        unit = _positive(change.abs() + plain.abs() + of_constraints.abs())
        pull = gradient / unit
        coupling = hessian(probe / unit)
        variation = _positive((matrix.abs() * size[:, None]).sum(2))
        by_rows = matrix * (firm_probe(matrix.shape[1], x) / variation)[:, :, None]
        coupling = coupling.abs() + by_rows.sum(1).abs()
        eps = float(torch.finfo(x.dtype).eps)
        size = kkt.natural_size(
            torch, size, coupling, torch.maximum(_largest(size)[:, None], at.way), eps
        )
        below, above = (x - at.lower) / size, (at.upper - x) / size
        lower, upper = kkt.pair(torch, below, pull, eps), kkt.pair(torch, above, -pull, eps)
        left = [lower.left, upper.left]
        nothing = x[:, :0]
        violated, gap, force, inequality = nothing, nothing, nothing, None
        matrix = matrix.abs()
        variation = _positive((matrix * size[:, None]).sum(2))
        weight = _largest(matrix / unit[:, None])
        start = 0
        for name, value in values.items():
            part = slice(start, start + value.shape[1])
            start = part.stop
            if name == "equality":
                violated = (value / variation[:, part]).abs()
                left.append(violated)
            else:
                gap, force = value / variation[:, part], multipliers[name] * weight[:, part]
                inequality = kkt.pair(torch, gap, force, eps)
                left.append(torch.where(inequality.active, gap, force).abs())
        return ActiveSet(
            lower,
            upper,
            inequality,
            (below, above, gap),
            (pull, force),
            _largest(violated),
            _largest(torch.cat(left, 1)),
            size,
        )

    def certain(self, fixed: Tensor) -> Tensor:
        """The least certain of all decisions of each problem."""
        sides = [torch.where(fixed, torch.inf, p.certain) for p in (self.lower, self.upper)]
        if self.inequality is not None:
            sides.append(self.inequality.certain)
        return -_largest(-torch.cat(sides, 1), least=-math.inf)


def system_at(
    at: Functions,
    x: Tensor,
    multipliers: Multipliers,
    *,
    eps: float,
    one_sided: bool,
    check: bool,
    nan: bool,
    to_bounds: bool,
) -> Tensor:
    """F at x and its multipliers; NaN where a problem is degenerate. `nan`: the derivative is NaN
    there too, also with respect to what only the other decision would read. `to_bounds`: the
    distance that x keeps from an active bound counts."""
    gradient = at.gradient(x, multipliers)
    with torch.no_grad():
        fixed = {name: m.detach() for name, m in multipliers.items()}
        active_set = ActiveSet.of(at, x.detach(), fixed)
        least = kkt.threshold(torch, active_set.left, eps)[:, None]

    def keeps(pair: Pair) -> Tensor:
        active: Tensor = (pair.active | (pair.certain <= least)) if one_sided else pair.active
        return active

    # Of two sides that fix a component, the one that holds it.
    at_lower = torch.where(at.fixed, ~active_set.upper.active, keeps(active_set.lower))
    near = Limits.of(eps).certain
    spot = 0.0 if to_bounds else near
    below, above = (
        kkt.on_the_spot(torch, x - bound, (x - bound).detach(), gap.abs() <= spot)
        for bound, gap in zip((at.lower, at.upper), active_set.gaps, strict=False)
    )
    rows = [torch.where(at_lower, below, torch.where(keeps(active_set.upper), above, gradient))]
    for name, constraint in at.constraints.items():
        value = constraint(x)
        if name == "inequality" and active_set.inequality is not None:
            m = multipliers[name]
            zero = kkt.on_the_spot(torch, m, m.detach(), active_set.pulls[1] > kkt.WRONG)
            value = torch.where(keeps(active_set.inequality), value, zero)
        rows.append(value)
    f = torch.cat(rows, 1)
    if check:
        refused = kkt.are_crossed(at.lower, at.upper, active_set.size, near).any(1, keepdim=True)
        if not one_sided:
            refused = refused | (active_set.certain(at.fixed)[:, None] <= least)
        # Added, so that a refusal is not a constant: its derivative is NaN too.
        lost = torch.zeros_like(f).masked_fill(refused, torch.nan)
        if nan:
            sides = (torch.where(b.isfinite(), b, 0) for b in (at.lower, at.upper))
            lost = lost * sum(sides, gradient).sum(1, keepdim=True)
        f = f + lost
    return f


def multipliers_at(at: Functions, x: Tensor) -> Multipliers:
    """The multipliers that follow from stationarity."""
    if not at.constraints:
        return {}
    size = _size(x, at)
    gap = torch.minimum((x - at.lower).abs(), (at.upper - x).abs()) / size
    weight = size * kkt.saturated(torch, gap)
    values, matrix = constraints_at(at, x)
    rows = _positive((matrix.abs() * size[:, None]).sum(2))
    system = (matrix * weight[:, None] / rows[:, :, None]).mT
    right = weight * at.gradient(x, {}).detach()
    if "inequality" in values:
        k = values["inequality"].shape[1]
        slack = kkt.saturated(torch, values["inequality"] / rows[:, rows.shape[1] - k :])
        pad = slack.new_zeros(len(x), k, rows.shape[1] - k)
        system = torch.cat([system, torch.cat([pad, torch.diag_embed(slack)], 2)], 1)
        right = torch.cat([right, torch.zeros_like(slack)], 1)
    finite = torch.isfinite(system).all(2).all(1)[:, None, None]  # else NaN, which is refused
    system = torch.where(finite, system, 0)
    right = torch.where(finite[:, 0], right, torch.nan)
    solution = (torch.linalg.pinv(system) @ right[..., None])[..., 0] / rows
    sizes = [value.shape[1] for value in values.values()]
    return dict(zip(values, torch.split(solution, sizes, 1), strict=True))


def constraints_at(at: Functions, x: Tensor) -> tuple[Multipliers, Tensor]:
    """The values of the constraints, and their Jacobian, Float[Tensor, "problems constraints n"]:
    constants."""
    values, rows = {}, []
    for name, constraint in at.constraints.items():
        value, pulled = linearised(constraint, x)
        values[name] = value
        for i in range(value.shape[1]):
            unit = torch.zeros_like(value)
            unit[:, i] = 1
            rows.append(pulled(unit))
    return values, torch.stack(rows, 1) if rows else x[:, None, :][:, :0]


def _size(x: Tensor, at: Functions) -> Tensor:
    """The sizes of the components, also where one happens to be zero."""
    eps = float(torch.finfo(x.dtype).eps)
    least = kkt.least_size(at.way, eps)
    farthest = kkt.reach(torch, torch.maximum(_largest(x.abs())[:, None], least), eps)
    ends = [torch.where(b.abs() <= farthest, b.abs(), 0) for b in (at.lower, at.upper)]
    largest = torch.maximum(x.abs(), torch.maximum(*ends))
    share = torch.maximum(1e-3 * _largest(largest)[:, None], least)
    return _positive(torch.maximum(largest, share))


def _positive(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, 1)


def _largest(parts: Tensor, least: float = 0.0) -> Tensor:
    """Along the last axis, where there may be nothing."""
    return torch.cat([parts.new_full((*parts.shape[:-1], 1), least), parts], -1).amax(-1)
