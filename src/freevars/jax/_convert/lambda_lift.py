"""Bring constants that sit inside nested programs up to the outermost one.

JAX hoists a captured tracer through every nested program by itself, but leaves a concrete array
where it was met: among the constants of an inner `jit`, or as a literal when
`jax_use_simplified_jaxpr_constants` is on. To list the same captured values inside and outside a
transformation, a concrete array has to travel the way a tracer would: as one more operand of each
program on its path. Programs of a kind that is not known here keep their constants. Not here: which
of the lifted values are then hoisted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from freevars.jax import _compat
from freevars.jax._compat import Array, Eqn, Literal, Var
from freevars.jax._describe.tracers import identity

__all__ = ["lambda_lift"]


class Constants:
    """Concrete arrays met in a program, each once, with the variable that stands for it."""

    def __init__(self) -> None:
        self._found: dict[Any, tuple[Any, Var]] = {}

    @property
    def values(self) -> list[Any]:
        return [value for value, _ in self._found.values()]

    @property
    def variables(self) -> list[Var]:
        return [var for _, var in self._found.values()]

    def variable(self, value: Any, aval: Any) -> Var:
        """The variable that stands for `value`."""
        found = self._found.get(identity(value))
        if found is None:
            found = self._found[identity(value)] = (value, Var(aval))
        return found[1]

    def adopt(self, value: Any, var: Var) -> None:
        """Let `var`, which a program reads already, stand for `value`."""
        key = identity(value)
        self._found[object() if key in self._found else key] = (value, var)

    def operands_for(self, inner: Constants) -> list[Var]:
        """The variables here that stand for the values of a nested program."""
        pairs = zip(inner.values, inner.variables, strict=True)
        return [self.variable(value, var.aval) for value, var in pairs]


def lambda_lift(closed: Any) -> tuple[Any, list[Any]]:
    """The open program whose leading inputs are the constants of `closed` and of all that is nested
    in it, and these constants, each once."""
    opened, values = _compat.separate_constants(closed)
    if not _holds_constants(opened):
        return opened, values
    constants = Constants()
    jaxpr = _Lifter().open(closed, constants)
    return _compat.replace(jaxpr, invars=[*constants.variables, *jaxpr.invars]), constants.values


def _is_array_literal(v: Any) -> bool:
    # A Python number or a NumPy scalar is part of the program; an array is a captured value.
    return type(v) is Literal and (isinstance(v.val, Array) or np.ndim(v.val) > 0)


def _holds_constants(jaxpr: Any) -> bool:
    """Whether an open program, or one nested in it at any depth, holds a concrete array."""
    for eqn in jaxpr.eqns:
        for v in eqn.invars:
            if type(v) is Literal and _is_array_literal(v):
                return True
        for nested in _compat.nested_programs(eqn) if eqn.params else ():
            if _consts(nested) or _holds_constants(_opened(nested)):
                return True
    return any(_is_array_literal(v) for v in jaxpr.outvars)


def _consts(jaxpr: Any) -> list[Any]:
    return getattr(jaxpr, "consts", [])  # an open program has none before JAX 0.12


def _opened(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


class _Lifter:
    """One lift; programs that JAX shares between equations stay shared."""

    def __init__(self) -> None:
        self._memo: dict[int, tuple[Any, Any, Constants]] = {}

    def open(self, closed: Any, constants: Constants) -> Any:
        """The open program with every concrete array read from a variable of `constants`; these
        variables are not among its inputs yet."""
        jaxpr, values = _compat.separate_constants(closed)
        for var, value in zip(jaxpr.invars, values, strict=False):
            constants.adopt(value, var)
        invars = jaxpr.invars[len(values) :]
        if not _holds_constants(jaxpr):
            return _compat.replace(jaxpr, invars=invars) if values else jaxpr
        eqns = [self._eqn(eqn, constants) for eqn in jaxpr.eqns]
        outvars = [_lift_literal(v, constants) for v in jaxpr.outvars]
        return _compat.replace(jaxpr, invars=invars, eqns=eqns, outvars=outvars)

    def nested(self, closed: Any) -> tuple[Any, Constants]:
        """The closed program without constants, with one more leading input for each that it
        had."""
        known = self._memo.get(id(closed))
        if known is None:
            inner = Constants()
            jaxpr = self.open(closed, inner)
            known = self._memo[id(closed)] = (closed, _with_inputs(jaxpr, inner), inner)
        return known[1:]

    def _eqn(self, eqn: Eqn, constants: Constants) -> Eqn:
        if any(_is_array_literal(v) for v in eqn.invars):
            eqn = eqn.replace(invars=[_lift_literal(v, constants) for v in eqn.invars])
        rule = _RULES.get(eqn.primitive.name)
        return eqn if rule is None else rule(self, eqn, constants)


def _lift_literal(v: Any, constants: Constants) -> Any:
    return constants.variable(v.val, v.aval) if _is_array_literal(v) else v


def _with_inputs(jaxpr: Any, inner: Constants) -> Any:
    return _compat.close(_compat.replace(jaxpr, invars=[*inner.variables, *jaxpr.invars]))


Rule: TypeAlias = Callable[[_Lifter, Eqn, Constants], Eqn]


def _call(name: str, counter: str | None = None) -> Rule:
    """The rule for an equation that calls one nested program, its parameter `name`."""

    def rule(lifter: _Lifter, eqn: Eqn, constants: Constants) -> Eqn:
        was = eqn.params[name]
        is_open = not isinstance(was, _compat.ClosedJaxpr)
        jaxpr, inner = lifter.nested(_compat.close(was) if is_open else was)
        params = {name: _opened(jaxpr) if is_open else jaxpr}
        if counter is not None:
            params[counter] = eqn.params[counter] + len(inner.values)
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
    if any(_consts(branch) for branch in eqn.params["branches"]):
        return eqn  # JAX hoists these itself; were it to stop, they stay where they are
    # Every branch takes the same operands, so all branches share one set of constants.
    inner = Constants()
    jaxprs = [lifter.open(branch, inner) for branch in eqn.params["branches"]]
    branches = tuple(_with_inputs(jaxpr, inner) for jaxpr in jaxprs)
    index, *operands = eqn.invars
    invars = [index, *constants.operands_for(inner), *operands]
    return eqn.replace(invars=invars, params={**eqn.params, "branches": branches})


_RULES: dict[str, Rule] = {
    "jit": _call("jaxpr"),
    "closed_call": _call("call_jaxpr"),
    "core_call": _call("call_jaxpr"),
    "remat2": _call("jaxpr"),
    "checkpoint": _call("jaxpr"),
    "custom_jvp_call": _call("call_jaxpr", counter="num_consts"),
    "custom_vjp_call": _call("call_jaxpr", counter="num_consts"),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
