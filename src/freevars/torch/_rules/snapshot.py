"""Constants as they were when F was recorded.

A loop over solves that fills one buffer anew each time is a common program, and the graph of F
saves that buffer by reference. Inside `constants_as_they_are`, what the graph saves of a small
constant is a copy. Everything else is saved as PyTorch does: if it has been changed in place when
it is needed, that is an error.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from freevars.torch._compat import storage_key, version_of

__all__ = ["constants_as_they_are"]

# Up to so many numbers a copy costs no more than the bookkeeping around it.
_SMALL = 2**16


def constants_as_they_are(constants: Iterable[Tensor]) -> AbstractContextManager[Any]:
    small = {storage_key(t) for t in constants if not t.requires_grad and t.numel() <= _SMALL}
    if not small:
        return nullcontext()

    def pack(t: Tensor) -> tuple[Tensor, int]:
        if not t.requires_grad and t.numel() <= _SMALL and storage_key(t) in small:
            t = t.detach().clone()
        return t, version_of(t)

    def unpack(saved: tuple[Tensor, int]) -> Tensor:
        t, version = saved
        if version_of(t) != version:  # PyTorch leaves this check to whoever packs
            message = (
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{t.type()} {list(t.shape)}] is at version {version_of(t)}; "
                f"expected version {version} instead."
            )
            raise RuntimeError(message)
        return t

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
