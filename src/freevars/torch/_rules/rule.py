"""What is stated when a solver is decorated. Not here: what follows from it (`condition.py`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from freevars._solvers.verdict import Kind
from freevars.torch._rules.system import LinearSolve

__all__ = ["Kind", "OnFailure", "Rng", "Rule"]

OnFailure = Literal["raise", "nan", "least_squares"]
Rng = Literal["replay", "allow", "error"]


@dataclass(frozen=True)
class Rule:
    """The options of a decorator, and the solver."""

    kind: Kind
    solver: Callable[..., Any]
    name: str
    has_aux: bool = False
    linear_solve: LinearSolve | None = None
    on_failure: OnFailure = "raise"
    check: bool = True
    tol: float | None = None
    polish: bool = False
    conserved: Callable[[Any], Any] | None = None
    batch_dims: int = 0
    rng: Rng = "replay"
    one_sided: bool = False
    # Of kind "implicit": condition(fun, x), and what `fun` takes.
    stated: tuple[Callable[..., Any] | None, Callable[[Any], Any] | None] = (None, None)

    def __post_init__(self) -> None:
        if isinstance(self.batch_dims, bool) or not self.batch_dims >= 0:
            message = f"batch_dims: expected a number of axes, got {self.batch_dims!r}."
            raise ValueError(message)
