"""A vector without a pattern, for what is measured component by component."""

import torch
from torch import Tensor

__all__ = ["firm_probe"]


def firm_probe(n: int, like: Tensor) -> Tensor:
    """Fixed entries of both signs, between 1/2 and 1 in size: one that happens to be small would
    hide its component."""
    wave = torch.cos(torch.arange(1, n + 1, dtype=like.dtype, device=like.device) ** 2)
    return (wave + wave.sign()) / 2
