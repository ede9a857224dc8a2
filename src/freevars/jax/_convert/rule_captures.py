"""The derivative along what a function with a custom rule captures: that of its body.

Such a body is often one without a derivative (an open-ended loop, code on the host, a bisection):
that is what the rule is for. A derivative that is asked for is refused then. Not here: the rule
itself (`rule_call`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from freevars._sequences import replaced
from freevars.errors import CaptureError
from freevars.jax import _compat
from freevars.jax._convert.rule import Rule

__all__ = ["along_captures", "reached", "total", "with_captures"]


def total(result: Any, dots: list[Any]) -> Any:
    return sum(dots[1:], start=dots[0]) if dots else SymbolicZero.from_primal_value(result)


def along_captures(
    call: Callable[..., Any],
    rule: Rule,
    captured: int,
    primals: Sequence[Any],
    tangents: Sequence[Any],
) -> Any:
    """The results of the body and their tangents along what it captures; None where none moves."""
    moving = [i for i in range(captured) if not _compat.is_symbolic_zero(tangents[i])]
    if not moving:
        return None
    _check_body(call, rule, primals, moving)

    def body(*moved: Any) -> Any:
        whole = list(primals)
        for i, value in zip(moving, moved, strict=True):
            whole[i] = value
        return call(*whole)

    return jax.jvp(body, [primals[i] for i in moving], [tangents[i] for i in moving])


def with_captures(by_rule: Any, call: Callable[..., Any], rule: Rule, captured: int) -> Any:
    """A function with a `custom_vjp` and the derivative along what it captures."""
    count = len(rule.smooth_out)

    @jax.custom_jvp  # type: ignore[untyped-decorator]
    def attach(*results_and_operands: Any) -> list[Any]:
        return list(results_and_operands[:count])

    @partial(attach.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        results, dots = list(primals[:count]), tangents[:count]
        operands, moved = primals[count:], tangents[count : count + captured]
        found = along_captures(call, rule, captured, operands, moved)
        if found is None:
            return results, list(dots)
        by_captures = found[1]
        return results, [
            total(y, [by, *([] if _compat.is_symbolic_zero(dot) else [dot])] if smooth else [])
            for y, dot, by, smooth in zip(results, dots, by_captures, rule.smooth_out, strict=True)
        ]

    @jax.jit  # type: ignore[untyped-decorator]
    def whole(*operands: Any) -> list[Any]:
        fixed = map(jax.lax.stop_gradient, operands[:captured])
        return attach(*by_rule(*fixed, *operands[captured:]), *operands)

    return whole


def _check_body(
    call: Callable[..., Any], rule: Rule, primals: Sequence[Any], moving: Sequence[int]
) -> None:
    """Raise where the derivative of the body is none: what it captures moves a result only through
    comparisons and rounding, as in a bisection, or the body has no reverse mode, where that of the
    rule is all that the function is known to have."""
    some = [primals[i] for i in moving]

    def body(*moved: Any) -> list[Any]:
        results = call(*replaced(primals, moving, moved))
        return [y for y, smooth in zip(results, rule.smooth_out, strict=True) if smooth]

    program: Any = jax.make_jaxpr(body)(*some)
    opened = getattr(program, "jaxpr", program)
    first = len(opened.invars) - len(some)
    for i, value in enumerate(some):
        zeros = [True] * len(opened.outvars)
        with _refusing(rule):
            jax.eval_shape(partial(_watch, body, some, i, zeros), value)
        for zero, depends in zip(zeros, reached(opened, [first + i]), strict=True):
            if zero and depends:
                raise _no_derivative(rule, "it is only compared or rounded there")
    if rule.kind == "vjp":
        with _refusing(rule):
            jax.eval_shape(lambda some: _pull(body, some), some)


def _pull(body: Callable[..., Any], some: Sequence[Any]) -> Any:
    results, pull = jax.vjp(body, *some)
    return pull(list(map(jnp.ones_like, results)))


def _watch(
    body: Callable[..., Any], some: Sequence[Any], i: int, zeros: list[bool], value: Any
) -> Any:
    """The tangents of the body along one value; says of each result if it is known to be zero."""

    @jax.custom_jvp  # type: ignore[untyped-decorator]
    def watched(*ys: Any) -> list[Any]:
        return list(ys)

    @partial(watched.defjvp, symbolic_zeros=True)
    def _(ys: Any, dots: Any) -> Any:
        zeros[:] = map(_compat.is_symbolic_zero, dots)
        return list(ys), list(dots)

    return jax.jvp(lambda v: watched(*body(*replaced(some, [i], [v]))), (value,), (value,))


@contextmanager
def _refusing(rule: Rule) -> Iterator[None]:
    """Say whose derivative it is that a body does not have."""
    try:
        yield
    except (NotImplementedError, TypeError, ValueError) as error:
        raise _no_derivative(rule, str(error).partition(". ")[0].rstrip(".")) from error


def _no_derivative(rule: Rule, why: str) -> CaptureError:
    return CaptureError(
        f"{rule.name}: its custom_{rule.kind} rule covers its arguments, and a value that it"
        f" captures is differentiated, along which its body has no derivative ({why}). Pass the"
        " value to it as an argument, with a rule for that; or, if it is a constant, capture"
        " jax.lax.stop_gradient of it."
    )


def reached(jaxpr: Any, places: Sequence[int]) -> list[bool]:
    """Which outputs of an open program may depend on some of its inputs, but as constants."""
    moving = {jaxpr.invars[i] for i in places}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "stop_gradient" and any(
            type(v) is not _compat.Literal and v in moving for v in eqn.invars
        ):
            moving.update(eqn.outvars)
    return [type(v) is not _compat.Literal and v in moving for v in jaxpr.outvars]
