"""What identifies the wrappers that JAX puts around a function that it calls later.

JAX creates them anew in each trace, so their identity says nothing. They are taken apart, down to
functions of JAX and of this library, which read no state and count by identity; plain values; and
whatever the user put in, which counts by identity and is never inspected. Not here: what follows
from that.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import numpy as np
from jax import tree_util
from jax.custom_batching import custom_vmap

from freevars.jax import _compat
from freevars.jax._convert.key import Key
from freevars.jax._convert.static import Same, scalar_key, tree_key

__all__ = ["Wrapped", "is_own"]

_SCALARS = (type(None), bool, int, str, bytes, float, complex)


# What a container, a method and a partial are made of.
_PARTS: dict[type, Callable[[Any], Any]] = {
    tuple: lambda x: x,
    list: lambda x: x,
    dict: lambda x: (*x.keys(), *x.values()),
    types.MethodType: lambda x: (x.__func__, x.__self__),
    partial: lambda x: (x.func, x.args, x.keywords),
}

_FUNCTIONS_WITH_RULES: Any = (*_compat.RULED_FUNCTIONS, custom_vmap)


class Wrapped:
    """Keys of objects, and what was found in them. Each object is taken apart once, however many
    hold it.

    Args:
        program: the key of a nested program.
        on_host: whether the objects only run on the host, as callbacks. There the functions that
            equinox makes afresh in each trace, which raise its errors, count like those of JAX.
    """

    def __init__(self, program: Callable[[Any], Hashable] = Same, *, on_host: bool = False) -> None:
        self._program = program
        self._looked_through = (*_OWN, "equinox") if on_host else _OWN
        # By identity: the object, its key, and what was met in it, by identity again.
        self._known: dict[int, tuple[Any, Hashable, dict[int, Any]]] = {}
        self._met: dict[int, Any] = {}
        self._cyclic = False

    def look(self, *xs: Any) -> tuple[tuple[Hashable, ...], list[Any], list[Any]]:
        """The keys of a few objects, and what was met in them: the user's objects, and programs."""
        self._met, self._cyclic = {}, False
        keys = self._all(xs)
        if self._cyclic:  # what was met inside a cycle is known for the whole of it alone
            self._known = {}
        programs = [x for x in self._met.values() if isinstance(x, _compat.JAXPR_TYPES)]
        foreign = [x for x in self._met.values() if not isinstance(x, _compat.JAXPR_TYPES)]
        return keys, foreign, programs

    def _of(self, x: Any) -> Hashable:
        if type(x) in _SCALARS:
            return scalar_key(x)
        known = self._known.get(id(x))
        if known is None:
            self._known[id(x)] = (x, _AGAIN, {})  # ends a cycle
            around, self._met = self._met, {}
            known = self._known[id(x)] = (x, self._new(x), self._met)
            self._met = around
        elif known[1] is _AGAIN:
            self._cyclic = True
        if known[2]:
            self._met.update(known[2])
        return known[1]

    def _all(self, xs: Any) -> tuple[Hashable, ...]:
        return tuple([self._of(x) for x in xs])

    def _new(self, x: Any) -> Hashable:
        read = _PARTS.get(tuple if isinstance(x, tuple) else type(x))
        if read is not None:
            return (type(x), self._all(read(x)))
        if isinstance(x, tree_util.PyTreeDef):
            return tree_key(x)
        if isinstance(x, _compat.JAXPR_TYPES):
            self._met[id(x)] = x
            return self._program(x)
        inner = _compat.unwrapped(x)
        if inner is not None:
            return self._of(inner)
        if isinstance(x, _FUNCTIONS_WITH_RULES):
            self._of(x.fun)  # whose it is
            return Same(x)
        parts = _compat.function_parts(x)
        if parts is not None:
            return Key((type(x), self._all(parts)))
        if isinstance(x, types.FunctionType):
            return self._of_function(x)
        if isinstance(x, (set, frozenset)):
            return (type(x), frozenset(self._all(x)))
        if isinstance(x, (np.dtype, *_compat.VALUES)):
            return x
        return self._of_object(x)

    def _of_function(self, x: types.FunctionType) -> Hashable:
        if _library(x.__globals__.get("__name__")) not in self._looked_through:
            return self._foreign(x)
        if not x.__closure__:
            return Same(x)
        try:
            cells = _compat.cells_that_count(x)
        except ValueError:  # one is still empty
            return self._foreign(x)
        return Key((x.__code__, self._all(cells), self._all(x.__defaults__ or ())))

    def _of_object(self, x: Any) -> Hashable:
        if isinstance(x, np.generic):
            return (type(x), x.dtype, x.tobytes())
        kind = x if isinstance(x, type) else type(x)
        own = is_own(kind.__module__) or kind.__module__ in ("builtins", "numpy", "enum")
        if isinstance(x, (_compat.Array, _compat.Tracer, np.ndarray)) or not own:
            return self._foreign(x)
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return (kind, self._all([getattr(x, f.name) for f in dataclasses.fields(x)]))
        try:
            hash(x)
        except TypeError:
            return self._foreign(x)
        return x

    def _foreign(self, x: Any) -> Hashable:
        self._met[id(x)] = x
        return Same(x)


_AGAIN = "again"
_OWN = ("jax", "jaxlib", "freevars")


def is_own(module: str | None) -> bool:
    """Whether a module is part of JAX or of this library."""
    return _library(module) in _OWN


def _library(module: str | None) -> str:
    return (module or "").split(".", maxsplit=1)[0]
