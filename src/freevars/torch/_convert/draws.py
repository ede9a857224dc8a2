"""The random numbers of one run of a function: drawn again by each later run, or left behind as
that run left them.

Not here: noticing that a function draws (`discovery.py`).
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Draws", "state_of"]

_NOTHING = nullcontext()

State = tuple[torch.Generator | None, Tensor]  # None: PyTorch's own generator of the CPU


class Draws(NamedTuple):
    """The generators that a run drew from, as they stood before it and after it."""

    before: tuple[State, ...] = ()
    after: tuple[State, ...] = ()

    def __bool__(self) -> bool:
        """Whether it drew from any."""
        return bool(self.before)

    @staticmethod
    def since(before: Iterable[State]) -> "Draws":
        """The run that is just over, which began with the generators as `before` says."""
        before = tuple(before)
        return Draws(before, _states(g for g, _ in before))

    def replayed(self) -> AbstractContextManager[None]:
        """Inside, the same numbers are drawn; afterwards the generators stand as they stood."""
        return self._replayed() if self.before else _NOTHING

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        outside = _states(g for g, _ in self.before)
        _restore(self.before)
        try:
            yield
        finally:
            _restore(outside)

    def take_back(self) -> None:
        """As if the run had not been."""
        _restore(self.before)

    def advance(self) -> None:
        """The generators move on as the run moved them, unless somebody drew from them since."""
        for (generator, before), (_, after) in zip(self.before, self.after, strict=True):
            if torch.equal(state_of(generator)[1], before):
                _restore([(generator, after)])


def state_of(generator: torch.Generator | None) -> State:
    """Not the CPU's generator itself: it cannot be copied to another process, and need not."""
    return generator, (generator or torch.default_generator).get_state()


def _states(generators: Iterable[torch.Generator | None]) -> tuple[State, ...]:
    return tuple(state_of(g) for g in generators)


def _restore(states: Iterable[State]) -> None:
    for generator, state in states:
        (generator or torch.default_generator).set_state(state)
