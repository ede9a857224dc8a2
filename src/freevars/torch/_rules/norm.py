"""The Euclidean norm in the whole range of a dtype."""

import torch
from torch import Tensor

__all__ = ["norm"]


def norm(v: Tensor) -> Tensor:
    """Float[..., 1] of Float[..., n], also where squares of its numbers are infinite or 0."""
    sizes = v.abs()
    scale = sizes.new_ones((*v.shape[:-1], 1))
    if v.shape[-1]:
        largest = sizes.amax(-1, keepdim=True)
        scale = torch.where((largest > 0) & torch.isfinite(largest), largest, scale)
    length: Tensor = torch.linalg.vector_norm(v / scale, dim=-1, keepdim=True)
    return scale * length
