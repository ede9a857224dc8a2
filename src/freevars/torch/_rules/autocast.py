"""Restore the forward pass's autocast in a backward pass that runs a function again."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Self

import torch
from torch import Tensor

__all__ = ["Autocast"]


class Autocast(NamedTuple):
    """For each type of device: whether it is on, and for which dtype."""

    states: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, tensors: Iterable[Tensor]) -> Self:
        """For the devices of these tensors."""
        return cls._of({t.device.type for t in tensors})

    @classmethod
    def _of(cls, kinds: Iterable[str]) -> Self:
        known = filter(torch.amp.is_autocast_available, sorted(kinds))
        enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
        return cls(tuple((kind, enabled(kind), dtype(kind)) for kind in known))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, autocast is restored."""
        now = self._of(kind for kind, _, _ in self.states)
        with ExitStack() as stack:
            for kind, enabled, dtype in self.states if now != self else ():
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield
