"""The keyword arguments of the decorators, checked.

Each host declares its options once, as a `TypedDict`: the names are its keys, and what a `bool` or
a `Literal` allows is read off the types. Not here: options with values of the host's own
(`linear_solve`), which the host checks.
"""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

__all__ = ["check_options", "listed"]


def check_options(decorator: str, given: Mapping[str, object], options: Any) -> None:
    """Refuse options that `options`, a `TypedDict`, does not declare, and values of other kinds.

    Raises:
        TypeError: there is no such option, or its value is of another type.
        ValueError: the value is none of those that there are.
    """
    types = get_type_hints(options)
    for name, value in given.items():
        if name not in types:
            known = ", ".join(types)
            near = difflib.get_close_matches(name, types, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            message = f"{decorator}: expected the options {known}, got {name}.{hint}"
            raise TypeError(message)
        if name in _CHECKS and value is not None:
            _CHECKS[name](value)
        if types[name] is bool and not any(value is x or value == x for x in (True, False)):
            message = f"{name}: expected True or False, got {value!r}."
            raise TypeError(message)
        if get_origin(types[name]) is Literal:
            allowed = get_args(types[name])
            if not any(type(value) is type(x) and value == x for x in allowed):
                message = f"{name}: expected {listed(allowed)}, got {value!r}."
                raise ValueError(message)


def _check_tol(tol: object) -> None:
    is_number = isinstance(tol, numbers.Real) and not isinstance(tol, bool)
    message = f"tol: expected a relative size between 0 and 1, or None, got {tol!r}."
    if not is_number:
        raise TypeError(message)
    if not 0 < tol < 1:  # type: ignore[operator]
        raise ValueError(message)


def _check_conserved(conserved: object) -> None:
    if not callable(conserved):
        message = (
            "conserved: expected a function of x that returns the totals which the solver keeps,"
            f" got {conserved!r}."
        )
        raise TypeError(message)


# Checks of options that are neither `bool` nor `Literal`.
_CHECKS: dict[str, Callable[[object], None]] = {"conserved": _check_conserved, "tol": _check_tol}


def listed(values: tuple[object, ...]) -> str:
    """The values as an error lists them: `"a", "b" or "c"`."""
    *most, last = [f'"{x}"' if isinstance(x, str) else repr(x) for x in values]
    return f"{', '.join(most)} or {last}" if most else last
