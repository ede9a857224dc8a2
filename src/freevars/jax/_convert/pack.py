"""A program as plain data.

What JAX compares by identity, above all its primitives, is stored by module and name. The rule of
this library's own solvers, which stays a function everywhere else, is traced here, for derivatives
in all directions at once. Any other function in the program, such as a callback, is pickled, by
cloudpickle where pickle does not take it; what neither takes is refused. Not here: captured values
(`stored`).
"""

from __future__ import annotations

import importlib
import pickle
import sys
import types
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax import tree_util
from jax.sharding import Mesh, NamedSharding

from freevars.jax import _compat
from freevars.jax._convert.arguments import ArgSpec
from freevars.jax._convert.jaxpr_key import JaxprKey
from freevars.jax._convert.lambda_lift import lambda_lift
from freevars.jax._convert.packed import (
    Equation,
    Layout,
    Listing,
    Nested,
    Node,
    Number,
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
from freevars.jax._convert.static import has_a_name
from freevars.jax._convert.stored import store, store_mesh

__all__ = ["equations_of", "pack"]


class _Packer:
    def __init__(self, name: str) -> None:
        self.listings: list[Listing] = []
        self._name = name
        self._known: dict[int, tuple[Any, int]] = {}
        self._objects: dict[int, tuple[Any, Any]] = {}
        self._rules: list[Rule] = []
        self._functions: dict[Hashable, Reference | None] = {}  # of JAX's own, by what they compute

    def place(self, jaxpr: Any) -> int:
        """The place of a program in the table; each is listed once."""
        known = self._known.get(id(jaxpr))
        if known is None:
            self.listings.append(self._listing(jaxpr))
            known = self._known[id(jaxpr)] = (jaxpr, len(self.listings) - 1)
        return known[1]

    def rules(self) -> tuple[PackedRule, ...]:
        """The traced rules that were met, with those that their own programs meet."""
        packed = []
        for rule in self._rules:  # which grows
            programs = tuple(
                [(self._nested(self._inside(p)), places) for p, places in rule.programs]
            )
            fields = {name: getattr(rule, name) for name in PackedRule._fields}
            packed.append(PackedRule(**{**fields, "programs": programs}))
        return tuple(packed)

    def traced(self, jaxpr: Any) -> tuple[Any, list[Any]]:
        """An open program whose rules are all traced, except for those found by name; and the
        arrays that the newly traced ones hold, which it reads first."""
        lifted = lambda_lift(_compat.close(jaxpr), lambda eqn: self._own_function(eqn) is not None)
        return lifted.jaxpr, lifted.values

    def _inside(self, closed: Any) -> Any:
        """The same for the program of a rule, which has no place for more arrays."""
        made, held = self.traced(getattr(closed, "jaxpr", closed))
        return closed if held else _compat.close(made)

    def _own_function(self, eqn: Any) -> Reference | None:
        """Which of JAX's own functions an equation with a custom rule is a call of, if any."""
        if eqn.primitive.name not in _compat.RULED:
            return None
        key, name = _key_of(eqn), _compat.program_name(eqn.params["call_jaxpr"])
        if (key, name) not in self._functions:
            self._functions[key, name] = _named_function(eqn, key, name)
        return self._functions[key, name]

    def _nested(self, jaxpr: Any) -> Nested:
        return Nested(self.place(jaxpr), isinstance(jaxpr, _compat.ClosedJaxpr))

    def _listing(self, jaxpr: Any) -> Listing:
        opened, constants = jaxpr, list[Any]()
        if isinstance(jaxpr, _compat.ClosedJaxpr):
            opened, constants = _compat.separate_constants(jaxpr)
            if _compat.PROGRAMS_HOLD_CONSTANTS and any(
                isinstance(x, _compat.Tracer) for x in constants
            ):
                constants = []  # an open program until then: who runs it brings them
        inputs = [*opened.constvars, *opened.invars]
        number = {v: i for i, v in enumerate(inputs)}

        def read(atom: Any) -> Any:
            if type(atom) is _compat.Literal:
                return Number(self.value(atom.val, "a literal"), self.type(atom))
            return number[atom]

        equations = []
        for eqn in opened.eqns:
            reads, types = tuple(map(read, eqn.invars)), tuple(map(self.type, eqn.outvars))
            context = self.value(eqn.ctx, "a context")
            equations.append(Equation(*self._operation(eqn), reads, types, context))
            for v in eqn.outvars:
                number[v] = len(number)
        return Listing(
            _compat.program_name(opened),
            tuple(map(store, constants)),
            len(opened.constvars),
            tuple(map(self.type, inputs)),
            tuple(equations),
            tuple(map(read, opened.outvars)),
            frozenset([self.value(e, "an effect") for e in opened.effects]),
        )

    def _operation(self, eqn: Any) -> tuple[Any, Any, frozenset[Any]]:
        where = f"the operation {eqn.primitive}"
        own = self._own_function(eqn)
        if own is not None:
            return own, {}, frozenset()
        if eqn.primitive.name in _compat.RULED:
            rule = _compat.program_name(eqn.params["call_jaxpr"])
            message = (
                f"{self._name} holds the custom derivative rule of {rule}, which stays a Python"
                " function: it could not be traced alone."
            )
            raise pickle.PicklingError(message)
        given = _compat.without_derived(eqn)
        params = {k: self.value(v, f"{k} of {where}") for k, v in given.items()}
        effects = frozenset([self.value(e, where) for e in eqn.effects])
        return self.value(eqn.primitive, where), params, effects

    def type(self, x: Any) -> Any:
        """The type of a variable or literal."""
        return self.value(x.aval, "a type")

    def value(self, x: Any, where: str) -> Any:
        """A parameter as data; `where` is what an error calls it."""
        kind = type(x)
        if x is None or kind in _PLAIN:
            return x
        if isinstance(x, (tuple, list)):
            parts = [self.value(y, where) for y in x]
            return kind(*parts) if hasattr(x, "_fields") else kind(parts)
        if kind is dict:
            return {self.value(k, where): self.value(v, where) for k, v in x.items()}
        if isinstance(x, _compat.JAXPR_TYPES):
            return self._nested(x)
        if isinstance(x, Rule):
            if x not in self._rules:
                self._rules.append(x)
            return RuleAt(self._rules.index(x))
        known = self._objects.get(id(x))
        if known is None:
            known = self._objects[id(x)] = (x, self._object(x, where))
        return known[1]

    def _object(self, x: Any, where: str) -> Any:
        parts = _compat.parts_of(x)
        if parts is not None:
            return Remade(type(x), {k: self.value(v, where) for k, v in parts.items()})
        if isinstance(x, NamedSharding):
            return Layout(self.value(x.mesh, where), x.spec)
        if isinstance(x, tree_util.PyTreeDef):
            return Structure(self._node(x, where))
        if isinstance(x, frozenset):
            return frozenset([self.value(y, where) for y in x])
        packed = _pack_object(x)
        return self._pickled(x, where) if packed is x else packed

    def _node(self, tree: Any, where: str) -> Node | None:
        node = tree.node_data()  # None for a leaf
        if node is None:
            return None
        kind, metadata = (self.value(part, f"a tree structure in {where}") for part in node)
        return Node(kind, metadata, tuple([self._node(t, where) for t in tree.children()]))

    def _pickled(self, x: Any, where: str) -> Any:
        """What is left to the pickler; what none takes is refused."""
        if isinstance(x, Program):  # it refuses what it holds when it is pickled
            return x
        errors = []
        for name in ("pickle", "cloudpickle"):
            try:
                data = importlib.import_module(name).dumps(x)
            except Exception as error:  # noqa: BLE001 (what pickling raises has no common class)
                errors.append(error)
            else:
                return x if name == "pickle" else Pickled(data)
        message = f"{self._name} holds {x!r} in {where}, which cannot be pickled: {errors[0]}."
        if isinstance(errors[1], ImportError):
            message += " cloudpickle, which takes local functions, is not installed."
        raise pickle.PicklingError(message)


_PLAIN = {bool, int, float, complex, str, bytes, np.dtype}


def _pack_object(x: Any) -> Any:
    """An object that does not survive pickling, as data; anything else as it is."""
    if isinstance(x, (_compat.Array, _compat.Tracer, *_compat.TYPED_NUMPY)):
        return store(x)
    if isinstance(x, Mesh):
        return x if x.empty else store_mesh(x)
    if isinstance(x, type):
        return x if has_a_name(x) else _class_reference(x) or x
    own = type(x).__module__.partition(".")[0] in ("jax", "jaxlib")
    named = own or isinstance(x, _compat.Primitive) or not callable(x)
    return (_reference(x) if named else None) or x


_PLACES: dict[int, tuple[Any, Reference]] = {}


def _reference(x: Any) -> Reference | None:
    """The module and name of an object that equals only itself, so it must be found, not
    recreated."""
    kind: Any = type(x)
    if kind.__eq__ is not object.__eq__:
        return None
    if id(x) not in _PLACES:
        for module, name, value in _named_objects(kind):
            _PLACES[id(value)] = (value, Reference(module, name))
    found = _PLACES.get(id(x))
    return None if found is None else found[1]


def _class_reference(kind: type) -> Reference | None:
    """A class without a name of its own, as that of an object that has one: of each of its tokens
    lineax makes a class."""
    found = _named_objects(kind)
    return Reference(*found[0][:2], its_class=True) if found else None


def _named_objects(kind: type) -> list[tuple[str, str, Any]]:
    return [
        (name, attribute, value)
        for name, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType) and name != "__main__"
        for attribute, value in list(vars(module).items())
        if type(value) is kind
    ]


def _named_function(eqn: Any, key: Hashable, name: str) -> Reference | None:
    for kind in _compat.RULED_FUNCTIONS:
        for module, attribute, function in _named_objects(kind):
            if getattr(function, "__name__", "") != name or module.partition(".")[0] != "jax":
                continue
            if [_key_of(e) for e in equations_of(function, eqn.invars)] == [key]:
                return Reference(module, attribute)
    return None


def equations_of(function: Any, args: Sequence[Any]) -> list[Any]:
    """The equations that a function is traced to, without dead code."""
    try:
        jaxpr = jax.make_jaxpr(function)(*[v.aval for v in args]).jaxpr
        return list(_compat.drop_dead_code(jaxpr, [True] * len(args))[0].eqns)
    except Exception:  # noqa: BLE001 (it takes other arguments)
        return []


def _key_of(eqn: Any) -> Hashable:
    """The key of an equation alone."""
    inputs, outputs = ([_compat.Var(v.aval) for v in vs] for vs in (eqn.invars, eqn.outvars))
    eqn = eqn.replace(invars=inputs, outvars=outputs)
    return JaxprKey(_compat.make_program(inputs, [eqn], outputs, eqn.effects, "")).key


def pack(program: Program) -> Packed:
    """The program as data."""
    packer = _Packer(program.name)
    jaxpr, held = packer.traced(program.traced)

    def spec(x: ArgSpec) -> Any:
        statics = tuple([(i, packer.value(leaf.value, "a static leaf")) for i, leaf in x.statics])
        tree = packer.value(x.tree, "the arguments and results")
        return tree, packer.value(x.types, "a type"), statics

    return Packed(
        release=jax.__version__,
        name=program.name,
        main=packer.place(jaxpr),
        rules=packer.rules(),
        listings=tuple(packer.listings),
        fixed=tuple(map(store, [*held, *program.fixed])),
        inputs=spec(program.inputs),
        outputs=spec(program.outputs),
    )
