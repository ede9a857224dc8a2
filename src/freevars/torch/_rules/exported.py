"""Refuse, by name, to write a derivative down in a program (`torch.export`, `make_fx`)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from freevars.errors import CaptureError
from freevars.torch import _compat
from freevars.torch._rules.forms import is_smooth

__all__ = ["check_not_exported", "check_not_of_a_program"]


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
