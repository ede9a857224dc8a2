"""Bring constants that sit inside nested programs up to the outermost one.

JAX itself hoists a captured tracer through every nested program, but leaves a concrete array where
it was met: among the constants of an inner `jit`, or as a literal when
`jax_use_simplified_jaxpr_constants` is on. So that the captured values are the same inside and
outside a transformation, a concrete array has to travel as a tracer would: as an additional operand
of each program on its path. Programs of an unknown kind keep their constants. Not here: which of
the lifted values are then hoisted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeAlias

from freevars.jax import _compat
from freevars.jax._compat import Eqn, Literal, Var
from freevars.jax._convert.rule import Rule as TracedRule
from freevars.jax._convert.rule import rule_p
from freevars.jax._convert.traced_rules import RuleTracer, Values
from freevars.jax._convert.twins import twins
from freevars.jax._describe.tracers import identity

__all__ = ["Lifted", "lambda_lift"]


class Constants:
    """Concrete arrays and traced values met in a program, each once, with the variable that stands
    for it."""

    def __init__(self, copies: dict[Any, Any]) -> None:
        self._found: dict[Any, tuple[Any, Var]] = {}
        self._copies = copies
        self._programs: list[Any] = []  # that read them
        self._own: set[Var] | None = None

    def read_by(self, jaxpr: Any) -> None:
        """One more program that reads them."""
        self._programs.append(jaxpr)
        self._own = None

    @property
    def pairs(self) -> list[tuple[Any, Var]]:
        return list(self._found.values())

    @property
    def values(self) -> list[Any]:
        return [value for value, _ in self._found.values()]

    @property
    def variables(self) -> list[Var]:
        return [var for _, var in self._found.values()]

    def variable(self, value: Any, aval: Any) -> Any:
        """The variable for `value`, or for what `value` is a copy of; a number for a number."""
        number = _compat.literal(value)
        if number is not None:
            return number
        key = identity(value)
        if key in self._copies:
            value = self._copies[key]
            key = identity(value)
        found = self._found.get(key)
        if found is None:
            # A rule may hold a value that was traced here: it is computed where the rule is used.
            own = _compat.variable(value)
            if own is not None and own in self._computed():
                return own
            found = self._found[key] = (value, Var(aval))
        return found[1]

    def _computed(self) -> set[Var]:
        if self._own is None:
            self._own = {v for p in self._programs for v in p.invars}
            self._own |= {v for p in self._programs for eqn in p.eqns for v in eqn.outvars}
        return self._own

    def adopt(self, value: Any, var: Var) -> None:
        """Let `var`, which a program reads already, stand for `value`."""
        key = identity(value)
        self._found[object() if key in self._found else key] = (value, var)

    def operands_for(self, inner: Constants) -> list[Var]:
        """The variables here that stand for the values of a nested program."""
        return [self.variable(value, var.aval) for value, var in inner.pairs]


class Lifted(NamedTuple):
    """A program without constants, and these."""

    jaxpr: Any  # open; reads the constants and then what it read before
    values: list[Any]
    captures: bool  # whether a function with a rule captures anything that JAX gives no rule
    keys: dict[int, Hashable]  # of what JAX keeps of its own rules
    beside: list[Any]  # what functions read on their own that stay functions, as far as it shows


def lambda_lift(closed: Any, stays: Callable[[Eqn], bool] = lambda _: True) -> Lifted:
    """The open program whose leading inputs are the constants of `closed` and of all that is nested
    in it, its custom rules among that; and these constants, each once. `stays` says which rules of
    JAX's and of this library's stay functions."""
    lifter = _Lifter(stays)
    found = Values()
    lifter.rules.visit(closed, found)
    lifter.copies.update(twins(found.read, found.held))
    beside = lifter.rules.beside.values
    # Arrays of JAX's are no copies; one of the same content may well be another.
    copies = twins(found.read, [x for x in beside if not isinstance(x, _compat.Array)])
    jaxpr, values = lifter.whole(closed)
    beside = [copies.get(identity(x), x) for x in beside]
    return Lifted(jaxpr, values, lifter.captures, lifter.rules.keys, beside)


def _consts(jaxpr: Any) -> list[Any]:
    return getattr(jaxpr, "consts", [])  # an open program has none before JAX 0.12


def _opened(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


class _Lifter:
    """One lift; programs that JAX shares between equations stay shared."""

    def __init__(self, stays: Callable[[Eqn], bool]) -> None:
        self.rules = RuleTracer(self._lift_rule, stays)
        self.copies: dict[Any, Any] = {}  # what a rule holds, to what it is a copy of
        self.captures = False
        self._memo: dict[int, tuple[Any, Any, Constants]] = {}

    def whole(self, closed: Any) -> tuple[Any, list[Any]]:
        """The open program with its constants as leading inputs, and these."""
        jaxpr, constants = self.open(closed)
        return jaxpr, constants.values

    def _lift_rule(self, closed: Any) -> tuple[Any, list[Any]]:
        jaxpr, values = self.whole(closed)
        return _compat.close(jaxpr), values

    def open(self, closed: Any) -> tuple[Any, Constants]:
        """The open program with every concrete array read from a leading input, and these."""
        constants = Constants(self.copies)
        jaxpr, values = _opened(closed), list[Any]()
        if _consts(closed):
            jaxpr, values = _compat.separate_constants(closed)
        for var, value in zip(jaxpr.invars, values, strict=False):
            constants.adopt(value, var)
        constants.read_by(jaxpr)
        eqns = [self._eqn(eqn, constants) for eqn in jaxpr.eqns]
        outvars = [_lift_literal(v, constants) for v in jaxpr.outvars]
        before, after = [*jaxpr.eqns, *jaxpr.outvars], [*eqns, *outvars]
        if any(map(operator.is_not, before, after)):
            more = constants.variables[len(values) :]
            invars = [*jaxpr.invars[: len(values)], *more, *jaxpr.invars[len(values) :]]
            jaxpr = _compat.replace(jaxpr, invars=invars, eqns=eqns, outvars=outvars)
        return jaxpr, constants

    def nested(self, closed: Any) -> tuple[Any, Constants]:
        """The closed program without constants, with one more leading input for each that it
        had; the same object where nothing had to change."""
        known = self._memo.get(id(closed))
        if known is None:
            jaxpr, inner = self.open(closed)
            made = closed if jaxpr is _opened(closed) else _compat.close(jaxpr)
            known = self._memo[id(closed)] = (closed, made, inner)
        return known[1:]

    def _eqn(self, eqn: Eqn, constants: Constants) -> Eqn:
        visited = eqn
        if any(map(_is_array, eqn.invars)):
            eqn = eqn.replace(invars=[_lift_literal(v, constants) for v in eqn.invars])
        if not _compat.has_parts(eqn):
            return eqn
        name = eqn.primitive.name
        if name in _compat.RULED:
            traced, count = self.rules.rule_of(visited)
            if traced is not None:
                return self._with_rule(eqn, traced, count, constants)
            self.captures |= count > 0
            return eqn
        self.captures |= _compat.is_beside(eqn) and _compat.captured_by_rule(eqn) > 0
        rule = _RULES.get(name)
        if rule is not None:
            return rule(self, eqn, constants)
        return self.unknown(eqn) if _compat.nested_programs(eqn) else eqn

    def _with_rule(self, eqn: Eqn, rule: TracedRule, count: int, constants: Constants) -> Eqn:
        body, inner = self.nested(eqn.params["call_jaxpr"])
        self.captures |= rule.kind == "vjp" and count + len(inner.values) > 0
        invars = [
            *constants.operands_for(inner),
            *eqn.invars[:count],
            *[constants.variable(value, aval) for value, aval in self.rules.held_by(rule)],
            *eqn.invars[count:],
        ]
        params = {"rule": rule, "body": body, "captured": len(inner.values) + count}
        return eqn.replace(primitive=rule_p, invars=invars, params=params)

    def unknown(self, eqn: Eqn) -> Eqn:
        """An equation of an unknown kind that calls programs: they keep their constants, and get
        traced rules."""
        params = {k: _compat.map_programs(v, self._inside) for k, v in eqn.params.items()}
        return eqn.replace(params=params)

    def _inside(self, jaxpr: Any) -> Any:
        """A program that keeps its constants; one that is open, and so has no place for what its
        rules hold, stays as it is if they hold anything."""
        if isinstance(jaxpr, _compat.ClosedJaxpr):
            made, inner = self.nested(jaxpr)
            return jaxpr if made is jaxpr else _compat.close(_opened(made), inner.values)
        known = self._memo.get(id(jaxpr))
        if known is None:
            opened, inner = self.open(jaxpr)
            known = self._memo[id(jaxpr)] = (jaxpr, jaxpr if inner.variables else opened, inner)
        return known[1]


def _is_array(v: Any) -> bool:
    return type(v) is Literal and _compat.is_array_literal(v)


def _lift_literal(v: Any, constants: Constants) -> Any:
    return constants.variable(v.val, v.aval) if _is_array(v) else v


Handler: TypeAlias = Callable[[_Lifter, Eqn, Constants], Eqn]


def _call(name: str) -> Handler:
    """For an equation that calls one nested program, its parameter `name`."""

    def rule(lifter: _Lifter, eqn: Eqn, constants: Constants) -> Eqn:
        was = eqn.params[name]
        is_open = not isinstance(was, _compat.ClosedJaxpr)
        jaxpr, inner = lifter.nested(_compat.close(was) if is_open else was)
        params = {name: _opened(jaxpr) if is_open else jaxpr}
        return _compat.prepend_operands(eqn, constants.operands_for(inner), params)

    return rule


def _scan(lifter: _Lifter, eqn: Eqn, constants: Constants) -> Eqn:
    jaxpr, inner = lifter.nested(eqn.params["jaxpr"])
    params = {**_compat.scan_with_constants(eqn.params, len(inner.values)), "jaxpr": jaxpr}
    return _compat.prepend_operands(eqn, constants.operands_for(inner), params)


def _while(lifter: _Lifter, eqn: Eqn, constants: Constants) -> Eqn:
    cond_jaxpr, cond = lifter.nested(eqn.params["cond_jaxpr"])
    body_jaxpr, body = lifter.nested(eqn.params["body_jaxpr"])
    n = eqn.params["cond_nconsts"]
    invars = [
        *constants.operands_for(cond),
        *eqn.invars[:n],
        *constants.operands_for(body),
        *eqn.invars[n:],
    ]
    params = {
        "cond_nconsts": n + len(cond.values),
        "cond_jaxpr": cond_jaxpr,
        "body_nconsts": eqn.params["body_nconsts"] + len(body.values),
        "body_jaxpr": body_jaxpr,
    }
    return eqn.replace(invars=invars, params={**eqn.params, **params})


def _cond(lifter: _Lifter, eqn: Eqn, constants: Constants) -> Eqn:
    # Every branch takes the same operands, so each gets the constants of all.
    branches = [lifter.nested(branch) for branch in eqn.params["branches"]]
    union = Constants(lifter.copies)
    for _, inner in branches:
        union.operands_for(inner)
    operands = [constants.variable(v, var.aval) for v, var in union.pairs]
    made = tuple([_with_more_inputs(*branch, union) for branch in branches])
    index, *rest = eqn.invars
    return eqn.replace(invars=[index, *operands, *rest], params={**eqn.params, "branches": made})


def _with_more_inputs(closed: Any, inner: Constants, union: Constants) -> Any:
    """The program whose leading inputs are those of `union`, of which it reads a part."""
    if not union.variables:
        return closed
    jaxpr = _opened(closed)
    count = len(inner.values)
    own = dict(zip([identity(v) for v in inner.values], jaxpr.invars[:count], strict=True))
    leading = [own.get(identity(v)) or Var(var.aval) for v, var in union.pairs]
    return _compat.close(_compat.replace(jaxpr, invars=[*leading, *jaxpr.invars[count:]]))


def _reduce(lifter: _Lifter, eqn: Eqn, _: Constants) -> Eqn:
    # The Python function beside the program would run again whenever a derivative is taken.
    eqn = lifter.unknown(eqn)
    return eqn.replace(params=_compat.with_derived(eqn.primitive, _compat.without_derived(eqn)))


_RULES: dict[str, Handler] = {
    "reduce": _reduce,
    "jit": _call("jaxpr"),
    "closed_call": _call("call_jaxpr"),
    "core_call": _call("call_jaxpr"),
    "remat2": _call("jaxpr"),
    "checkpoint": _call("jaxpr"),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
