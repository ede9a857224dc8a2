"""The derivative with respect to what a function with a custom rule captures: that of its body.

Such a body often has no derivative (an open-ended loop, code on the host, a bisection), which is
what the rule is for. Asking for the derivative is then refused. Not here: the rule itself
(`rule_call`).
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
from freevars.jax._convert.dependence import reached
from freevars.jax._convert.rule import Rule

__all__ = ["along_captures", "total", "with_captures"]


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
        return call(*replaced(primals, moving, moved))

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

    def tangents(*moved_and_dots: Any) -> list[Any]:
        moved, dots = moved_and_dots[: len(some)], moved_and_dots[len(some) :]
        result: list[Any] = jax.jvp(body, moved, dots)[1]
        return result

    with _refusing(rule):
        by_value = _dependence(body, some, len(some))
        by_tangent = _dependence(tangents, [*some, *some], len(some))
        if rule.kind == "vjp":
            jax.eval_shape(lambda some: _pull(body, some), some)
    for depends, moves in zip(by_value, by_tangent, strict=True):
        if any(d and not m for d, m in zip(depends, moves, strict=True)):
            raise _no_derivative(rule, "it is only compared or rounded there")


def _dependence(fun: Callable[..., Any], args: Sequence[Any], last: int) -> list[list[bool]]:
    """For each of the last arguments, which results depend on it."""
    program: Any = jax.make_jaxpr(fun)(*args)
    opened = getattr(program, "jaxpr", program)
    first = len(opened.invars) - last
    return [reached(opened, [first + i]) for i in range(last)]


def _pull(body: Callable[..., Any], some: Sequence[Any]) -> Any:
    results, pull = jax.vjp(body, *some)
    return pull(list(map(jnp.ones_like, results)))


@contextmanager
def _refusing(rule: Rule) -> Iterator[None]:
    """Name the function whose body has no derivative."""
    try:
        yield
    except CaptureError:  # of a function inside, which it names
        raise
    except (NotImplementedError, TypeError, ValueError) as error:
        raise _no_derivative(rule, str(error).partition(". ")[0].rstrip(".")) from error


def _no_derivative(rule: Rule, why: str) -> CaptureError:
    return CaptureError(
        f"{rule.name}: its custom_{rule.kind} rule covers its arguments, and a value that it"
        f" captures is differentiated, along which its body has no derivative ({why}). Pass the"
        " value to it as an argument, with a rule for that; or, if it is a constant, capture"
        " jax.lax.stop_gradient of it."
    )
