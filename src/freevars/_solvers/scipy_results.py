"""What scipy reports of its own run, as Python numbers and one string; the same in both hosts.

The text crosses a transformation as bytes of a fixed length. Not here: the arrays or tensors that a
host makes of these, and the classes that hold them.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, TypeAlias

__all__ = ["Said", "as_bytes", "as_text", "ivp_said", "root_said", "solver_said"]

Said: TypeAlias = tuple[dict[str, bool | int], str]

_BYTES = 256  # of a message; what is longer is cut


def solver_said(result: Any = None) -> Said:
    """What a result of `minimize`, `root`, `least_squares` or `linprog` reports besides x.

    Of None, here and below: an example, with the same names.
    """
    counts = {n: _count(getattr(result, n, None)) for n in ("nit", "nfev", "njev", "nhev")}
    success, status = bool(getattr(result, "success", False)), int(getattr(result, "status", 0))
    return {"success": success, "status": status} | counts, str(getattr(result, "message", ""))


def root_said(result: Any = None) -> Said:
    """The same of `root_scalar`."""
    counts = {n: _count(getattr(result, n, None)) for n in ("iterations", "function_calls")}
    converged = bool(getattr(result, "converged", False))
    return {"converged": converged} | counts, str(getattr(result, "flag", ""))


def ivp_said(result: Any = None) -> Said:
    """The same of `solve_ivp`; of None: what holds where there was nothing to solve."""
    counts = {n: int(getattr(result, n, 0)) for n in ("status", "nfev", "njev", "nlu")}
    success = bool(getattr(result, "success", True))
    return {"success": success} | counts, str(getattr(result, "message", ""))


def _count(n: Any) -> int:
    """A count, or -1 where the method has none."""
    return int(n) if n is not None and isfinite(n) else -1


def as_bytes(text: str) -> bytes:
    """A text as bytes of a fixed length."""
    return text.encode()[:_BYTES].ljust(_BYTES, b"\0")


def as_text(data: list[Any]) -> Any:
    """A text again, from the numbers of its bytes; lists of texts over the axes of a batch."""
    if data and isinstance(data[0], list):
        return [as_text(row) for row in data]
    return bytes(data).rstrip(b"\0").decode(errors="ignore")
