"""What is evaluated again is compared with what was recorded when the solver returned: F bit for
bit, a derivative up to rounding.

Not here: when something is evaluated again (`condition.py`, `record.py`).
"""

import torch
from torch import Tensor

from freevars.errors import NotASolutionError
from freevars.torch._rules.norm import norm

__all__ = ["compare", "compare_derivatives"]


def compare(now: Tensor, recorded: Tensor, name: str) -> None:
    """Refuses an F that is not bit for bit what was recorded, 0.0 and -0.0 apart; `name` is that of
    the solver."""
    equal = _equal_bits(now, recorded)
    if bool(equal.all()):
        return
    k = int((~equal).reshape(-1).nonzero()[0])
    was, is_now = (repr(float(t.reshape(-1)[k])) for t in (recorded, now))
    raise _changed(f"component {k} of what should be zero was {was} then and is {is_now}", name)


def compare_derivatives(now: Tensor, recorded: Tensor, dtype: torch.dtype, name: str) -> None:
    """Refuses a derivative that is not what was recorded, but for rounding; `dtype` is that of the
    unknown."""
    change, size, after = (float(norm(t.reshape(-1))) for t in (now - recorded, recorded, now))
    eps = float(torch.finfo(dtype).eps)
    if not change <= eps**0.5 * max(size, after):
        raise _changed(f"a derivative of norm {size:.3e} then has changed by {change:.3e}", name)


def _changed(what: str, name: str) -> NotASolutionError:
    return NotASolutionError(
        f"{name}: expected the function as it was when the solver returned: this "
        "derivative (a higher order, forward mode, torch.func) evaluates it again. At the "
        f"solution, {what} now. What the function reads was changed in between: a tensor in "
        "place, a variable, an attribute, a module's mode, a random generator. Take the "
        "derivative before that, or capture a copy."
    )


def _equal_bits(a: Tensor, b: Tensor) -> Tensor:
    equal = (a == b) & (a.signbit() == b.signbit())
    return equal | (a.isnan() & b.isnan())
