"""Detect a solver on the host that takes finite differences too small for the function's dtype.

A solver works in float64, and where the unknown is float32 the function rounds its argument.
scipy's default steps for finite differences, 1.5e-8 relative, then vanish: all slopes are zero, and
a solver that trusts them returns its start and reports success. At the end of any search, too, two
points may differ in float64 and not for the function. The sign of trouble is a solver that asked
for no derivative and returned its start, which is not a solution. Not here: what a solver is given
to call (`oracle`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from freevars.errors import NotASolutionError

__all__ = ["Resolution"]

_LIMIT = 1000  # unknowns, beyond which a start that came back is not looked at once more
_NEAR = 1e-2  # a Newton step, relative, from which a start is no solution


class Resolution:
    """The queries of a solver, in the order of its calls."""

    def __init__(self, dtypes: list[str]) -> None:
        # In bfloat16 nobody would difference; its steps are as invisible in float32.
        fine = all(jnp.finfo(dtype).bits == 64 for dtype in dtypes)  # noqa: PLR2004
        self._coarse = None if fine else np.float32
        self._last: Any = None
        self._unseen = False
        self._derivative = False

    def asked(self, kind: str, v: Any) -> None:
        """Note a query."""
        if self._coarse is None or self._unseen:
            self._derivative |= kind != "value"
            return
        if kind != "value":
            self._derivative = True
        elif self._last is not None and self._last.shape == v.shape:
            same = np.array_equal(self._last.astype(self._coarse), v.astype(self._coarse))
            self._unseen = same and not np.array_equal(self._last, v)
        self._last = np.array(v)

    def check(
        self, v: Any, v0: Any, query: Callable[..., Any], name: str, *, equations: bool
    ) -> None:
        """Refuse v, found from v0, if the solver saw no slopes."""
        if not self._unseen or self._derivative or v.ndim != 1 or v.size > _LIMIT:
            return
        if not np.array_equal(v.astype(self._coarse), v0.astype(self._coarse)):
            return
        if _is_solution(v, query, equations=equations):
            return
        message = (
            f"{name}: the solver differences the function by steps that float32 does not see (it"
            " evaluated points that differ in float64 and coincide in float32), found every slope"
            " zero and returned its start. Give it derivatives (jac=True with"
            " fun.value_and_grad, jac=fun.grad, or fprime=fun.jacobian), a larger step (eps=1e-3,"
            ' say), or solve in float64: jax.config.update("jax_enable_x64", True).'
        )
        raise NotASolutionError(message)


def _is_solution(v: Any, query: Callable[..., Any], *, equations: bool) -> bool:
    matrix = np.asarray(query("matrix", v)[0], np.float64)
    if equations:
        f = np.asarray(query("value", v)[0], np.float64)
        # Of a root, or of a fixed point: the solver may mean either.
        systems = [(matrix, f), (matrix - np.eye(v.size), f - v)]
    else:
        systems = [(matrix, np.asarray(query("value_and_grad", v)[1], np.float64))]
    for a, f in systems:
        if a.shape != (v.size, f.size) or not np.all(np.isfinite(a)):
            return True  # not a square system: nothing is known
        step = np.linalg.lstsq(a, f, rcond=None)[0]
        if np.all(np.abs(step) <= _NEAR * np.abs(v)):
            return True
    return False
