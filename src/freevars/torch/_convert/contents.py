"""Which tensors and functions a value holds: any nest of the built-in containers.

Not here: what is done with them (`discovery.py`, `substitution.py`).
"""

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from freevars.torch._compat import is_plain, parts, unwrap
from freevars.torch._compat import tangents as tangents_of
from freevars.torch._modes import CaptureMode

__all__ = [
    "HOLDS_NONE",
    "PLAIN",
    "are_plain",
    "callables",
    "given_tensors",
    "inner",
    "resumed",
    "tensors",
]

# The types of arguments that hold no tensor, or are one: the hot path looks no further.
_PLAIN = (Tensor, torch.nn.Parameter, int, float, bool, complex, str, type(None), type(...))
PLAIN = frozenset({*_PLAIN, torch.Size, torch.dtype, torch.device, torch.layout})
HOLDS_NONE = PLAIN - {Tensor, torch.nn.Parameter}


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in any nest of the built-in containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | set):
        for x in value:
            if type(x) not in HOLDS_NONE:
                yield from tensors(x)
    elif isinstance(value, dict):
        for x in value.values():
            yield from tensors(x)
    elif isinstance(value, slice):
        yield from tensors((value.start, value.stop, value.step))


def given_tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """The same for the arguments of one call, which mostly hold tensors and plain values."""
    found: list[Tensor] = []
    for x in args:
        if type(x) not in HOLDS_NONE:
            if isinstance(x, Tensor):
                found.append(x)
            else:
                found.extend(tensors(x))
    for x in kwargs.values() if kwargs else ():
        if type(x) not in HOLDS_NONE:
            found.extend(tensors(x))
    return found


def are_plain(value: Any) -> bool:
    """Whether `value` is a tuple of plain values and tensors, as arguments mostly are."""
    if type(value) is not tuple:
        return False
    for x in value:  # noqa: SIM110 (a generator would cost more than the question)
        if type(x) not in PLAIN:
            return False
    return True


def inner(t: Tensor) -> list[Tensor]:
    """Every plain tensor that reading `t` may read: under transforms, tangents, parts of
    subclasses."""
    if is_plain(t):
        return [t]
    found: list[Tensor] = []
    for u in unwrap(t):
        found.append(u)
        if u.layout is not torch.strided or hasattr(u, "__tensor_flatten__"):
            found.extend(part for x in parts(u) for part in inner(x))
    found.extend(u for tangent in tangents_of(t) for u in unwrap(tangent))
    return found


def callables(value: Any) -> Iterator[Any]:
    """The functions in any nest of the built-in containers."""
    if isinstance(value, tuple | list):
        for x in value:
            yield from callables(x)
    elif isinstance(value, dict):
        yield from callables(list(value.values()))
    elif _runs_python(value):
        yield value


def _runs_python(value: Any) -> bool:
    """Whether calling `value` runs code of Python's, which may read what it captures. PyTorch's own
    callable objects (a reduction of torch.distributed) are asked for by their very type."""
    kind = type(value)
    if kind in {types.FunctionType, types.MethodType, functools.partial}:
        return True
    if isinstance(value, Tensor | type):
        return False
    return type(getattr(kind, "__call__", None)) is types.FunctionType  # noqa: B004 (its type)


def resumed(watch: CaptureMode, value: Any) -> Any:
    """`value` with the functions in it run under `watch`, also after the watch was left."""
    if type(value) in PLAIN or are_plain(value):
        return value
    if type(value) is tuple:
        return tuple(resumed(watch, x) for x in value)
    if type(value) is dict:
        return {k: resumed(watch, x) for k, x in value.items()}
    if type(value) is list or not any(x is value for x in callables(value)):
        return value
    return watch.resume(value)
