"""Refuse, by name, the kinds of forward mode in PyTorch that a rule does not support."""

from collections.abc import Iterable
from typing import Any

from freevars.errors import CaptureError
from freevars.torch import _compat

__all__ = ["check_forward_mode"]


def check_forward_mode(tangents: Iterable[Any]) -> None:
    """Refuses the tangents of PyTorch's first vmap, and a trace that is being recorded: a solve
    looks at its numbers."""
    if any(t is not None and _compat.is_legacy_batched(t) for t in tangents):
        message = (
            "expected torch.func.jacfwd for a derivative of a rule in forward mode, got "
            'torch.autograd.functional.jacobian(strategy="forward-mode"), whose vmap of old '
            "cannot run the solve."
        )
        raise CaptureError(message)
    if _compat.recording():
        message = (
            "expected torch.func.jvp for a derivative of a rule in forward mode, got "
            "torch.func.linearize or make_fx, which cannot record a solve that looks at its "
            "numbers."
        )
        raise CaptureError(message)
