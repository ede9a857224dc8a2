"""A jitted function, or a partial of one, is not traced again if JAX has traced it already.

`jitted.trace(...)` gives the program that `jax.jit` keeps, the same object for arguments of the
same types. So the conversion of a program that was converted before is known: all that remains is
to match the bound values with the captured ones. When to trace again is then JAX's own contract: a
jitted function is pure, and an array that it read when it was traced stays that array. Nothing is
kept for longer than JAX keeps its program. Not here: the first conversion, which is like any other.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import tree_util

from freevars.jax import _compat
from freevars.jax._convert.lambda_lift import lambda_lift
from freevars.jax._convert.program import Program
from freevars.jax._describe.tracers import identity

__all__ = ["JittedCall"]


class _Kept(NamedTuple):
    """What is known about one of JAX's programs."""

    constants: list[Any]  # the arrays in it, which are captured values too
    # By how the arguments are bound: our program, held weakly, and for each of its captured values
    # the place among the constants and the bound values.
    conversions: dict[Hashable, tuple[weakref.ref[Program], tuple[int, ...]]]


# By the jitted function, whose options count too, and by JAX's program.
_Programs: TypeAlias = "weakref.WeakKeyDictionary[Any, _Kept]"
_KEPT: weakref.WeakKeyDictionary[Any, _Programs] = weakref.WeakKeyDictionary()


class JittedCall(NamedTuple):
    """The conversion of a jitted function with some of its arguments bound."""

    kept: _Kept
    binding: Hashable
    candidates: list[Any]  # what can be a captured value: the constants, then the bound values

    @classmethod
    def of(cls, fun: Callable[..., Any], example_args: Sequence[Any]) -> JittedCall | None:
        """The call that `fun(*example_args)` is, or None where JAX keeps no trace of it."""
        jitted, args, kwargs = _take_apart(fun)
        if jitted is None or jax.config.jax_disable_jit:
            return None
        bound = tree_util.tree_leaves((args, kwargs))
        if not all(map(_is_captured, bound)):
            return None
        try:
            jaxpr = _compat.traced_program(jitted.trace(*args, *example_args, **kwargs))
        except Exception:  # noqa: BLE001 (the ordinary conversion says what is wrong)
            return None
        if jaxpr is None:
            return None
        programs = _KEPT.setdefault(jitted, weakref.WeakKeyDictionary())
        kept = programs.get(jaxpr)
        if kept is None:
            kept = programs[jaxpr] = _Kept(lambda_lift(jaxpr)[1], {})
        candidates = [*kept.constants, *bound]
        # An array in two places is one captured value, so the places count.
        first: dict[Any, int] = {}
        places = tuple([first.setdefault(identity(x), i) for i, x in enumerate(candidates)])
        return cls(kept, (len(args), tuple(kwargs), places), candidates)

    def known(self) -> tuple[Program, tuple[Any, ...]] | None:
        """The program and the captured values, where such a conversion was made before."""
        found = self.kept.conversions.get(self.binding)
        if found is None:
            return None
        program = found[0]()
        return None if program is None else (program, tuple([self.candidates[i] for i in found[1]]))

    def keep(self, program: Program, values: Sequence[Any]) -> None:
        """Remember a conversion that was made in the ordinary way."""
        if program.fixed:
            return
        places = {identity(x): i for i, x in reversed(list(enumerate(self.candidates)))}
        found = [places[key] for key in map(identity, values) if key in places]
        if len(found) == len(values):
            self.kept.conversions[self.binding] = (weakref.ref(program), tuple(found))


def _take_apart(fun: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The jitted function behind partials and methods, or None, and the arguments they bind."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    while not isinstance(fun, _compat.JITTED):
        if type(fun) in (functools.partial, tree_util.Partial):
            args, kwargs = (*fun.args, *args), {**fun.keywords, **kwargs}
            fun = fun.func
        elif type(fun) is types.MethodType:
            args = (fun.__self__, *args)
            fun = fun.__func__
        else:
            return None, (), {}
    return fun, args, kwargs


def _is_captured(x: Any) -> bool:
    """Whether a bound value is a captured one: a number is part of the program."""
    return isinstance(x, _compat.Array) or (isinstance(x, np.ndarray) and x.ndim > 0)
