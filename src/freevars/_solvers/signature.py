"""How a solver is called: `solver(fun, x0, ...)`, whatever it calls its parameters.

An integrator takes two values after the function, `solver(integrand, a, b, ...)`, and they are a
pair where a solver has `x0`.

The solver's signature decides what each argument is for. Those collected in `*args` and `**kwargs`,
or in a tuple named `args` as in scipy, are passed on to the function; all other parameters are the
solver's own options. Not here: what is done with the parts, and how a method is bound
(`decorated`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from freevars._names.callables import plain_name
from freevars.errors import StructureError

__all__ = ["LEADS", "SolverCall", "SolverSignature", "split_aux"]

LEADS = ("a function", "a starting point")  # what a solver takes first

_COLLECTED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class SolverCall(NamedTuple):
    """One call of a solver, sorted."""

    fun: Callable[..., Any]
    x0: Any  # or a pair, where two values follow the function
    args: tuple[Any, ...]  # what the solver passes on to `fun`, by position
    kwargs: dict[str, Any]  # and by keyword
    options: dict[str, Any]  # everything else, defaults included


class SolverSignature:
    """The parameters of a solver, and what each of them is for."""

    def __init__(self, solver: Callable[..., Any], leads: tuple[str, ...] = LEADS) -> None:
        self._leading = len(leads)
        called = "solver(fun, x0, ...)" if leads == LEADS else f"solver({', '.join(leads)}, ...)"
        if not callable(solver):
            order = " Decorate the function below @classmethod, not what that returns."
            hint = order if isinstance(solver, classmethod) else ""
            message = f"a solver is a function {called}, got {solver!r}.{hint}"
            raise TypeError(message)
        self.name = plain_name(solver)
        try:
            self._signature = inspect.signature(solver)
        except ValueError:
            message = (
                f"{self.name} has no signature that Python can read. Write a function {called}"
                " around it, and decorate that."
            )
            raise TypeError(message) from None
        parameters = list(self._signature.parameters.values())
        # A function of a class body, before an object is bound to it.
        self.is_method = bool(parameters) and parameters[0].name in ("self", "cls")
        first = parameters[self.is_method :][: len(leads)]
        if len(first) < len(leads) or any(p.kind in (*_COLLECTED, p.KEYWORD_ONLY) for p in first):
            number = {2: "two", 3: "three"}[len(leads)]
            message = (
                f"a solver takes {', '.join(leads[:-1])} and {leads[-1]} as its first {number}"
                f" arguments, got {self}."
            )
            raise TypeError(message)
        passed_on = [p for p in parameters if _is_passed_on(p) and p.kind is not p.VAR_KEYWORD]
        if len(passed_on) > 1:
            message = (
                f"{self} passes extra arguments on to the function in two ways: keep one of them."
            )
            raise TypeError(message)

    def __str__(self) -> str:
        return f"{self.name}{self._signature}"

    def take_apart(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SolverCall:
        """Sort the arguments of a call."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            message = f"{self}: {error}. Call it by this signature."
            raise TypeError(message) from None
        bound.apply_defaults()
        (_, fun), *rest = bound.arguments.items()
        leading = [value for _, value in rest[: self._leading - 1]]
        call = SolverCall(fun, leading[0] if len(leading) == 1 else tuple(leading), (), {}, {})
        rest = rest[self._leading - 1 :]
        for name, value in rest:
            parameter = self._signature.parameters[name]
            if parameter.kind is parameter.VAR_KEYWORD:
                call.kwargs.update(value)
            elif _is_passed_on(parameter):
                call = call._replace(args=_as_tuple(value))
            else:
                call.options[name] = value
        return call

    def call(self, solver: Callable[..., Any], call: SolverCall) -> Any:
        """Call the solver as its user did, with these parts."""
        given = dict(call.options)
        leading = (call.fun, *((call.x0,) if self._leading == len(LEADS) else call.x0))
        for i, (name, parameter) in enumerate(self._signature.parameters.items()):
            if i < self._leading:
                given[name] = leading[i]
            elif parameter.kind is parameter.VAR_KEYWORD:
                given[name] = call.kwargs
            elif _is_passed_on(parameter):
                given[name] = call.args
        bound = inspect.BoundArguments(self._signature, given)
        return solver(*bound.args, **bound.kwargs)


def split_aux(
    out: Any, name: str, what: str = "x", shown: Callable[[Any], str] = repr
) -> tuple[Any, Any]:
    """What a solver with `has_aux=True` returned: its result and its aux.

    Raises:
        freevars.errors.StructureError: it is not a pair.
    """
    if not (isinstance(out, tuple) and len(out) == 2):  # noqa: PLR2004
        message = f"{name}: with has_aux=True a solver returns ({what}, aux), got {shown(out)}."
        raise StructureError(message)
    return out


def _is_passed_on(parameter: inspect.Parameter) -> bool:
    return parameter.kind in _COLLECTED or parameter.name == "args"


def _as_tuple(args: Any) -> tuple[Any, ...]:
    if args is None:
        return ()
    return tuple(args) if isinstance(args, (tuple, list)) else (args,)
