"""What a decorator states about a solver's result: a kind, by name, or a condition of the user's.

Not here: what each kind means for the values of a host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from freevars._solvers.verdict import Kind

__all__ = ["States", "check_condition", "kind_of"]

# A condition, and what `fun` takes, from x (None: x). A plain tuple is copied by its items.
Stated: TypeAlias = tuple[Callable[..., Any], Callable[[Any], Any] | None]
States: TypeAlias = Kind | Stated


def kind_of(states: States) -> Kind:
    """The kind of a statement."""
    return states if isinstance(states, str) else "implicit"


def check_condition(condition: object, argument: object) -> None:
    """Refuse arguments of `implicit` that are not functions."""
    if not callable(condition):
        message = f"implicit: expected a function condition(fun, x), got {condition!r}."
        raise TypeError(message)
    if argument is not None and not callable(argument):
        message = f"argument: expected None or a function of x, got {argument!r}."
        raise TypeError(message)
