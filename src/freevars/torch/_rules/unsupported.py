"""Refuse, by name, the ways in which PyTorch takes a derivative and a rule cannot give one."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from freevars.errors import CaptureError
from freevars.torch import _compat
from freevars.torch._convert.autograd_graph import nodes_behind
from freevars.torch._rules.forms import is_smooth

__all__ = [
    "check_forward_mode",
    "check_not_exported",
    "check_not_of_a_program",
    "check_not_recorded",
    "naming_reentrant_checkpoints",
]


def check_not_exported(name: str) -> None:
    """Refuses a trace that is being recorded: it would hold how x was found, and no rule."""
    if _compat.recording():
        message = (
            f"{name}: expected a call outside of torch.export and make_fx where a derivative may "
            "be asked for, got one that is being recorded. The program would lose the derivative: "
            "it holds operations alone, and a rule looks at numbers. For a program of values, "
            "export under torch.no_grad()."
        )
        raise CaptureError(message)


def check_not_of_a_program(values: Iterable[Tensor], name: str) -> None:
    """The same where a program is recorded for values without a derivative, and computes some of
    `values` from what it will be given: that may have one. A transform inside the program refuses
    where it takes a derivative."""
    if not torch.is_grad_enabled() or not _compat.recording():
        return
    own = [t for t in values if is_smooth(t) and _compat.is_recorded(t)]
    if own and not any(by for t in own for _, by in _compat.layers(t)):
        check_not_exported(name)


def check_forward_mode(tangents: Iterable[Any]) -> None:
    """Refuses the tangents of PyTorch's first vmap, and a trace that is being recorded."""
    if any(t is not None and _compat.is_legacy_batched(t) for t in tangents):
        message = (
            "expected torch.func.jacfwd for a derivative of a rule in forward mode, got "
            'torch.autograd.functional.jacobian(strategy="forward-mode"), whose vmap of old '
            "cannot run the solve."
        )
        raise CaptureError(message)
    check_not_recorded()


def check_not_recorded() -> None:
    """Refuses a trace that is being recorded, where a solve looks at its numbers."""
    if _compat.recording():
        message = (
            "expected torch.func.jvp for a derivative of a rule in forward mode, got "
            "torch.func.linearize or make_fx, which cannot record a solve that looks at its "
            "numbers."
        )
        raise CaptureError(message)


@contextmanager
def naming_reentrant_checkpoints(f: Tensor, name: str) -> Iterator[None]:
    """Explains why PyTorch cannot take products with the derivative of f, where that is the
    reason."""
    try:
        yield
    except RuntimeError as error:
        if not any(map(_compat.is_reentrant_checkpoint_node, nodes_behind([f]))):
            raise
        message = (
            f"{name}: expected a function of which PyTorch can take a derivative by a chosen "
            "tensor, got one that calls checkpoint(..., use_reentrant=True), whose backward pass "
            "refuses that. Call checkpoint with use_reentrant=False."
        )
        raise CaptureError(message) from error
