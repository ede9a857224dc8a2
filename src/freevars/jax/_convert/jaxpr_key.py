"""When do two traced programs compute the same thing? Turn a program into a key that decides it.

The key holds every equation: its primitive, what it reads, its parameters down to the bits of a
literal, nested programs, and the functions that JAX keeps for later (custom derivative rules,
callbacks), which `callable_key` compares by code and content. Names and source lines stay
out. Types of intermediate results stay out too: primitive, operands and parameters decide them. Not
here: the types of arguments and results as the user sees them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Hashable
from typing import Any

import numpy as np
from jax import tree_util

from freevars.jax import _compat
from freevars.jax._compat import Array, Literal, Tracer
from freevars.jax._convert.callable_key import CallableKeys, Same, scalar_key
from freevars.jax._convert.static import static_key, tree_key

__all__ = ["JaxprKey"]

# The primitives that call a nested program carry the name of the function it was traced from.
_NAMED = {"jit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call"}

# Above this size the content of a NumPy array that a rule or a callback holds is not read: a
# function that holds one equals itself and nothing else.
_READ_BYTES = 1 << 20

# The keys of nested programs, which JAX keeps from one trace to the next: those of jitted
# functions, its own among them. None for one that holds a function of the user's or an array, which
# can change.
_NESTED: weakref.WeakKeyDictionary[Any, Hashable | None] = weakref.WeakKeyDictionary()

_SCALARS = {type(None), bool, int, str, bytes, float, complex}


class JaxprKey:
    """The key of one program, and the arrays that its rules and callbacks hold for later."""

    def __init__(self, jaxpr: Any) -> None:
        self.held: list[Any] = []
        self._callables = CallableKeys(self._look)
        self._programs: dict[int, tuple[Any, Hashable]] = {}
        self.key: Hashable = self._program(jaxpr)

    @property
    def foreign(self) -> bool:
        """Whether the program holds an array or a function of the user for later."""
        return bool(self.held) or self._callables.foreign

    def of(self, x: Any) -> Hashable:
        """The key of a static leaf that belongs to the program."""
        return self._param(x)

    def _program(self, jaxpr: Any) -> Hashable:
        known = self._programs.get(id(jaxpr))
        if known is not None:
            return known[1]
        number: dict[Any, int] = {}
        for v in jaxpr.invars:
            number[v] = len(number)
        for v in getattr(jaxpr, "constvars", ()):
            number[v] = len(number)
        rows = []
        for eqn in jaxpr.eqns:
            reads = tuple(
                [self._literal(v) if type(v) is Literal else number[v] for v in eqn.invars]
            )
            rows.append((eqn.primitive, reads, self._params(eqn), eqn.ctx))
            for v in eqn.outvars:
                number[v] = len(number)
        key = (
            tuple([v.aval for v in jaxpr.invars]),
            tuple([self._param(c) for c in getattr(jaxpr, "consts", ())]),
            tuple(rows),
            tuple([self._literal(v) if type(v) is Literal else number[v] for v in jaxpr.outvars]),
            frozenset(jaxpr.effects),
        )
        self._programs[id(jaxpr)] = (jaxpr, key)
        return key

    def _literal(self, v: Any) -> Hashable:
        if isinstance(v.val, (Array, Tracer)):
            return self._held(v.val)
        return (v.aval, np.asarray(v.val, v.aval.dtype).tobytes())

    def _params(self, eqn: Any) -> Hashable:
        params = eqn.params
        if not params:
            return ()
        named = eqn.primitive.name in _NAMED
        return tuple(
            [(k, self._param(v)) for k, v in params.items() if not (named and k == "name")]
        )

    def _param(self, x: Any) -> Hashable:
        kind = type(x)
        if kind in _SCALARS:
            return scalar_key(x)
        if kind is tuple or kind is list or isinstance(x, tuple):
            return (kind, tuple([self._param(y) for y in x]))
        if kind is dict:
            return (kind, tuple([(self._param(k), self._param(v)) for k, v in x.items()]))
        if isinstance(x, _compat.JAXPR_TYPES):
            return self._closed(x)
        said = self._look(x)
        if said is not None and said[0] == "key":
            return said[1]
        if said is not None or (callable(x) and not isinstance(x, type)):
            return self._callables.of(x)
        return static_key(x)

    def _closed(self, jaxpr: Any) -> Hashable:
        if jaxpr not in _NESTED:
            alone = JaxprKey(getattr(jaxpr, "jaxpr", jaxpr))
            can_change = alone.foreign or bool(getattr(jaxpr, "consts", ()))
            _NESTED[jaxpr] = None if can_change else alone.key
        known = _NESTED[jaxpr]
        if known is not None:
            return known
        opened = getattr(jaxpr, "jaxpr", jaxpr)
        consts = tuple([self._param(c) for c in getattr(jaxpr, "consts", ())])
        return (self._program(opened), consts)

    def _held(self, x: Any) -> Hashable:
        self.held.append(x)
        return Same(x)

    def _look(self, x: Any) -> tuple[str, Any] | None:
        """What JAX's own objects mean to the walk through a function."""
        if isinstance(x, (Array, Tracer)):
            return ("key", self._held(x))
        if isinstance(x, np.ndarray):
            self.held.append(x)
            readable = x.nbytes <= _READ_BYTES and not x.dtype.hasobject
            content = hashlib.blake2b(x.tobytes()).digest() if readable else object()
            return ("key", (Same(x), x.dtype, x.shape, content))
        if isinstance(x, (np.generic, np.dtype)):
            return ("key", (type(x), x.dtype, x.tobytes()) if isinstance(x, np.generic) else x)
        if isinstance(x, (*_compat.VALUES, tree_util.PyTreeDef)):
            return ("key", tree_key(x) if isinstance(x, tree_util.PyTreeDef) else _hashable(x))
        if isinstance(x, _compat.JAXPR_TYPES):
            return ("key", self._closed(x))
        if isinstance(x, _compat.EQUATION):  # held by what JAX puts around a rule
            types = tuple([v.aval for v in (*x.invars, *x.outvars)])
            return ("key", (x.primitive, types, self._params(x)))
        parts = _compat.function_parts(x)
        if parts is not None:
            return ("parts", parts)
        if dataclasses.is_dataclass(x) and not isinstance(x, type) and _is_jax(type(x)):
            return ("parts", tuple(getattr(x, f.name) for f in dataclasses.fields(x)))
        if isinstance(x, _compat.JITTED):
            # Its options cannot be read, so identity counts; what it calls may hold arrays.
            return ("key", (Same(x), self._callables.of(x.__wrapped__)))
        return None


def _hashable(x: Any) -> Hashable:
    try:
        hash(x)
    except TypeError:
        return Same(x)
    return x


def _is_jax(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "jax"
