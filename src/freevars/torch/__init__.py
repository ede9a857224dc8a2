"""The PyTorch host: the tensors that a function captures become explicit, differentiable arguments."""

try:
    import torch as _torch
except ImportError as error:  # pragma: no cover (tested in a process of its own)
    _message = "freevars.torch needs PyTorch, which is not installed: pip install 'freevars[torch]'"
    raise ImportError(_message) from error

from freevars.errors import CaptureError, FreevarsError, StructureError
from freevars.torch._closure import Closure
from freevars.torch._convert import closure_convert

__all__ = ["CaptureError", "Closure", "FreevarsError", "StructureError", "closure_convert"]

del _torch
