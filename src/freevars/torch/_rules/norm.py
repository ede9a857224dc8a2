"""The Euclidean norm in the whole range of a dtype."""

import torch
from torch import Tensor

__all__ = ["norm"]


def norm(v: Tensor) -> Tensor:
    """Float[..., 1] of Float[..., n], also where squares of its numbers are infinite or 0."""
    scale = torch.ones((*v.shape[:-1], 1), dtype=v.abs().dtype, device=v.device)
    if v.shape[-1]:
        largest = v.abs().amax(-1, keepdim=True)
        scale = torch.where((largest > 0) & torch.isfinite(largest), largest, scale)
    length: Tensor = torch.linalg.vector_norm(v / scale, dim=-1, keepdim=True)
    return scale * length
