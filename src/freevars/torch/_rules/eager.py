"""The base of this host's decorated solvers, which run eagerly inside a compiled program.

Not here: what a call does (`solver.py`, `integrator.py`).
"""

from typing import ParamSpec, TypeVar

from freevars._solvers.decorated import DecoratedSolver
from freevars.torch import _compat

__all__ = ["EagerSolver"]

P = ParamSpec("P")
R = TypeVar("R")


class EagerSolver(DecoratedSolver[P, R]):
    """What all decorated solvers have in common here."""

    @_compat.uncompiled
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return super().__call__(*args, **kwargs)
