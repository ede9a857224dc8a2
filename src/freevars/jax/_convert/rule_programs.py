"""The programs of one rule, traced as a derivative would run it.

Not here: which rules are traced, and what they hold (`traced_rules`).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from freevars._sequences import replaced
from freevars.jax import _compat
from freevars.jax._compat import Eqn
from freevars.jax._convert.rule import Rule

__all__ = ["trace_jvp", "trace_vjp"]


def _split(eqn: Eqn, rule: Rule) -> tuple[Any, list[Any], list[Any], list[int]]:
    """The equation as a function; the types of its captures and arguments; which of these move."""
    avals = [v.aval for v in eqn.invars]
    count = len(avals) - len(rule.smooth)
    call = _compat.as_function(eqn)
    return call, avals[:count], avals[count:], [i for i, s in enumerate(rule.smooth) if s]


def trace_jvp(eqn: Eqn, rule: Rule) -> list[Any]:
    """One program: arguments and a tangent for each smooth one, to results and the tangents of
    those that have one."""
    made = _compat.jvp_program(eqn, rule.smooth)
    if made is not None:
        program, moved = made
        rule.moved = tuple(moved)
        return [program]
    call, captures, args, places = _split(eqn, rule)
    out = [i for i, s in enumerate(rule.smooth_out) if s]

    def push(captures: Any, args: Any, dots: Any) -> list[Any]:
        results, tangents = jax.jvp(
            lambda *moved: call(*captures, *replaced(args, places, moved)),
            [args[i] for i in places],
            dots,
        )
        return [*results, *[tangents[i] for i in out]]

    dots = [args[i].to_tangent_aval() for i in places]
    return [_without_captures(jax.make_jaxpr(push)(captures, args, dots), len(captures))]


def trace_vjp(eqn: Eqn, rule: Rule) -> list[Any]:
    """Two programs: arguments to residuals and results; residuals and the cotangents of those
    results that have one, to a cotangent for each smooth argument."""
    call, captures, args, places = _split(eqn, rule)
    structure: list[Any] = []

    def forward(captures: Any, args: Any) -> list[Any]:
        results, pull = jax.vjp(
            lambda *moved: call(*captures, *replaced(args, places, moved)),
            *[args[i] for i in places],
        )
        residuals, tree = jax.tree.flatten(pull)
        structure[:] = [tree]
        return [*results, *residuals]

    def backward(residuals: Any, cotangents: Any) -> list[Any]:
        waiting = iter(cotangents)
        whole = [
            next(waiting) if s else np.zeros(v.aval.shape, jax.dtypes.float0)
            for v, s in zip(eqn.outvars, rule.smooth_out, strict=True)
        ]
        return list(jax.tree.unflatten(structure[0], residuals)(whole))

    first = _without_captures(jax.make_jaxpr(forward)(captures, args), len(captures))
    residuals = list(first.out_avals)[len(eqn.outvars) :]
    cotangents = [
        v.aval.to_tangent_aval() for v, s in zip(eqn.outvars, rule.smooth_out, strict=True) if s
    ]
    return [first, jax.make_jaxpr(backward)(residuals, cotangents)]


def _without_captures(closed: Any, count: int) -> Any:
    """The rule without the values that the body captures: JAX gives it none of them."""
    opened, consts = _compat.separate_constants(closed)
    n = len(consts)
    invars = [*opened.invars[:n], *opened.invars[n + count :]]
    return _compat.close(_compat.replace(opened, invars=invars), consts)
