"""A complex tensor as pairs of real numbers along a last axis, and back.

`torch.view_as_real` and `torch.view_as_complex` want even offsets and strides, the first one in its
backward pass too: beside real numbers in one vector there are none.
"""

import torch
from torch import Tensor

__all__ = ["as_complex", "as_real"]


def as_real(t: Tensor) -> Tensor:
    """Float[..., 2] of a complex tensor; a real one as it is."""
    if not t.is_complex():
        return t
    t = t.resolve_conj()  # the imaginary part would be a view that vmap has no rule for
    return torch.stack([t.real, t.imag], dim=-1)


def as_complex(pairs: Tensor) -> Tensor:
    """Complex[...] of Float[..., 2]."""
    return torch.complex(*pairs.unbind(-1))
