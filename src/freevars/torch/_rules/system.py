"""What a method for linear systems has to offer, and how a user gives one of their own.

Not here: the methods (`dense.py`, `iterative.py`), and which is taken (`linear.py`).
"""

from collections.abc import Callable, Hashable
from typing import Any, Protocol

from torch import Tensor

from freevars._solvers.verdict import Limits
from freevars.torch._rules.closer import Inputs
from freevars.torch._rules.derivative import Derivative
from freevars.torch._rules.diagnostics import Figures
from freevars.torch._rules.sizes import Sizes

__all__ = ["LinearSolve", "System", "check_linear_solve"]

LinearSolve = Callable[[Any, Tensor], Tensor]  # (LinearOperator, b) -> u, real vectors


def check_linear_solve(linear_solve: object) -> None:
    """Refuses what is no function `solve(operator, b)`."""
    if linear_solve is not None and (isinstance(linear_solve, type) or not callable(linear_solve)):
        message = (
            f"linear_solve: expected None or a function solve(operator, b), got {linear_solve!r}."
        )
        raise TypeError(message)


class System(Protocol):
    """A u = b, or its transpose, for any b: Float[Tensor, "... problems n"]."""

    @property
    def evidence(self) -> Hashable:
        """What figures rest on by now: those from before another one are out of date."""

    @property
    def residual(self) -> float:
        """What was left of the vectors solved for last, relative, where that is too much."""

    def solve(self, b: Tensor, *, transposed: bool) -> Tensor: ...

    def figures(
        self, derivative: Derivative, sizes: Sizes, limits: Limits, inputs: Inputs
    ) -> Figures:
        """To trust what was solved for last."""

    def newton_step(self) -> Tensor:
        """A^-1 F."""
