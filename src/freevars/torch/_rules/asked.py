"""Compare what a function returned to a solver with what it returns when a derivative runs it
again.

The derivative of an integral or of a differential equation is another integral or equation, which
runs the same Python function again in the backward pass. If a loop variable, an attribute or a
module's mode has changed since, it would be the derivative of a different function.

Not here: comparing (`comparison.py`), and what runs again (`integral.py`, `adjoint.py`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from freevars.torch import _compat
from freevars.torch._rules.comparison import compare_values

__all__ = ["Asked"]

Point = tuple[Tensor, ...]


class Asked:
    """The first answer of a function, and the last two whose number is a power of two: few, and
    spread over the whole range. None where no derivative can follow, as within another one."""

    def __init__(self) -> None:
        self._wanted = torch.is_grad_enabled()
        self._count = 0
        self._answers: list[tuple[Point, list[Tensor]]] = []

    def note(self, point: Point, answer: Sequence[Tensor]) -> None:
        """One query of the solver, and the function's answer."""
        self._count += 1
        if not self._wanted or self._count & (self._count - 1):
            return
        if not all(map(_is_plain, (*point, *answer))):
            return
        if len(self._answers) > 2:  # noqa: PLR2004
            del self._answers[1]
        # Copies: the solver may write to both.
        copies = tuple(t.detach().clone() for t in point), [t.detach().clone() for t in answer]
        self._answers.append(copies)

    def note_if_none(self, ask: Callable[[], tuple[Point, Sequence[Tensor]]]) -> None:
        """Evaluate the function here, for a solver that only asked for many points at once, by
        `vmap`."""
        if self._wanted and not self._answers:
            self._count = 0
            self.note(*ask())

    def compare(self, fun: Callable[[Point], Sequence[Tensor]], name: str, what: str) -> None:
        """Refuses a function whose answers have changed; `name` is that of the solver."""
        with torch.no_grad():
            for point, before in self._answers:
                for now, then in zip(fun(point), before, strict=True):
                    if _is_plain(now):
                        compare_values(now, then, name, f"the {what} at t = {point[0].item():.6g}")


def _is_plain(t: Tensor) -> bool:
    return not _compat.is_wrapped(t)
