"""A closer look at a Newton step that is not small next to the solution.

`freevars._solvers.verdict` defines the criteria. A component is measured by its own size, wherever
the solver started: the relative error of the derivative of the root of x^2 = a is that of x. Two
kinds of components are nothing but error, and are measured by how far the solver moved them:

- one that is zero. Newton's iterate tells: x - s is zero, up to rounding and up to what the
  curvature of F adds along the step, s2 = A^-1 F''[s, s] / 2, which must itself be small next to s;
- one that F does not see, since it rounds more than that: a change h of x by a part is not what
  A^-1 (F(x) - F(x - h)) gives back.

A step that is short, not next to nothing, is good where the derivative is the same along it. That
of x along s is where s2 is small next to s. That of what the solution is differentiated by,
y = -A^-1 F_t p, changes by A^-1 (F_xx[s] y + F_xt[s] p), to first order; it is compared in a few
directions p, each of which changes every entry of t relative to itself, and a component counts
relative to the largest that it is in these.

F'' comes from the recorded graph, and so does F nearby, where x is tiny next to how far the solver
moved it: that shows how much F rounds. The user's function is not run again. (The JAX host
evaluates F at both ends of the step instead of F''.) A graph that cannot be differentiated three
times leaves the question open, and so does one whose derivatives may be silently wrong: one with
custom Functions, or with hooks of captured tensors, which must not run for a check either.

Not here: the measure of a step itself (`dense.py`, `iterative.py`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from freevars._solvers.verdict import Limits
from freevars.torch import _compat
from freevars.torch._convert.autograd_graph import has_custom_functions
from freevars.torch._rules.derivative import Derivative
from freevars.torch._rules.diagnostics import units
from freevars.torch._rules.sizes import PARTS, Sizes

__all__ = ["Inputs", "look", "relative"]

# F with a graph also to the tensors that it is differentiated by; these; and whether they are just
# these, or all that it may be differentiated by, as within a transform.
Inputs = Callable[[], tuple[Derivative, Sequence[Tensor], bool]]

Inverse = Callable[[Tensor], Tensor]


def look(
    derivative: Derivative,
    inputs: Inputs,
    sizes: Sizes,
    step: Tensor,
    rounding: Tensor,
    inverse: Inverse,
    measure: Callable[[Tensor, Tensor], Tensor],
    limits: Limits,
    *,
    directions: int,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """The size of a step, and the change of the derivative along it, relative; infinite where that
    cannot be known and the step is not certain to be small: two Float[Tensor, "problems"].

    Args:
        derivative: A.
        inputs: what the solution is differentiated by.
        sizes: those of the unknown.
        step: s.
        rounding: what a relative error of 1 in the terms of F moves x by.
        inverse: applies A^-1.
        measure: `measure(v, error)` is the size of a change v of x, where the components in which
            `error` holds count by how far the solver came.
        limits: of the verdict.
        directions: in how many the derivative is compared.
        floor: a component of y counts as this at least, relative to the largest one.
    """
    bend = _second_step(derivative, step, inverse)
    error = _all_error(derivative, sizes, step, bend, rounding, inverse, limits)
    size = measure(step, error)
    zero = torch.zeros_like(size)
    asked = (size > limits.negligible) & (size <= limits.step)
    if not bool(asked.any()):
        return size, zero
    change = None
    if bend is not None:
        change = _change_along(inputs, sizes, step, inverse, directions=directions, floor=floor)
    if bend is None or change is None:
        asked &= size > limits.certain
        return size, torch.where(asked, torch.inf, zero)
    return size, torch.where(asked, torch.maximum(measure(bend, error) / size, change), zero)


def _second_step(derivative: Derivative, step: Tensor, inverse: Inverse) -> Tensor | None:
    """s2 of a step s; None where PyTorch cannot differentiate F three times."""
    try:
        return inverse(derivative.curvature(step) / 2)
    except RuntimeError:
        return None


def _all_error(
    derivative: Derivative,
    sizes: Sizes,
    step: Tensor,
    bend: Tensor | None,
    rounding: Tensor,
    inverse: Inverse,
    limits: Limits,
) -> Tensor:
    """Which components of a solution are all error, as Bool[Tensor, "problems n"]; `bend` is s2."""
    x = sizes.x.to(step.dtype)
    f = derivative.f.detach().to(x.dtype)
    blurred = torch.zeros_like(x, dtype=torch.bool)
    noise = 4 * torch.finfo(x.dtype).eps * (rounding + x.abs())
    nearby = sizes.nearby()
    of_x = _second_step(derivative, x, inverse) if nearby else None
    for part, there in zip(PARTS, nearby, strict=False):
        h = part * x
        error = inverse(f - there.to(x.dtype)) - h
        error = (error if of_x is None else error + part**2 * of_x).abs()
        blurred |= (h != 0) & (error >= h.abs() / 2)
        noise = torch.maximum(noise, 4 * error)
    if bend is None:
        return blurred
    straight = bend.abs() <= limits.change * step.abs()
    return blurred | (straight & ((x - step).abs() <= noise + 2 * bend.abs()))


def _change_along(
    inputs: Inputs,
    sizes: Sizes,
    step: Tensor,
    inverse: Inverse,
    *,
    directions: int,
    floor: float,
) -> Tensor | None:
    """By how much the derivative changes along a step, relative: Float[Tensor, "problems"]; None
    where that cannot be known."""
    derivative, by, _ = inputs()
    if any(map(_compat.has_hooks, by)):
        return None
    if has_custom_functions(derivative.f, [derivative.at, *by]):
        return None
    eps = float(torch.finfo(step.dtype).eps)
    wide = units(torch.maximum(sizes.near, eps**0.5 * sizes.far)).to(step.dtype)
    largest, moved = torch.zeros_like(step), torch.zeros_like(step)
    try:
        for number in range(directions):
            dots = [relative(t, number * len(by) + k) for k, t in enumerate(by)]
            still, _ = derivative.along(torch.zeros_like(derivative.at), by, dots, None)
            y = -inverse(still.to(step.dtype))
            _, change = derivative.along(y.to(derivative.at.dtype), by, dots, step)
            largest = torch.maximum(largest, y.abs())
            moved = torch.maximum(moved, inverse(change.to(step.dtype)).abs())
    except RuntimeError:  # what PyTorch cannot differentiate three times
        return None
    least = floor * (largest / wide).amax(1, keepdim=True) * wide
    unit = torch.maximum(largest, least)
    return torch.where(moved == 0, 0, moved / unit).amax(1)


def relative(t: Tensor, seed: int) -> Tensor:
    """A direction that changes the entries of a tensor relative to what they are."""
    t = t.detach()
    size = t.abs() if bool((t != 0).any()) else torch.ones_like(t.abs())
    generator = torch.Generator().manual_seed(seed)
    shape = (*t.shape, 2) if t.is_complex() else t.shape
    part = (2 * torch.rand(shape, generator=generator) - 1).to(size)
    part = torch.view_as_complex(part) if t.is_complex() else part
    return torch.where(torch.isfinite(t), part * size, 0)
