"""A NumPy integrator on the host, as `on_host` runs solvers.

A host solver finds an x like its x0, and returns anything else as aux. An integrator's result has
no x0, so it is the aux of a solver whose x is ignored. Not here: how a solver runs inside a program
(`freevars.jax._host`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from freevars.errors import StructureError
from freevars.jax._host.host_solver import HostSolver
from freevars.jax._solver.problem import Problem

__all__ = ["Hosted"]

# call(fun, at, given, shape) -> the result, and the aux of the user's; `fun` is a `HostFunction`
Call = Callable[[Any, Any, dict[str, Any], tuple[int, ...]], tuple[Any, Any]]


class Hosted:
    """The user's solver, once for each shape of its result, so that each is compiled once."""

    def __init__(self, solver: HostSolver[..., Any], call: Call) -> None:
        self.solver = solver
        self._call = call
        self._by_shape: dict[tuple[int, ...], HostSolver[..., Any]] = {}

    def __call__(
        self, problem: Problem, point: Any, shape: tuple[int, ...], at: Any, given: dict[str, Any]
    ) -> tuple[Any, Any]:
        """The result, a real array of this shape, and the aux of the user's; `point`: an argument
        of the problem's function."""
        solver = self._by_shape.get(shape)
        if solver is None:
            solver = self._by_shape[shape] = self._of_shape(shape)
        options = {"at": at, "given": given}
        _, out = solver.solve(problem, point, options, equations=True, has_aux=False)
        return out["result"], out["aux"]

    def _of_shape(self, shape: tuple[int, ...]) -> HostSolver[..., Any]:
        name = self.solver.__name__

        def run(fun: Any, x0: Any, at: Any, given: dict[str, Any]) -> Any:
            result, aux = self._call(fun, at, given, shape)
            found = np.asarray(result, np.float64)
            if found.shape != shape:
                message = (
                    f"{name}: the solver returned an array of shape {found.shape}, expected"
                    f" {shape}: on the host it is given, and returns, real vectors."
                )
                raise StructureError(message)
            return x0 + 1, {"result": found, "aux": aux}

        run.__name__ = run.__qualname__ = name
        aux = self.solver.aux
        return HostSolver(run, aux={"result": np.zeros(shape), "aux": aux})
