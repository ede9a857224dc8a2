"""Compare a second evaluation with what was recorded when the solver returned: F bit for bit,
derivatives and integrands up to rounding.

Not here: when something is evaluated again (`condition.py`, `record.py`).
"""

import math

import torch
from torch import Tensor

from freevars.errors import NotASolutionError
from freevars.torch._rules.sharded import whole
from freevars.torch._rules.vectors import norm

__all__ = ["compare", "compare_derivatives", "compare_values"]


def compare(now: Tensor, recorded: Tensor, name: str) -> None:
    """Refuses an F that is not bit for bit what was recorded, 0.0 and -0.0 apart; `name` is that of
    the solver."""
    equal = _equal_bits(now, recorded)
    if bool(equal.all()):
        return
    k = int((~equal).reshape(-1).nonzero()[0])
    was, is_now = (repr(float(t.reshape(-1)[k])) for t in (recorded, now))
    what = f"at the solution, component {k} of what should be zero was {was} then and is {is_now}"
    raise _changed(what, name)


def compare_derivatives(now: Tensor, recorded: Tensor, dtype: torch.dtype, name: str) -> None:
    """Refuses a derivative that is not what was recorded, but for rounding; `dtype` is that of the
    unknown."""
    given = map(whole, (now - recorded, recorded, now))
    change, size, after = (float(norm(t.reshape(-1))) for t in given)
    eps = float(torch.finfo(dtype).eps)
    if not change <= eps**0.5 * max(size, after):
        what = f"a derivative of norm {size:.3e} then has changed by {change:.3e}"
        raise _changed(f"at the solution, {what}", name)


def compare_values(now: Tensor, recorded: Tensor, name: str, what: str) -> None:
    """Refuses a value of an integrand or a field that is not what the solver was given, but for
    rounding."""
    if now.shape == recorded.shape:
        equal = (now == recorded) | (now.isnan() & recorded.isnan())
        if bool(equal.all()):
            return
        change, size = (float(norm(t.reshape(-1))) for t in (now - recorded, recorded))
        changed = f"{what}, of norm {size:.3e} then, has changed by {change:.3e}"
    else:
        change, size = math.inf, 1.0
        changed = f"{what}, of shape {list(recorded.shape)} then, has {list(now.shape)}"
    if not change <= torch.finfo(recorded.dtype).eps ** 0.5 * size:
        raise _changed(changed, name, "the derivative of an integral or a differential equation")


def _changed(
    what: str,
    name: str,
    derivative: str = "this derivative (a higher order, forward mode, torch.func)",
) -> NotASolutionError:
    return NotASolutionError(
        f"{name}: expected the function as it was when the solver returned: {derivative} evaluates "
        f"it again, and {what} now. What the function reads was changed in between: a tensor in "
        "place, a variable (of a loop, say), an attribute, a module's mode, a random generator. "
        "Take the derivative before that, or let the function have a copy of its own (a default "
        "argument, k=k)."
    )


def _equal_bits(a: Tensor, b: Tensor) -> Tensor:
    equal = (a == b) & (a.signbit() == b.signbit())
    return equal | (a.isnan() & b.isnan())
