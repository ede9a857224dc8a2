# ruff: noqa: SLF001 (with `_hooks.py`, `_compat` is all that reaches for private names)
"""Non-reentrant checkpoints, as those see them who take derivatives within one.

A checkpoint keeps none of the tensors that a graph saves: at the first that a backward pass asks
for, its function runs again and gives them all. Every backward pass counts by itself, and so does
one inside another, or one that ends before the function does. What is differentiated many times
in one backward pass (`Saved`), or at once (`without_checkpoints`), needs its tensors at hand.
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint as _checkpoint
from torch import Tensor

__all__ = [
    "Saved",
    "checkpointing",
    "for_many_passes",
    "keeping_nothing_for_one",
    "without_checkpoints",
]

_autograd: Any = torch._C._autograd  # the stack of hooks for saved tensors has no public reader


def checkpointing() -> bool:
    """Whether a non-reentrant checkpoint is open on this thread: by its hooks for saved tensors."""
    hooks = _autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return False
    pack = hooks[0]
    return pack.__module__ == _checkpoint.__name__ or isinstance(
        getattr(pack, "__self__", None), Saved
    )


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Inside, graphs keep what they save, as where no checkpoint is open."""
    taken = []
    while checkpointing():
        taken.append(_autograd._top_saved_tensors_default_hooks(True))
        _autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for hooks in reversed(taken):
            _autograd._push_saved_tensors_default_hooks(*hooks)


class _Thread(threading.local):
    many_passes = False


_thread = _Thread()


@contextmanager
def for_many_passes() -> Iterator[None]:
    """Inside, the checkpoints of a graph that many backward passes go through keep nothing by a
    policy of their own (`create_selective_checkpoint_contexts`): it is gone after the first pass.
    They compute the same without, from the start."""
    before, _thread.many_passes = _thread.many_passes, True
    try:
        yield
    finally:
        _thread.many_passes = before


def keeping_nothing_for_one(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`checkpoint`, as `for_many_passes` wants it. Its `context_fn` is a positional argument, and
    a keyword from 2.14 on."""

    def called(*args: Any, **kwargs: Any) -> Any:
        if not _thread.many_passes:
            return checkpoint(*args, **kwargs)
        call = inspect.signature(checkpoint).bind(*args, **kwargs)
        context_fn = call.arguments.get("context_fn", _checkpoint.noop_context_fn)

        def contexts() -> Any:
            forward, again = context_fn()
            if isinstance(again, _checkpoint._CachedTorchDispatchMode):
                return nullcontext(), nullcontext()
            return forward, again

        call.arguments["context_fn"] = contexts
        return checkpoint(*call.args, **call.kwargs)

    return called


class _Packed:
    """What a checkpoint gave for a tensor, and the tensor as long as it is there."""

    __slots__ = ("__weakref__", "handle", "tensor", "version")

    def __init__(self, handle: Any, t: Tensor) -> None:
        self.handle = handle
        self.keep(t)

    def keep(self, t: Tensor) -> None:
        self.tensor: Tensor | None = t.detach()  # which may be what the graph computes
        self.version = t._version

    @property
    def kept(self) -> Tensor | None:
        """The tensor, unless it was written to."""
        t = self.tensor
        return t if t is not None and t._version == self.version else None


class Saved:
    """The tensors that a graph made within `collecting()` has saved. The checkpoint around it keeps
    them no more than others; they are there while it is made, and once they are restored."""

    def __init__(self) -> None:
        self._packed: list[weakref.ref[_Packed]] = []
        self._hooks: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Where the graph is made. Without a checkpoint around it there is nothing to do."""
        if not checkpointing():
            yield
            return
        self._hooks = _autograd._top_saved_tensors_default_hooks(True)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            for packed in self._alive():
                packed.tensor = None

    def restore(self) -> None:
        """Has all of them again, by one run of the checkpointed function; to be called in the
        backward pass that wants them."""
        for packed in self._alive():
            if packed.tensor is None:
                packed.keep(self._unpack(packed))

    def _alive(self) -> list[_Packed]:
        return [packed for ref in self._packed if (packed := ref()) is not None]

    def _pack(self, t: Tensor) -> _Packed:
        assert self._hooks is not None  # noqa: S101 (for the type checker)
        packed = _Packed(self._hooks[0](t), t)
        self._packed.append(weakref.ref(packed))
        return packed

    def _unpack(self, packed: _Packed) -> Tensor:
        assert self._hooks is not None  # noqa: S101 (for the type checker)
        kept = packed.kept
        return self._hooks[1](packed.handle) if kept is None else kept
