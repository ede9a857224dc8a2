"""How large the components of a solution are: what a Newton step is measured against.

A component counts by its own size, wherever the solver came from: the derivative of the root of
x^2 = a is off by as much as x is, relative. Two kinds of components are all error, and count by how
far the solver came with them:

- one that is zero. Newton's iterate tells: x - s is zero, up to rounding and up to what the
  curvature of F adds along the step, s2 = A^-1 F''[s, s] / 2, which must itself be small next to s;
- one that F does not see, since it rounds more than that: a change h of x by a part is not what
  A^-1 (F(x) - F(x - h)) gives back.

F'' comes from what was recorded, and so does F nearby, where x is tiny next to the way: what it
gives back tells how much F rounds. Nothing is evaluated again.

Not here: the measure itself (`dense.py`, `linear.py`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from freevars.torch._rules.derivative import Derivative

__all__ = ["PARTS", "Sizes", "all_error"]

# Of x; so far F is straight where Newton's method works. One number alone may round well by chance.
PARTS = (1 / 16, 1 / 11, 1 / 7)

_SECOND = 0.02  # s2 next to s, as in `freevars._solvers.verdict`


class Sizes(NamedTuple):
    """Of each component of an unknown, Float[Tensor, "problems n"]."""

    x: Tensor
    near: Tensor  # how large it is
    far: Tensor  # or how far the solver came with it, the larger
    # the same of the tensor that it belongs to, in given units (None: as it is)
    by_leaf: Callable[[Tensor | None], tuple[Tensor, Tensor]]
    nearby: Callable[[], Sequence[Tensor]]  # F at x - h for each of `PARTS`, where it is known


def all_error(
    sizes: Sizes,
    derivative: Derivative,
    step: Tensor,
    rounding: Tensor,
    inverse: Callable[[Tensor], Tensor],
) -> Tensor:
    """Which components of a solution are all error, as Bool[Tensor, "problems n"].

    `rounding` is what a relative error of 1 in the terms of F moves x by; `inverse` applies A^-1.
    """
    x = sizes.x.to(step.dtype)
    f = derivative.f.detach().to(x.dtype)
    blurred = torch.zeros_like(x, dtype=torch.bool)
    noise = 4 * torch.finfo(x.dtype).eps * (rounding + x.abs())
    try:
        bend = inverse(derivative.curvature(x) / 2)  # by x; with the square of the part
        after = inverse(derivative.curvature(step) / 2).abs()
    except RuntimeError:  # what PyTorch cannot differentiate three times
        bend = torch.zeros_like(x)
        after = torch.full_like(x, torch.inf)
    for part, nearby in zip(PARTS, sizes.nearby(), strict=False):
        h = part * x
        error = (inverse(f - nearby.to(x.dtype)) - h + part**2 * bend).abs()
        blurred |= (h != 0) & (error >= h.abs() / 2)
        noise = torch.maximum(noise, 4 * error)
    straight = after <= _SECOND * step.abs()
    return blurred | (straight & ((x - step).abs() <= noise + 2 * after))
