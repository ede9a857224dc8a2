"""What a person would call a captured tensor: the walk over what a function can reach.

A small stand-in for the host-neutral naming module: closure cells, globals that the code uses,
defaults, bound self, partials, attributes, containers, module parameters. It calls no property.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["called", "caller", "describe", "reachable"]

_LIMIT = 20_000  # objects visited: a walk over a big program must end
_SKIP = (types.ModuleType, type, str, bytes, int, float, complex, bool, type(None), Tensor)
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def reachable(fun: Any) -> dict[int, tuple[str, Tensor]]:
    """The tensors that `fun` reaches without running: by id, the shortest name and the tensor."""
    names: dict[int, tuple[str, Tensor]] = {}
    seen: set[int] = set()
    queue: list[tuple[Any, str]] = [(fun, "")]
    for value, name in queue:  # grows while it is walked: breadth first, so short names win
        if isinstance(value, Tensor):
            names.setdefault(id(value), (name, value))
        if id(value) in seen or isinstance(value, _SKIP) or len(seen) > _LIMIT:
            continue
        seen.add(id(value))
        queue.extend(_children(value, name))
    return names


def _children(value: Any, name: str) -> Iterator[tuple[Any, str]]:  # noqa: C901 (a case a line)
    if isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, types.MethodType):
        yield value.__self__, name or "self"
        yield value.__func__, name
    elif isinstance(value, functools.partial):
        yield value.func, name
        for i, x in enumerate(value.args):
            yield x, f"{name or 'partial'}.args[{i}]"
        for k, x in value.keywords.items():
            yield x, k
    elif isinstance(value, dict):
        for k, x in value.items():
            yield x, f"{name}[{k!r}]"
    elif isinstance(value, list | tuple | set | frozenset):
        for i, x in enumerate(value):
            yield x, f"{name}[{i}]"
    elif not (type(value).__module__ or "").startswith("torch.utils"):
        yield from _of_object(value, name)


def _of_function(fun: types.FunctionType) -> Iterator[tuple[Any, str]]:
    code = fun.__code__
    for variable, cell in zip(code.co_freevars, fun.__closure__ or (), strict=True):
        try:
            yield cell.cell_contents, variable
        except ValueError:  # an empty cell
            continue
    for variable in _global_names(code):
        if variable in fun.__globals__:
            yield fun.__globals__[variable], variable
    arguments = code.co_varnames[: code.co_argcount]
    defaults = fun.__defaults__ or ()
    yield from zip(defaults, arguments[len(arguments) - len(defaults) :], strict=True)
    for variable, default in (fun.__kwdefaults__ or {}).items():
        yield default, variable
    if hasattr(fun, "__wrapped__"):
        yield fun.__wrapped__, ""


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _of_object(value: Any, name: str) -> Iterator[tuple[Any, str]]:
    if isinstance(value, torch.nn.Module):
        for prefix, module in value.named_modules():
            stem = name + "".join(_step(part) for part in prefix.split(".") if part)
            for key, x in (*module._parameters.items(), *module._buffers.items()):  # noqa: SLF001
                yield x, f"{stem}.{key}"
            for key, x in vars(module).items():
                if key not in {"_parameters", "_buffers", "_modules"}:
                    yield x, f"{stem}.{key}"
        return
    for key, x in getattr(value, "__dict__", {}).items():
        yield x, f"{name or 'self'}.{key}"
    for key in getattr(type(value), "__slots__", ()):
        slot = getattr(type(value), key, None)
        if isinstance(slot, types.MemberDescriptorType) and hasattr(value, key):
            yield getattr(value, key), f"{name or 'self'}.{key}"
    call = vars(type(value)).get("__call__")
    if isinstance(call, types.FunctionType):
        yield call, name


def _step(part: str) -> str:
    return f"[{part}]" if part.isdigit() else f".{part}"


def describe(value: Tensor, fun: Any, where: str | None = None) -> str:
    """`w (float32[3, 4]), first read at model.py:41`, for an error message."""
    name = reachable(fun).get(id(value), ("", None))[0] or "an unnamed tensor"
    shape = ", ".join(str(n) for n in value.shape)
    kind = str(value.dtype).removeprefix("torch.")
    return f"{name} ({kind}[{shape}])" + (f", read at {where}" if where else "")


def caller() -> str | None:
    """`file:line` of the innermost frame that is neither PyTorch's nor ours."""
    frame = sys._getframe(1)  # noqa: SLF001 (no public way to walk frames is as cheap)
    step: types.FrameType | None = frame
    while step is not None:
        file = step.f_code.co_filename
        if not file.startswith((*_LIBRARIES, "<")):
            return f"{file}:{step.f_lineno}"
        step = step.f_back
    return None


def called(fun: Callable[..., Any]) -> str:
    """What to call `fun` in a message."""
    return str(getattr(fun, "__qualname__", None) or type(fun).__qualname__)
