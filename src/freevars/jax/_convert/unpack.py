"""A program from plain data, shared with every other that computes the same.

Not here: how the data came to be (`pack`).
"""

from __future__ import annotations

import importlib
import pickle
from typing import Any

import jax
from jax.sharding import NamedSharding

from freevars.jax import _compat
from freevars.jax._convert.arguments import ArgSpec
from freevars.jax._convert.convert import share
from freevars.jax._convert.jaxpr_key import JaxprKey, array_key
from freevars.jax._convert.pack import equations_of
from freevars.jax._convert.packed import (
    Equation,
    Layout,
    Listing,
    Nested,
    Node,
    Packed,
    PackedRule,
    Pickled,
    Reference,
    Remade,
    RuleAt,
    Structure,
)
from freevars.jax._convert.program import Program
from freevars.jax._convert.rule import Rule
from freevars.jax._convert.static import Static
from freevars.jax._convert.stored import Devices, Stored, Typed, restore, restore_mesh

__all__ = ["unpack"]


def unpack(packed: Packed) -> Program:
    """The program that the data describe, shared with every other that computes the same."""
    if packed.release != jax.__version__:
        message = (
            f"the closure {packed.name} was pickled with JAX {packed.release}, and this is JAX"
            f" {jax.__version__}: the parts of a program differ between releases. Keep `values`"
            " instead, and convert the function again here."
        )
        raise pickle.UnpicklingError(message)
    unpacker = _Unpacker(packed)

    def spec(x: Any) -> ArgSpec:
        tree, types, statics = x
        leaves = tuple([(i, Static(unpacker.value(leaf))) for i, leaf in statics])
        return ArgSpec(unpacker.value(tree), unpacker.value(types), leaves)

    fixed = [restore(x) for x in packed.fixed]
    places = tuple([(i, array_key(x)) for i, x in enumerate(fixed)])
    jaxpr, _ = unpacker.made[packed.main]
    inputs, outputs = spec(packed.inputs), spec(packed.outputs)
    return share(jaxpr, JaxprKey(jaxpr), fixed, places, inputs, outputs, packed.name)


class _Unpacker:
    def __init__(self, packed: Packed) -> None:
        self.made: list[tuple[Any, list[Any]]] = []  # open, with the constants of its first inputs
        self._name = packed.name
        self._objects: dict[int, tuple[Any, Any]] = {}
        self._rules = [object.__new__(Rule) for _ in packed.rules]
        for listing in packed.listings:  # nested ones come first
            self.made.append(self._program(listing))
        for rule, packed_rule in zip(self._rules, packed.rules, strict=True):
            self._fill(rule, packed_rule)

    def _fill(self, rule: Rule, packed: PackedRule) -> None:
        """Fill in a rule, which exists already because its programs may refer to it."""
        vars(rule).update(packed._asdict(), raw=[], native={})
        rule.programs = [(self.value(program), places) for program, places in packed.programs]

    def _program(self, listing: Listing) -> tuple[Any, list[Any]]:
        variables = [_compat.Var(self.value(t)) for t in listing.inputs]
        inputs = list(variables)

        def atom(x: Any) -> Any:
            return (
                variables[x]
                if type(x) is int
                else _compat.Literal(self.value(x.value), self.value(x.aval))
            )

        eqns = []
        for e in listing.equations:
            reads = list(map(atom, e.reads))
            results = [_compat.Var(self.value(t)) for t in e.gives]
            variables += results
            eqns.append(self._equation(e, reads, results))
        outputs = list(map(atom, listing.outputs))
        effects = frozenset(map(self.value, listing.effects))
        jaxpr = _compat.make_program(inputs, eqns, outputs, effects, listing.name)
        if listing.unbound:
            at = listing.unbound
            jaxpr = _compat.replace(jaxpr, constvars=inputs[:at], invars=inputs[at:])
        return jaxpr, [restore(c) for c in listing.constants]

    def _equation(self, e: Equation, reads: list[Any], results: list[Any]) -> Any:
        primitive = self.value(e.primitive)
        if isinstance(primitive, _compat.RULED_FUNCTIONS):
            (made,) = equations_of(primitive, reads)
            return made.replace(invars=reads, outvars=results, ctx=self.value(e.context))
        params = _compat.with_derived(primitive, {k: self.value(v) for k, v in e.params.items()})
        effects = frozenset(map(self.value, e.effects))
        return _compat.make_equation(
            primitive, reads, results, params, effects, self.value(e.context)
        )

    def value(self, x: Any) -> Any:
        """A parameter from data."""
        make = _UNPACK.get(type(x))
        if make is not None:
            return make(self, x)
        if isinstance(x, tuple):
            return type(x)(*map(self.value, x))
        return x

    def _remade(self, x: Remade) -> Any:
        known = self._objects.get(id(x))
        if known is None:
            parts = {k: self.value(v) for k, v in x.parts.items()}
            known = self._objects[id(x)] = (x, _compat.remake(x.kind, parts))
        return known[1]

    def _pickled(self, x: Pickled) -> Any:
        known = self._objects.get(id(x))
        if known is None:
            known = self._objects[id(x)] = (x, pickle.loads(x.data))  # noqa: S301 (as `from_bytes`)
        return known[1]

    def _node(self, x: Node | None) -> Any:
        if x is None:
            return _compat.make_structure(None, ())
        node = self.value(x.kind), self.value(x.metadata)
        return _compat.make_structure(node, list(map(self._node, x.children)))

    def _reference(self, x: Reference) -> Any:
        try:
            found = getattr(importlib.import_module(x.module), x.name)
            return type(found) if x.its_class else found
        except (ImportError, AttributeError):
            message = f"{self._name} computes with {x.module}.{x.name}, which does not exist here."
            raise pickle.UnpicklingError(message) from None

    def _nested(self, x: Nested) -> Any:
        jaxpr, constants = self.made[x.place]
        if not x.closed:
            return jaxpr
        return _compat.close(jaxpr, constants)

    def _mesh(self, x: Devices) -> Any:
        mesh = restore_mesh(x)
        if mesh is None:
            message = (
                f"{self._name} computes on a mesh {dict(zip(x.names, x.ids.shape, strict=True))} of"
                f" {x.platform} devices, some of which do not exist here."
            )
            raise pickle.UnpicklingError(message)
        return mesh


_UNPACK: dict[type, Any] = {
    tuple: lambda self, x: tuple(map(self.value, x)),
    list: lambda self, x: list(map(self.value, x)),
    dict: lambda self, x: {self.value(k): self.value(v) for k, v in x.items()},
    Stored: lambda _, x: restore(x),
    Typed: lambda _, x: restore(x),
    frozenset: lambda self, x: frozenset(map(self.value, x)),
    Structure: lambda self, x: self._node(x.root),
    Layout: lambda self, x: NamedSharding(self.value(x.mesh), x.spec),
    RuleAt: lambda self, x: self._rules[x.place],
    Pickled: _Unpacker._pickled,  # noqa: SLF001
    Remade: _Unpacker._remade,  # noqa: SLF001
    Reference: _Unpacker._reference,  # noqa: SLF001
    Nested: _Unpacker._nested,  # noqa: SLF001
    Devices: _Unpacker._mesh,  # noqa: SLF001
}
