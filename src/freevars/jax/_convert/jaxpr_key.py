"""Turn a traced program into a key: two programs with equal keys compute the same thing.

The key holds every equation: its primitive, what it reads, its parameters down to the bits of a
literal, nested programs, and the programs of custom derivative rules. Names and source lines stay
out. Types of intermediate results stay out too: primitive, operands and parameters decide them.
Weak types stay out everywhere: they matter only while a program is traced, and leave at most
conversions that change no dtype. No function of the user's is inspected: one that the program calls
later, a callback or a rule that could not be traced, counts by identity and by the types that it
will see, weak or not. Not here: the types of arguments and results as the user sees them.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable, Mapping, Sequence
from itertools import count
from types import MappingProxyType
from typing import Any

import numpy as np
from jax import tree_util

from freevars.jax import _compat
from freevars.jax._compat import Array, Literal, Tracer
from freevars.jax._convert.key import Key
from freevars.jax._convert.rule import Rule, rule_p
from freevars.jax._convert.static import Same, scalar_key, static_key
from freevars.jax._convert.wrapped import Wrapped, is_own

__all__ = ["JaxprKey", "array_key", "frozen"]

# The primitives that call a nested program carry the name of the function it was traced from.
_NAMED = {"jit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call"}

# Beside the dtype, a conversion says whether the type of its result is weak.
_WEAK = {"convert_element_type": "weak_type"}

# Larger arrays that are part of a program are not compared by content. Libraries create small ones
# anew in each trace.
_READ_BYTES = 1 << 12

# The keys of nested programs, which JAX keeps from one trace to the next: those of jitted
# functions, its own among them. None for one that holds a function of the user's or an array.
_NESTED: weakref.WeakKeyDictionary[Any, Key | None] = weakref.WeakKeyDictionary()

_NOTHING: Mapping[int, Hashable] = MappingProxyType({})
_SCALARS = {type(None), bool, int, str, bytes, float, complex}


class JaxprKey:
    """The key of one program, and whether it holds anything of the user's that runs later.

    Args:
        jaxpr: the open program.
        known: the known keys of what runs later, by identity.
    """

    def __init__(self, jaxpr: Any, known: Mapping[int, Hashable] = _NOTHING) -> None:
        self._known = known
        self._wrapped, self._on_host = Wrapped(self._closed), Wrapped(self._closed, on_host=True)
        self.foreign = False  # whether the program holds an array or a function of the user's
        self._programs: dict[int, tuple[Any, Key]] = {}
        self._rules: dict[int, Key] = {}
        # By the identity of parameters: these, and their key. JAX shares those of equal calls.
        self._plain: dict[Any, tuple[Any, Hashable]] = {}
        self.functions = 0  # how many of the user's were met that run later
        self.has_rules = False  # whether it has equations that stand for traced rules
        self._open: list[Rule] = []  # rules whose keys are being made
        self._lowest = 0  # the first of these that one inside comes back to
        self.key: Hashable = self._program(jaxpr)

    def _program(self, jaxpr: Any) -> Key:
        known = self._programs.get(id(jaxpr))
        if known is not None:
            return known[1]
        place: dict[Any, Hashable] = dict(zip((*jaxpr.invars, *jaxpr.constvars), count()))
        places = count(len(place))
        rows: list[Hashable] = []

        def read(atoms: Sequence[Any]) -> tuple[Hashable, ...]:
            return tuple([self._literal(v) if type(v) is Literal else place[v] for v in atoms])

        for eqn in jaxpr.eqns:
            reads = read(eqn.invars)
            if _compat.keeps_dtype(eqn):
                place[eqn.outvars[0]] = reads[0]
                continue
            before = self.functions
            row = (eqn.primitive, reads, self._params(eqn), eqn.ctx)
            sees = tuple([v.aval for v in eqn.invars]) if self.functions > before else ()
            rows.append((*row, *sees))
            for v in eqn.outvars:
                place[v] = next(places)
        key = Key(
            (
                tuple([_compat.strong(v.aval) for v in jaxpr.invars]),
                tuple([self._array(c) for c in getattr(jaxpr, "consts", ())]),
                tuple(rows),
                read(jaxpr.outvars),
                frozenset([_effect(e, place) for e in jaxpr.effects]),
            )
        )
        self._programs[id(jaxpr)] = (jaxpr, key)
        return key

    def _literal(self, v: Any) -> Hashable:
        if isinstance(v.val, (Array, Tracer)):
            return self._array(v.val)
        return (_compat.strong(v.aval), np.asarray(v.val, v.aval.dtype).tobytes())

    def _params(self, eqn: Any) -> Hashable:
        params = eqn.params
        if not params:
            return ()
        if eqn.primitive is rule_p:
            return (self._rule(params["rule"]), self._closed(params["body"]), params["captured"])
        same = (eqn.primitive, *map(id, params.values()))
        if same in self._plain:
            return self._plain[same][1]
        name = eqn.primitive.name
        look = self._kept_callback if name in _compat.CALLBACKS else self._kept
        drop = "name" if name in _NAMED else _WEAK.get(name)
        before, functions = self._mark(), self.functions
        key = Key(tuple([(k, self._param(v, look)) for k, v in params.items() if k != drop]))
        if not (self.foreign or self.has_rules or self.functions > functions):
            self._plain[same] = (params, key)
        self._restore(before)
        return key

    def _param(self, x: Any, look: Any) -> Hashable:
        kind = type(x)
        if kind in _SCALARS:
            return scalar_key(x)
        if kind is tuple or kind is list or isinstance(x, tuple):
            return (kind, tuple([self._param(y, look) for y in x]))
        if kind is dict:
            pairs = [(self._param(k, look), self._param(v, look)) for k, v in x.items()]
            return (kind, tuple(pairs))
        if isinstance(x, _compat.JAXPR_TYPES):
            return self._closed(x)
        if isinstance(x, (Array, Tracer, np.ndarray)):
            return self._array(x)
        if isinstance(x, tree_util.PyTreeDef):
            return self._structure(x, look)
        parts = _compat.take_apart(x)[0] or _fields(x)
        if parts:
            return (kind, tuple([self._param(y, look) for y in parts]))
        declared = _compat.declared_parts(x)
        if declared is not None:
            self.foreign |= not is_own(kind.__module__)
            self.functions += 1
            return (kind, tuple([self._param(y, look) for y in declared]))
        if not isinstance(x, type) and (callable(x) or _compat.function_parts(x) is not None):
            return look(x)
        return static_key(x)

    def _structure(self, tree: Any, look: Any) -> Hashable:
        """A tree structure, whose metadata can hold programs."""
        node = tree.node_data()  # None for a leaf
        if node is None:
            return None
        return (
            node[0],
            self._param(node[1], look),
            *[self._structure(t, look) for t in tree.children()],
        )

    def _kept(self, x: Any) -> Hashable:
        """A function that JAX runs later. What a user's function reads then is unknown, so it
        equals only itself."""
        found = self._known.get(id(x))
        if found is not None:
            return found
        x = _compat.vmap_rule(x)
        (key,), foreign, _ = self._wrapped.look(x)
        if not foreign:
            return key
        self.foreign = True
        self.functions += 1
        return Same(x)

    def _kept_callback(self, x: Any) -> Hashable:
        """The same for one that runs on the host: nothing of it is compiled."""
        (key,), foreign, _ = self._on_host.look(x)
        self.foreign |= bool(foreign)
        return key

    def _closed(self, jaxpr: Any) -> Hashable:
        """The key of a nested program, which has constants of its own where these stay inside."""
        known = self._programs.get(id(jaxpr))
        if known is not None:
            return known[1]
        key = _NESTED.get(jaxpr)
        if key is None:
            before = self._mark()
            opened = getattr(jaxpr, "jaxpr", jaxpr)
            key = self._program(opened)
            if opened is not jaxpr:
                key = Key((key, tuple([self._array(c) for c in jaxpr.consts])))
            if not (self.foreign or self.has_rules):
                _NESTED[jaxpr] = key
            self._restore(before)
        self._programs[id(jaxpr)] = (jaxpr, key)
        return key

    def _mark(self) -> tuple[bool, bool]:
        before = self.foreign, self.has_rules
        self.foreign = self.has_rules = False
        return before

    def _restore(self, before: tuple[bool, bool]) -> None:
        self.foreign |= before[0]
        self.has_rules |= before[1]

    def _rule(self, rule: Rule) -> Hashable:
        """The key of a traced rule. One that comes back to a rule around it says how far out."""
        self.has_rules = True
        if id(rule) in self._rules:
            return self._rules[id(rule)]
        if rule in self._open:
            self._lowest = min(self._lowest, self._open.index(rule))
            return ("again", len(self._open) - self._open.index(rule))
        depth, lowest = len(self._open), self._lowest
        programs, self._programs = self._programs, {}  # a distance says nothing at another place
        self._lowest = depth
        self._open.append(rule)
        made = tuple([(self._closed(program), places) for program, places in rule.programs])
        self._open.pop()
        self._programs = programs
        told = (rule.kind, rule.smooth, rule.moved, rule.symbolic, rule.ends, rule.refusal)
        key = Key((told, rule.held, made))
        if self._lowest >= depth:
            self._rules[id(rule)] = key
        self._lowest = min(self._lowest, lowest)
        return key

    def _array(self, x: Any) -> Hashable:
        """An array that stays inside."""
        self.foreign = True
        return array_key(x)


def _effect(effect: Any, place: Mapping[Any, Hashable]) -> Hashable:
    """An effect, with the place of the variable that it is of."""
    var = _compat.input_of(effect)
    return (type(effect), place[var]) if var in place else effect


def _fields(x: Any) -> list[Any]:
    """What one of JAX's own frozen dataclasses holds, which compares by that: what is given to a
    Pallas kernel, for one, has programs in it. Nothing for any other object."""
    declared = getattr(type(x), "__dataclass_params__", None)
    if declared is None or not (declared.frozen and declared.eq and is_own(type(x).__module__)):
        return []
    return [getattr(x, f.name) for f in dataclasses.fields(x)]


def array_key(x: Any) -> Hashable:
    """A key for an array that is part of a program: by content where that is small, otherwise by
    identity."""
    if isinstance(x, Array) and not isinstance(x, Tracer):
        readable = x.nbytes <= _READ_BYTES and x.is_fully_addressable and not _compat.is_opaque(x)
        if readable:
            return (x.aval, x.sharding, np.asarray(x).tobytes())
    if _is_small_numpy(x):
        return (_compat.example_type(x), np.asarray(x).tobytes())
    return Same(x)


def frozen(x: Any) -> Any:
    """An array that becomes part of a program: a copy of one that is compared by content and could
    change."""
    if not _is_small_numpy(x):
        return x
    copy = np.array(x)
    typed = isinstance(x, _compat.TYPED_NUMPY)
    return _compat.typed_numpy(copy, weak=_compat.example_type(x).weak_type) if typed else copy


def _is_small_numpy(x: Any) -> bool:
    kinds: Any = (np.ndarray, *_compat.TYPED_NUMPY)
    return isinstance(x, kinds) and x.size * x.dtype.itemsize <= _READ_BYTES
