"""A converted function at the very tensors that it captured: `fun` runs as it is, without a watch.

There is nothing to replace in a module that is run at its own parameters: they are leaves of the
tape, none of them is computed from another, and every operation is spared what a watch costs. What
a watch would refuse is told afterwards: a tensor that was not hoisted by the tape
(`autograd_graph.py`), a write in place by the counter of versions that each tensor has. A batch
norm writes to its statistics and counts no version, so with one there is always a watch.

Not here: other values (`substitution.py`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from freevars.errors import CaptureError
from freevars.torch import _compat, _modes
from freevars.torch._convert.captured import Captured
from freevars.torch._convert.refusals import written_message
from freevars.torch._describe import describe

__all__ = ["can_rest", "is_at_rest", "refuse_written"]


def can_rest(fun: Any, captured: Captured) -> bool:
    """Whether the captured tensors can stand for themselves: the parameters of a module."""
    module = getattr(fun, "__self__", fun)
    return (
        isinstance(module, torch.nn.Module)
        and not isinstance(module, torch.jit.ScriptModule)
        and {id(t) for t in module.parameters()}.issuperset(captured.ids)
        and all(t.is_leaf and t.requires_grad for t in captured.tensors)
        and None not in captured.places.first[: len(captured.tensors)]
        and not _compat.transforms_active()
    )


def is_at_rest(captured: Captured, values: Sequence[Any], leaves: Iterable[Any]) -> bool:
    """Whether replacing the captured tensors by `values` would change nothing; `leaves` are those
    of the arguments."""
    for value, own in zip(values, captured.tensors, strict=True):
        if value is not own:
            return False
    for x in leaves:
        if id(x) in captured.ids:
            return False
    return (
        torch.is_grad_enabled()
        and not _compat.transforms_active()
        and not _modes.active()
        and captured.places.unchanged()
    )


def refuse_written(tensors: Sequence[Tensor], before: list[int], fun: Any) -> None:
    """Refuses that `fun` has written to one of `tensors` since their versions were `before`."""
    now = _compat.versions(tensors)
    if now != before:
        written = next(t for t, v, w in zip(tensors, now, before, strict=True) if v != w)
        raise CaptureError(written_message(describe(written, fun)))
