"""Constants as they were when F was recorded.

Programs often fill one buffer anew for each of many solves, and the graph of F saves that buffer by
reference. Inside `constants_as_they_are`, the function reads a copy of each small constant.
Everything else is saved as usual in PyTorch: if it has been changed in place by the time it is
needed, that is an error. (Hooks for saved tensors would copy less, but no torch.func transform runs
inside them.)
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from freevars.torch._convert.operators import may_carry_derivative
from freevars.torch._convert.substitution import SubstitutionMode
from freevars.torch._modes import resolve

__all__ = ["constants_as_they_are"]

# Up to so many numbers a copy costs no more than the bookkeeping around it.
_SMALL = 2**16


def constants_as_they_are(
    fun: Callable[..., Any], constants: Iterable[Tensor]
) -> AbstractContextManager[Any]:
    """`fun`, run inside, reads copies of those of `constants` that are small."""
    copies = {id(t): t.detach().clone() for t in constants if _is_small(t)}
    return SubstitutionMode(fun, copies).reraising_refusals() if copies else nullcontext()


def _is_small(t: Tensor) -> bool:
    # Within another conversion, what that gives may carry a derivative.
    return t.numel() <= _SMALL and resolve(t) is t and not may_carry_derivative(t)
