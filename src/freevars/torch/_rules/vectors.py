"""Vectors without a pattern, and the norm in the whole range of a dtype."""

import torch
from torch import Tensor

__all__ = ["firm_probe", "norm"]


def firm_probe(n: int, like: Tensor) -> Tensor:
    """Fixed entries of both signs, between 1/2 and 1 in size, for what is measured component by
    component: one that happens to be small would hide its own."""
    wave = torch.cos(torch.arange(1, n + 1, dtype=like.dtype, device=like.device) ** 2)
    return (wave + wave.sign()) / 2


def norm(v: Tensor) -> Tensor:
    """Float[..., 1] of Float[..., n], also where squares of its numbers are infinite or 0."""
    sizes = v.abs()
    scale = sizes.new_ones((*v.shape[:-1], 1))
    if v.shape[-1]:
        largest = sizes.amax(-1, keepdim=True)
        scale = torch.where((largest > 0) & torch.isfinite(largest), largest, scale)
    length: Tensor = torch.linalg.vector_norm(v / scale, dim=-1, keepdim=True)
    return scale * length
