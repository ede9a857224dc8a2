"""The PyTorch host: the tensors that a function captures become explicit, differentiable
arguments.

`fv.scipy`, the only part that needs scipy, is imported at its first use.
"""

import importlib as _importlib
from typing import Any as _Any

try:
    import torch as _torch
except ImportError as error:  # pragma: no cover (tested in a process of its own)
    _message = "freevars.torch needs PyTorch, which is not installed: pip install 'freevars[torch]'"
    raise ImportError(_message) from error

from freevars.errors import (
    CaptureError,
    FreevarsError,
    LeakError,
    NotASolutionError,
    SingularError,
    StructureError,
)
from freevars.torch._captures import captures
from freevars.torch._closure import Closure
from freevars.torch._convert.convert import Converted, closure_convert
from freevars.torch._rules.derivative import LinearOperator
from freevars.torch._rules.integral import IntegralSolver
from freevars.torch._rules.integrals import integral, odeint
from freevars.torch._rules.odeint import OdeintSolver
from freevars.torch._rules.rules import (
    ImplicitSolver,
    argmin,
    fixed_point,
    implicit,
    least_squares,
    root,
)
from freevars.torch._rules.truncated import neumann, one_step

__all__ = [
    "CaptureError",
    "Closure",
    "Converted",
    "FreevarsError",
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
    "fixed_point",
    "implicit",
    "integral",
    "least_squares",
    "neumann",
    "odeint",
    "one_step",
    "root",
]

del _torch


def __getattr__(name: str) -> _Any:
    if name == "scipy":
        return _importlib.import_module("freevars.torch.scipy")
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
