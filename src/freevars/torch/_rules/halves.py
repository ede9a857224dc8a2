"""How well a solver integrates a derivative: its integral against the sum over both halves.

`freevars._solvers.integration` explains the comparison. Not here: the derivative (`integral`), and
what is done about one that is not good (`integrator`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from freevars._solvers.integration import SAMPLES
from freevars.torch._rules.vectors import firm_probe

__all__ = ["difference", "direction"]


def direction(v: Tensor) -> Tensor:
    """Of a vector: entries of both signs, relative to what they are."""
    return (firm_probe(v.numel(), v) * torch.where(v != 0, v.abs(), 1)).detach()


def difference(
    integrate: Callable[[Tensor, Tensor], Sequence[Tensor]],
    integrand: Callable[[Tensor], Sequence[Tensor]],
    ends: tuple[Tensor, Tensor],
    whole: Sequence[Tensor],
) -> Tensor:
    """How far the sum over both halves is from the integral over the whole; relative, a constant.

    Args:
        integrate: from limits to the integral, as a list of tensors.
        integrand: of a point, as such a list.
        ends: the limits. Where one is infinite there is no half, and nothing is compared.
        whole: the integral between them.
    """
    a, b = (end.detach() for end in ends)
    finite = torch.isfinite(a) & torch.isfinite(b)
    low, high = torch.where(finite, a, 0), torch.where(finite, b, 0)
    middle = low + (high - low) / 2
    halves = [integrate(low, middle), integrate(middle, high)]
    points = [low + (high - low) * (i + 0.3) / SAMPLES for i in range(SAMPLES)]
    samples = zip(*(integrand(t) for t in points), strict=True)
    gaps = [torch.zeros_like(low)]
    for one, first, second, between in zip(whole, *halves, samples, strict=True):
        average = torch.stack([part.detach().abs() for part in between]).mean(0)
        size = torch.maximum(one.detach().abs(), first.detach().abs() + second.detach().abs())
        size = torch.maximum(size, average.to(size.dtype) * (high - low).abs())
        if size.numel():
            size = torch.maximum(size, torch.finfo(size.dtype).eps ** 0.5 * size.amax())
            gap = (one - first - second).detach().abs() / torch.where(size > 0, size, 1)
            gaps.append(gap.amax().to(low.dtype))
    return torch.where(finite, torch.stack(gaps).amax(), 0)
