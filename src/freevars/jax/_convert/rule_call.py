"""Run traced rules: turn each equation that has one into a JAX function with a custom rule.

The rule covers the arguments. What the body and the rule capture are operands as well, so that they
can be replaced by other values. With respect to these, the derivative is that of the body, as for
any function without a rule: with c captured,

    d f(x; c) = rule(x; c) dx + df/dc dc.

A second derivative differentiates both terms, and the rule's program reads c there too. Not here:
the derivative of the body (`rule_captures`), and how a rule becomes a program (`traced_rules`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from freevars._sequences import replaced
from freevars.errors import CaptureError
from freevars.jax import _compat
from freevars.jax._compat import Eqn
from freevars.jax._convert.dependence import reached
from freevars.jax._convert.rule import TOWER, Rule, rule_p
from freevars.jax._convert.rule_captures import along_captures, total, with_captures

__all__ = ["with_rules"]


def with_rules(jaxpr: Any) -> Any:
    """The open program with JAX's own equations in place of those for traced rules."""
    return _Maker().open(jaxpr)


class _Maker:
    """One pass; programs that are shared between equations stay shared."""

    def __init__(self) -> None:
        self._memo: dict[int, tuple[Any, Any]] = {}

    def open(self, jaxpr: Any) -> Any:
        eqns = [self._eqn(eqn) for eqn in jaxpr.eqns]
        same = all(a is b for a, b in zip(eqns, jaxpr.eqns, strict=True))
        return jaxpr if same else _compat.replace(jaxpr, eqns=eqns)

    def _nested(self, jaxpr: Any) -> Any:
        if id(jaxpr) not in self._memo:
            was = getattr(jaxpr, "jaxpr", jaxpr)
            made = self.open(was)
            if made is was:
                made = jaxpr
            elif was is not jaxpr:
                made = _compat.close(made, jaxpr.consts)
            self._memo[id(jaxpr)] = (jaxpr, made)
        return self._memo[id(jaxpr)][1]

    def _eqn(self, eqn: Eqn) -> Eqn:
        if eqn.primitive is rule_p:
            return _native(eqn)
        if not _compat.has_parts(eqn):
            return eqn
        params = {k: _compat.map_programs(v, self._nested) for k, v in eqn.params.items()}
        same = all(params[k] is v for k, v in eqn.params.items())
        return eqn if same else eqn.replace(params=params)


def _native(eqn: Eqn) -> Eqn:
    call = _function(eqn.params["rule"], eqn.params["body"], eqn.params["captured"])
    with jax.disable_jit(disable=False):  # one equation has to come of it
        (made,) = jax.make_jaxpr(call)(*[v.aval for v in eqn.invars]).eqns
    # It takes each operand once and in order, whatever it reads of them.
    return eqn.replace(primitive=made.primitive, params=made.params, effects=made.effects)


def _function(rule: Rule, body: Any, captured: int) -> Callable[..., Any]:
    """The function of what the body captures, what the rule holds, and the arguments."""
    opened = with_rules(getattr(body, "jaxpr", body))
    held = captured + rule.held

    def call(*operands: Any) -> list[Any]:
        return _compat.evaluate(opened, [*operands[:captured], *operands[held:]])

    call.__name__ = call.__qualname__ = rule.name
    if rule.ends:
        return _without_rule(call, rule.name)
    if rule.kind == "jvp" or not any(rule.smooth):  # then no rule ever runs
        return _with_jvp(call, rule, captured, held)
    by_rule = _with_vjp(call, rule, captured, held)
    if not any(_compat.is_smooth(v.aval) for v in opened.invars[:captured]):
        return by_rule
    return with_captures(by_rule, call, rule, captured)


def _without_rule(call: Callable[..., Any], name: str) -> Any:
    """The function where its rules, each of which leads to the next, are at an end."""
    function = jax.custom_jvp(call)

    @function.defjvp  # type: ignore[untyped-decorator]
    def _(*_: Any) -> Any:
        message = (
            f"{name}: its derivative rule leads to itself with other static arguments, without end,"
            f" and a conversion holds the first {TOWER} of such rules: a derivative of this order"
            " is not in it. Take it of the function itself, or convert a function that has the"
            " inner derivatives in it."
        )
        raise CaptureError(message)

    return function


def _program(rule: Rule, which: int) -> Callable[[Sequence[Any], Sequence[Any]], list[Any]]:
    """One of the rule's programs, of what it holds and the rest. It is made when it first runs: it
    may call its own function again."""

    def run(held: Sequence[Any], rest: Sequence[Any]) -> list[Any]:
        closed, places = rule.programs[which]
        if which not in rule.native:
            rule.native[which] = with_rules(getattr(closed, "jaxpr", closed))
        return _compat.evaluate(rule.native[which], [*[held[i] for i in places], *rest])

    return run


def _with_jvp(call: Callable[..., Any], rule: Rule, captured: int, held: int) -> Any:
    function = jax.custom_jvp(call)
    push = _pushforward(rule) if rule.refusal is None else _refuse(rule)

    @partial(function.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        found = []
        if not all(map(_compat.is_symbolic_zero, tangents[held:])):
            found.append(push(primals[captured:held], primals[held:], tangents[held:]))
        by_captures = along_captures(call, rule, captured, primals, tangents)
        if by_captures is not None:
            found.append(by_captures)
        if not found:
            found.append((call(*primals), [None] * len(rule.smooth_out)))
        results = found[0][0]
        terms = zip(*[dots for _, dots in found], strict=True)
        return results, [
            total(result, [dot for dot in dots if smooth and dot is not None])
            for result, smooth, dots in zip(results, rule.smooth_out, terms, strict=True)
        ]

    return function


def _pushforward(rule: Rule) -> Callable[..., tuple[list[Any], list[Any]]]:
    """The rule of a `custom_jvp`: what it holds, the arguments and their tangents, to the results
    and a tangent for each, None where that is known to be zero."""
    run = _program(rule, 0)

    def push(values: Any, args: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        given = [t for t, s in zip(tangents, rule.smooth, strict=True) if s]
        moving = [i for i, t in enumerate(given) if not _compat.is_symbolic_zero(t)]
        dots = list(map(_dense, given))
        count = len(rule.moved)
        if not rule.symbolic or len(moving) == len(given):
            made = run(values, [*args, *dots])
            waiting = iter(made[count:])
            return made[:count], [next(waiting) if m else None for m in rule.moved]
        # The rule asks which tangents are zero, and its program is that for none. It is linear in
        # them, so that its derivative along the others at zero is what it makes of these alone:
        # what belongs to a tangent that is known to be zero is not computed, and not added.
        made, along = jax.jvp(
            lambda *moved: run(values, [*args, *replaced(dots, moving, moved)]),
            [jnp.zeros_like(dots[i]) for i in moving],
            [dots[i] for i in moving],
        )
        program, places = rule.programs[0]
        before = len(places) + len(args)
        depends = reached(getattr(program, "jaxpr", program), [before + i for i in moving])
        waiting = iter(zip(along[count:], depends[count:], strict=True))
        pairs = [next(waiting) if m else (None, False) for m in rule.moved]
        return made[:count], [dot if reads else None for dot, reads in pairs]

    return push


def _refuse(rule: Rule) -> Callable[..., Any]:
    """The replacement for a rule that always raises."""
    assert rule.refusal is not None  # noqa: S101
    kind, args = rule.refusal

    def refuse(*_: Any) -> Any:
        raise kind(*args)

    return refuse


def _with_vjp(call: Callable[..., Any], rule: Rule, captured: int, held: int) -> Any:
    function = jax.custom_vjp(call)
    if rule.refusal is not None:
        function.defvjp(_refuse(rule), _refuse(rule))
        return function
    forward, backward = _program(rule, 0), _program(rule, 1)

    def fwd(*operands: Any) -> Any:
        values = list(operands[captured:held])
        made = forward(values, operands[held:])
        count = len(rule.smooth_out)
        return made[:count], (values, made[count:])

    def bwd(residuals: Any, cotangents: Any) -> Any:
        values, made = residuals
        smooth = [ct for ct, s in zip(cotangents, rule.smooth_out, strict=True) if s]
        waiting = iter(backward(values, [*made, *smooth]))
        return (*[None] * held, *[next(waiting) if s else None for s in rule.smooth])

    function.defvjp(fwd, bwd)
    return function


def _dense(x: Any) -> Any:
    """A tangent as an array, also where it is a symbolic zero."""
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
