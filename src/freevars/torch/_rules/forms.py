"""Tensors in the form in which a solver integrates them: a tuple, a vector, or number by number.

Not here: which form a solver takes (`freevars._solvers.integration`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from freevars.torch import _compat
from freevars.torch._rules.complex_pairs import as_complex, as_real

__all__ = ["Flat", "evaluated", "is_smooth", "shape_of"]


def shape_of(leaf: Any) -> Any:
    """The shape of a tensor or a real number; of anything else what it is."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape)
    if isinstance(leaf, int | float):
        return ()
    return None if leaf is None else type(leaf).__name__


class Flat:
    """A list of real and complex tensors as one real vector, and back; both are linear."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._like = [(tuple(t.shape), t.dtype) for t in like]
        self.dtype: torch.dtype = functools.reduce(
            torch.promote_types, [d.to_real() for _, d in self._like], torch.float32
        )
        self.eps = max((torch.finfo(d).eps for _, d in self._like), default=0.0)
        self._sizes = [math.prod(s) * (2 if d.is_complex else 1) for s, d in self._like]
        self.size = sum(self._sizes)

    def ravel(self, tensors: Sequence[Tensor], *, copy: bool = True) -> Tensor:
        """Float[n]; without `copy` it may be a view of one of them."""
        parts = []
        for t, (shape, dtype) in zip(tensors, self._like, strict=True):
            u = t if t.shape == shape else t.expand(shape)
            if dtype.is_complex:
                u = as_real(u.to(dtype))
            u = u if u.dim() == 1 else u.reshape(-1)
            parts.append(u if u.dtype is self.dtype else u.to(self.dtype))
        if len(parts) == 1 and not copy:
            return parts[0]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.dtype)

    def unravel(self, vector: Tensor) -> list[Tensor]:
        """Any axes in front of the vector's own stay in front."""
        lead, start, tensors = vector.shape[:-1], 0, []
        for (shape, dtype), n in zip(self._like, self._sizes, strict=True):
            part = vector if n == self.size else vector.narrow(-1, start, n)
            start += n
            if dtype.is_complex:
                part = as_complex(part.to(dtype.to_real()).reshape((*lead, *shape, 2)))
            else:
                part = part if part.dtype is dtype else part.to(dtype)
                part = part if len(shape) == 1 else part.reshape((*lead, *shape))
            tensors.append(part)
        return tensors


def is_smooth(t: Tensor) -> bool:
    """Whether a derivative by it can be asked for."""
    return t.is_floating_point() or t.is_complex()


def evaluated(fun: Callable[..., list[Tensor]], *at: Tensor) -> list[Tensor]:
    """`fun` where a solver asks for it, with a graph if the solver differentiates by that itself.

    Otherwise what `fun` does for derivatives of its own (`y.requires_grad_()`) stays inside it.
    """
    if _compat.functorch_active() or any(t.requires_grad for t in at):
        with torch.enable_grad():
            return fun(*at)
    with torch.no_grad():
        return [t.detach() for t in fun(*(t.detach() for t in at))]
