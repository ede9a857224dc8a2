"""What the public functions of both hosts share: `hoist=` policies, and errors for wrong calls.

Not here: what a policy means for the values of one host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

from freevars._names.callables import function_name

__all__ = ["Hoist", "by_position", "check_callable", "hoist_policy", "policy_name"]

# Which captured values become arguments. A value of each is one of the next, too.
#   "differentiable": a derivative could flow into it now
#   "traced": a transformation is under way for it, whatever its type
#   "floating": it is of floating or complex type, concrete or not, or traced
#   "all": every array or tensor
# or a function that is given the value and decides.
Hoist: TypeAlias = Literal["differentiable", "traced", "floating", "all"] | Callable[[Any], bool]


def hoist_policy(hoist: Hoist, named: Mapping[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    """Whether a captured value is hoisted, with what the names mean in one host.

    Raises:
        ValueError: it is neither a function nor one of the names.
    """
    if isinstance(hoist, str) and hoist in named:
        return named[hoist]
    if callable(hoist):
        return hoist
    names = ", ".join(f'"{name}"' for name in named)
    message = f"hoist: expected {names} or a function of a captured value, got {hoist!r}."
    raise ValueError(message)


def policy_name(hoist: Hoist) -> str:
    """What a report calls a policy."""
    return hoist if isinstance(hoist, str) else function_name(hoist)


def check_callable(fun: object) -> None:
    """Refuse what cannot be converted because it cannot be called."""
    if not callable(fun):
        message = f"closure conversion needs a callable, got {type(fun).__name__}: {fun!r}."
        raise TypeError(message)


def by_position(called: str, keywords: Iterable[str]) -> TypeError:
    """The error for a closure that is called by keyword."""
    names = ", ".join(keywords)
    return TypeError(
        f"{called} takes its arguments by position, as its example did, got {names} by keyword."
    )
