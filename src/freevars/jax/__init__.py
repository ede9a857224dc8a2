"""Closures as values in JAX: ``import freevars.jax as fv``.

What is slow to import and rarely needed (reports, integrals, `fv.testing`, and `fv.scipy`, the only
part that needs scipy) is imported at its first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from freevars.errors import (
    CaptureError,
    FreevarsError,
    LeakError,
    NotASolutionError,
    SingularError,
    StructureError,
)
from freevars.jax import _compat  # noqa: F401 (first: it says what to install without JAX)
from freevars.jax._closure import Closure
from freevars.jax._convert.converted import Converted, closure_convert
from freevars.jax._host.host_solver import HostSolver
from freevars.jax._host.on_host import on_host
from freevars.jax._host.oracle import HostFunction
from freevars.jax._host.scipy_status import scipy_status
from freevars.jax._rules.explain import Diagnosis
from freevars.jax._rules.operator import LinearOperator
from freevars.jax._rules.rules import argmin, fixed_point, implicit, least_squares, root
from freevars.jax._rules.solver import ImplicitSolver
from freevars.jax._rules.truncated import neumann, one_step

if TYPE_CHECKING:
    from freevars.jax import testing
    from freevars.jax._captures import captures
    from freevars.jax._report.leaks import explain_leaks
    from freevars.jax._rules.integral import IntegralSolver
    from freevars.jax._rules.integrals import integral, odeint
    from freevars.jax._rules.odeint import OdeintSolver

__all__ = [
    "CaptureError",
    "Closure",
    "Converted",
    "Diagnosis",
    "FreevarsError",
    "HostFunction",
    "HostSolver",
    "ImplicitSolver",
    "IntegralSolver",
    "LeakError",
    "LinearOperator",
    "NotASolutionError",
    "OdeintSolver",
    "SingularError",
    "StructureError",
    "argmin",
    "captures",
    "closure_convert",
    "explain_leaks",
    "fixed_point",
    "implicit",
    "integral",
    "least_squares",
    "neumann",
    "odeint",
    "on_host",
    "one_step",
    "root",
    "scipy_status",
    "testing",
]


# By name: the module that has it.
_LATER = {
    "IntegralSolver": "_rules.integral",
    "OdeintSolver": "_rules.odeint",
    "captures": "_captures",
    "explain_leaks": "_report.leaks",
    "integral": "_rules.integrals",
    "odeint": "_rules.integrals",
}


def __getattr__(name: str) -> Any:
    if name in ("scipy", "testing"):
        return importlib.import_module(f"freevars.jax.{name}")
    if name in _LATER:
        found = getattr(importlib.import_module(f"freevars.jax.{_LATER[name]}"), name)
        globals()[name] = found
        return found
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "scipy"})
