"""A decorated function: called, bound, copied and pickled like the one it was made from.

A solver that is defined in a class body, or whose first parameter is called self or cls, is bound
like a function: `thing.solve(fun, x0)` calls it with `thing` first. The object is then part of the
solver: it decides how x is found, not what x is, so no derivative flows into what it holds, unless
`fun` captures it. A copy of the object, pickled or not, has its own method. Not here: what is
attached.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, ParamSpec, Self, TypeVar

from freevars._names.callables import plain_name
from freevars._solvers.signature import LEADS, SolverCall, SolverSignature

__all__ = ["DecoratedSolver"]

P = ParamSpec("P")
R = TypeVar("R")


class DecoratedSolver(Generic[P, R]):
    """What a host's decorated solvers have in common.

    A subclass is constructed as `cls(solver, *how, **options)`, from parts that can be pickled. Its
    `leads` name the first arguments of a solver, and its `_solve` handles a call.
    """

    leads: ClassVar[tuple[str, ...]] = LEADS
    __wrapped__: Callable[P, R]
    __name__: str
    __qualname__: str

    def __init__(self, solver: Callable[P, R], /, *how: Any, **options: Any) -> None:
        self._made_from: Callable[[], tuple[Any, Any, Any]] = lambda: (solver, how, options)
        self._bound_to: tuple[Self, Any] | None = None
        self._use(solver)
        # A function, so that picklers treat it like the solver (see `__reduce__`): by name where
        # its name leads to it, or by value where the pickler supports that.
        self._made_from.__module__ = self.__module__

    def _use(self, solver: Callable[P, R]) -> None:
        self._signature = SolverSignature(solver, self.leads)
        functools.update_wrapper(self, solver, updated=())
        self.__name__ = plain_name(solver)

    def _by_its_name(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method under the name of the solver, which errors and printed programs show."""

        def call(*args: Any) -> Any:
            return method(*args)

        call.__name__ = call.__qualname__ = self.__name__
        return call

    @property
    def _solver(self) -> Callable[P, R]:
        return self.__wrapped__

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the solver as before."""
        if not self._signature.is_method:
            return self._solve(self._signature.take_apart(args, kwargs))
        if not args:
            message = f"{self._signature}: expected its object first, as a method is not bound yet."
            raise TypeError(message)
        receiver, *rest = args
        result: R = self._bind(receiver, type(receiver))(*rest, **kwargs)
        return result

    def _solve(self, call: SolverCall) -> R:
        raise NotImplementedError

    # --- a method

    def __get__(self, instance: Any, owner: Any = None, /) -> Any:
        # As Python binds the solver itself: a callable object is not bound. Neither is a function
        # that was defined elsewhere and takes no object; as a class attribute it stays as it is.
        if instance is None or not hasattr(type(self._solver), "__get__"):
            return self
        if not (self._signature.is_method or _is_defined_in_a_class(self._solver)):
            return self
        return self._bind(instance, owner)

    def _bind(self, instance: Any, owner: Any) -> Any:
        get = getattr(type(self._solver), "__get__", None)
        solver = self._solver if get is None else get(self._solver, instance, owner)
        if solver is self._solver:
            if not self._signature.is_method:
                return self
            solver = types.MethodType(solver, instance)
        bound: Any = object.__new__(type(self))
        bound.__dict__.update(self.__dict__)
        bound._bound_to = (self, instance)  # noqa: SLF001 (of this class)
        bound._use(solver)  # noqa: SLF001
        return bound

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, DecoratedSolver):
            return self is other
        mine, others = self._bound_to, other._bound_to
        if mine is None or others is None:
            return False
        return mine[0] is others[0] and mine[1] is others[1]

    def __hash__(self) -> int:
        return id(self) if self._bound_to is None else hash(tuple(map(id, self._bound_to)))

    # --- copies

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # As for a function, unless it holds something that is copied: a method of a copied object.
        if self._bound_to is not None:
            unbound, instance = self._bound_to
            copied = copy.deepcopy(instance, memo)
            return self if copied is instance else unbound._bind(copied, type(copied))  # noqa: SLF001
        solver, how, options = self._made_from()
        parts = (solver, *how, *options.values())
        copied = copy.deepcopy(parts, memo)
        if copied is parts:
            return self
        solver, *rest = copied
        n = len(how)
        return type(self)(solver, *rest[:n], **dict(zip(options, rest[n:], strict=True)))

    def __reduce__(self) -> Any:
        if self._bound_to is not None:
            return _bound, self._bound_to
        for depth, known in enumerate(_decorations(self)):
            if known is self:
                path = [self.__qualname__, *["__wrapped__"] * depth, "_made_from"]
                self._made_from.__qualname__ = ".".join(path)
                return _named, (type(self), self._made_from)
        solver, how, options = self._made_from()
        # A decorated function's name leads to what it was decorated with, and that leads to it.
        for depth, known in enumerate(_decorations(solver), 1):
            if known.__wrapped__ is solver:
                outermost = _found_under_name_of(solver)
                return _made, (type(self), outermost, depth, how, options)
        return _made, (type(self), solver, 0, how, options)


def _decorations(function: Any) -> Iterator[DecoratedSolver[..., Any]]:
    """The decorated functions that the name of a function leads to, the outermost first."""
    known = _found_under_name_of(function)
    while isinstance(known, DecoratedSolver):
        yield known
        known = known.__wrapped__


def _found_under_name_of(function: Any) -> Any:
    """What the module of a function has under the function's name: usually the function itself."""
    return _found(getattr(function, "__module__", None), getattr(function, "__qualname__", None))


def _found(module: str | None, name: str | None) -> Any:
    found: Any = sys.modules.get(module or "")
    for part in (name or "<none>").split("."):
        found = getattr(found, part, None)
    return found


def _named(cls: Any, made_from: Callable[[], Any]) -> Any:
    known = _found(made_from.__module__, made_from.__qualname__.removesuffix("._made_from"))
    if isinstance(known, DecoratedSolver) and known._made_from is made_from:  # noqa: SLF001
        return known
    solver, how, options = made_from()
    return cls(solver, *how, **options)


def _is_defined_in_a_class(function: Any) -> bool:
    within, _, _ = getattr(function, "__qualname__", "").rpartition(".")
    return within != "" and not within.endswith("<locals>")


def _bound(solver: DecoratedSolver[..., Any], instance: Any) -> Any:
    return solver._bind(instance, type(instance))  # noqa: SLF001


def _made(
    cls: Any, solver: Any, depth: int, how: tuple[Any, ...], options: dict[str, Any]
) -> DecoratedSolver[..., Any]:
    for _ in range(depth):
        solver = solver.__wrapped__
    made: DecoratedSolver[..., Any] = cls(solver, *how, **options)
    return made
