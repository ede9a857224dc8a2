"""A converted function at the very tensors that it captured: `fun` runs as it is, without a watch.

There is nothing to replace in a module that is run at its own parameters: they are leaves of the
tape, none of them is computed from another, and every operation is spared what a watch costs. No
derivative can be lost, for nothing stands for anything else. What a watch would refuse besides is
told afterwards: a tensor that was not hoisted by the tape (`autograd_graph.py`), a write in place
by the counter of versions that each tensor has.

Two kinds of writes count no version: those of a batch norm, and those through `.data`. So with a
batch norm in the example there is always a watch, and there is one while a part of the module is in
another mode (train, eval) than in the example, in which modules begin to write to their buffers.

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

__all__ = ["Rest", "rest_of"]


class Rest:
    """A module that can run as it is.

    Attributes:
        training: whether each of its parts was in train mode when the example ran.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        captured: Captured,
        training: tuple[bool, ...] | None,
        *,
        sharded: bool,
    ) -> None:
        self._captured = captured
        self._parts = tuple(module.modules())
        own = () if sharded else module.parameters()  # a sharded module writes to its parameters
        self._tensors = (*own, *module.buffers(), *captured.constants)
        self.training = self._training() if training is None else training

    def _training(self) -> tuple[bool, ...]:
        return tuple([part.training for part in self._parts])

    def holds(self, values: Sequence[Any], leaves: Iterable[Any]) -> bool:
        """Whether replacing the captured tensors by `values` would change nothing; `leaves` are
        those of the arguments."""
        captured = self._captured
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
            and self._training() == self.training
        )

    def run(self, fun: Any, arguments: Sequence[Any], given: Sequence[Tensor]) -> Any:
        """`fun(*arguments)`; refuses that it has written to the tensors `given` to it, or to the
        module's."""
        watched = (*given, *self._tensors)
        before = _compat.versions(watched)
        out = fun(*arguments)
        now = _compat.versions(watched)
        if now != before:
            written = next(t for t, v, w in zip(watched, now, before, strict=True) if v != w)
            raise CaptureError(written_message(describe(written, fun)))
        return out


def rest_of(
    fun: Any, captured: Captured, training: tuple[bool, ...] | None, *, sharded: bool
) -> Rest | None:
    """None where the captured tensors cannot stand for themselves, as the parameters of a module
    can. `training` is that of the function that this one is a copy of, if of any; `sharded` says
    whether it is by `fully_shard`."""
    module = getattr(fun, "__self__", fun)
    can = (
        isinstance(module, torch.nn.Module)
        and not isinstance(module, torch.jit.ScriptModule)
        and {id(t) for t in module.parameters()}.issuperset(captured.ids)
        and all(t.is_leaf and t.requires_grad for t in captured.tensors)
        and None not in captured.places.first[: len(captured.tensors)]
        and not _compat.transforms_active()
    )
    return Rest(module, captured, training, sharded=sharded) if can else None
