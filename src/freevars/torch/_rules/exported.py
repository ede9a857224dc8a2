"""Refuse, by name, to write a derivative down in a program (`torch.export`, `make_fx`)."""

from freevars.errors import CaptureError
from freevars.torch import _compat

__all__ = ["check_not_exported"]


def check_not_exported(name: str) -> None:
    """Refuses a trace that is being recorded: it would hold how x was found, and no rule."""
    if _compat.recording():
        message = (
            f"{name}: expected a call outside of torch.export and make_fx where a derivative is "
            "asked for, got one that is being recorded. The program would lose the derivative: it "
            "holds operations alone, and a rule looks at numbers. For a program of values, export "
            "under torch.no_grad()."
        )
        raise CaptureError(message)
