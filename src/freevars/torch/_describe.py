"""Describe captured tensors, with their names, for reports and error messages.

Runs only when asked for. Names come from searching what the function can reach (`_names.search`);
this file tells the search the three things that it has to know about PyTorch. Not here: finding the
captured tensors (`discovery.py`), and counting their reads (`_captures.py`).
"""

import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freevars import report
from freevars._names.introspection import class_module
from freevars._names.search import (
    FRAMEWORKS,
    Name,
    ReachableLeaves,
    function_name,
    name_values,
)
from freevars.report import CapturedValue, ReadSite, captured_by, read_site
from freevars.report._reads import Line
from freevars.torch import _compat

__all__ = [
    "Line",
    "Reachable",
    "ReadSite",
    "caller",
    "captured_value",
    "describe",
    "enters",
    "function_name",
    "line_of_caller",
    "names_of",
    "reachable",
]

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_GENERATED = ("<frozen", "<eval_with_key>")  # by Python and by torch.fx
_NOT_OF_USER = (*_LIBRARIES, *_GENERATED)

# Methods that PyTorch calls, of modules and of custom Functions.
_IMPLICIT = frozenset({"forward", "backward", "setup_context", "vjp", "jvp", "vmap"})


def _is_tensor(x: object) -> bool:
    return issubclass(type(x), Tensor)


def enters(cls: type) -> bool:
    """Distributions, optimizers, data sets, and what users derive from PyTorch's classes hold
    tensors under names that a user knows; PyTorch's private classes do not."""
    root, _, rest = class_module(cls).partition(".")
    return root not in FRAMEWORKS or (root == "torch" and rest != "" and not rest.startswith("_"))


_WALK: Any = {"is_leaf": _is_tensor, "enters": enters, "implicit": _IMPLICIT}


def names_of(fun: Callable[..., Any], values: Sequence[Tensor]) -> list[tuple[Name, ...]]:
    """The names under which `fun` reaches each tensor."""
    return name_values(fun, values, **_WALK)


def reachable(*objects: Any) -> dict[int, tuple[Tensor, str]]:
    """The tensors that these reach without running: by id, the tensor and its shortest name."""
    found = Reachable()
    return {id(t): (t, name) for x in objects for t, name in found.of(x)}


class Reachable:
    """The same for one object after the other; each tensor comes once."""

    def __init__(self) -> None:
        self._leaves = ReachableLeaves(**_WALK)

    def of(self, fun: Any) -> list[tuple[Tensor, str]]:
        """The tensors that `fun` reaches and that were not met before, with their names."""
        found: Any = self._leaves.of(fun)
        return [(t, name.name) for t, name in found]


def captured_value(
    fun: Callable[..., Any],
    value: Tensor,
    names: Sequence[Name],
    *,
    hoisted: bool,
    policy: str,
    reads: int = 0,
    sites: tuple[ReadSite, ...] = (),
) -> CapturedValue:
    """What is known of one captured tensor. This inspection does not count as a read."""
    layers = _compat.layers(value)
    with _compat.unseen():
        parts = _compat.parts(value) or [value]
        computed = any(u.grad_fn is not None for u in _compat.unwrap(value))
        inexact = value.is_floating_point() or value.is_complex()
        perturbed = [by for _, by in layers if by is not None]
        return CapturedValue(
            names=tuple(name.name for name in names),
            paths=tuple(name.path for name in names),
            shape=_shape(value),
            dtype=str(value.dtype).removeprefix("torch."),
            nbytes=sum(u.numel() * u.element_size() for u in parts),
            device=str(value.device),
            # Without a tape nothing shows what was computed; a tensor with a name is taken for a
            # leaf.
            kind="derived" if computed or not (names or any(perturbed)) else "leaf",
            traced_by=tuple(name for name, _ in layers),
            differentiable=inexact and (any(perturbed) or (hoisted and not perturbed)),
            hoisted=hoisted,
            policy=policy,
            reads=reads,
            sites=sites,
            captured_by=captured_by(fun),
        )


def _shape(t: Tensor) -> tuple[int, ...]:
    """The shape, with -1 where the parts of a nested tensor differ."""
    if not t.is_nested:
        return tuple(t.shape)
    sizes: list[int] = []
    for i in range(t.dim()):
        try:
            n: Any = t.size(i)
        except RuntimeError:  # a strided one has no size there, a jagged one a symbol
            n = None
        sizes.append(n if type(n) is int else -1)
    return tuple(sizes)


def describe(value: Tensor, fun: Callable[..., Any], line: Line | None = None) -> str:
    """One tensor in words, for an error: name, type, path, who captures it, and the line that reads
    it, which the caller knows."""
    sites = () if line is None else (read_site(*line),)
    names = names_of(fun, [value])[0]
    return report.describe(captured_value(fun, value, names, hoisted=False, policy="", sites=sites))


def line_of_caller() -> Line | None:
    """File and line of the innermost frame that is neither PyTorch's nor ours."""
    step: types.FrameType | None = sys._getframe(1)  # noqa: SLF001 (no public way is as cheap)
    while step is not None:
        file = step.f_code.co_filename
        if not file.startswith(_NOT_OF_USER):
            return file, step.f_lineno
        step = step.f_back
    return None


def caller() -> str:
    """The same for a message, `model.py:41`."""
    line = line_of_caller()
    return "an unknown line" if line is None else str(ReadSite(*line))
