"""A closer look at a Newton step that is not small next to the solution.

`freevars._solvers.verdict` says what is asked. A component counts by its own size, wherever the
solver came from: the derivative of the root of x^2 = a is off by as much as x is, relative. Two
kinds of components are all error, and count by how far the solver came with them:

- one that is zero. Newton's iterate tells: x - s is zero, up to rounding and up to what the
  curvature of F adds along the step, s2 = A^-1 F''[s, s] / 2, which must itself be small next to s;
- one that F does not see, since it rounds more than that: a change h of x by a part is not what
  A^-1 (F(x) - F(x - h)) gives back.

A step that is short, not next to nothing, is good where the derivative is the same along it. That
of x along s is where s2 is small next to s. That of what the solution is differentiated by,
y = -A^-1 F_t p, changes by A^-1 (F_xx[s] y + F_xt[s] p), to first order; it is compared in a few
directions p, each of which changes every entry of t relative to itself, and a component counts
relative to the largest that it is in these.

F'' comes from what was recorded, and so does F nearby, where x is tiny next to the way: what it
gives back tells how much F rounds. The user's function is not run again. (The JAX host evaluates F
at both ends of the step in place of F''.) A graph that cannot be differentiated three times, or
that may do so wrongly without a word, as one with a custom Function, leaves the question open.

Not here: the measure of a step itself (`dense.py`, `linear.py`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from freevars.torch._convert.autograd_graph import has_custom_functions
from freevars.torch._rules.derivative import Derivative
from freevars.torch._rules.diagnostics import units
from freevars.torch._rules.sizes import PARTS, Sizes

__all__ = ["Inputs", "all_error", "change_along", "second_step"]

_SECOND = 0.02  # s2 next to s, as in `freevars._solvers.verdict`

# F with a graph also to the tensors that it is differentiated by, and these.
Inputs = Callable[[], tuple[Derivative, Sequence[Tensor]]]

Inverse = Callable[[Tensor], Tensor]


def second_step(derivative: Derivative, step: Tensor, inverse: Inverse) -> Tensor:
    """s2 of a step s, infinite where PyTorch cannot differentiate F three times."""
    try:
        return inverse(derivative.curvature(step) / 2)
    except RuntimeError:
        return torch.full_like(step, torch.inf)


def all_error(
    sizes: Sizes, derivative: Derivative, step: Tensor, rounding: Tensor, inverse: Inverse
) -> Tensor:
    """Which components of a solution are all error, as Bool[Tensor, "problems n"].

    `rounding` is what a relative error of 1 in the terms of F moves x by; `inverse` applies A^-1.
    """
    x = sizes.x.to(step.dtype)
    f = derivative.f.detach().to(x.dtype)
    blurred = torch.zeros_like(x, dtype=torch.bool)
    noise = 4 * torch.finfo(x.dtype).eps * (rounding + x.abs())
    bend = second_step(derivative, x, inverse)  # by x; with the square of the part
    bend = torch.where(torch.isinf(bend), 0, bend)
    after = second_step(derivative, step, inverse).abs()
    for part, nearby in zip(PARTS, sizes.nearby(), strict=False):
        h = part * x
        error = (inverse(f - nearby.to(x.dtype)) - h + part**2 * bend).abs()
        blurred |= (h != 0) & (error >= h.abs() / 2)
        noise = torch.maximum(noise, 4 * error)
    straight = after <= _SECOND * step.abs()
    return blurred | (straight & ((x - step).abs() <= noise + 2 * after))


def change_along(
    inputs: Inputs,
    sizes: Sizes,
    step: Tensor,
    inverse: Inverse,
    *,
    directions: int,
    floor: float,
) -> Tensor:
    """By how much the derivative changes along a step, relative: Float[Tensor, "problems"],
    infinite where that cannot be known.

    Args:
        inputs: what the solution is differentiated by.
        sizes: those of the unknown.
        step: s.
        inverse: applies A^-1.
        directions: in how many the derivative is compared.
        floor: a component of y counts as this at least, relative to the largest one.
    """
    unknown = torch.full_like(step[:, 0], torch.inf)
    derivative, by = inputs()
    if has_custom_functions(derivative.f, [derivative.at, *by]):
        return unknown
    eps = float(torch.finfo(step.dtype).eps)
    wide = units(torch.maximum(sizes.near, eps**0.5 * sizes.far)).to(step.dtype)
    largest, moved = torch.zeros_like(step), torch.zeros_like(step)
    try:
        for number in range(directions):
            dots = [_relative(t, number * len(by) + k) for k, t in enumerate(by)]
            still, _ = derivative.along(torch.zeros_like(derivative.at), by, dots, None)
            y = -inverse(still.to(step.dtype))
            _, change = derivative.along(y.to(derivative.at.dtype), by, dots, step)
            largest = torch.maximum(largest, y.abs())
            moved = torch.maximum(moved, inverse(change.to(step.dtype)).abs())
    except RuntimeError:  # what PyTorch cannot differentiate three times
        return unknown
    least = floor * (largest / wide).amax(1, keepdim=True) * wide
    unit = torch.maximum(largest, least)
    return torch.where(moved == 0, 0, moved / unit).amax(1)


def _relative(t: Tensor, seed: int) -> Tensor:
    """A direction that changes the entries of a tensor relative to what they are."""
    t = t.detach()
    size = t.abs() if bool((t != 0).any()) else torch.ones_like(t)
    generator = torch.Generator().manual_seed(seed)
    part = (2 * torch.rand(t.shape, generator=generator) - 1).to(size)
    return torch.where(torch.isfinite(t), part * size, 0).to(t.dtype)
