"""The report of what a function captures: run it once on types, like a conversion, then describe.

A report has no side effects: it holds no array and forces no value, and what a conversion would
refuse (a mutable reference, a traced value that a custom rule holds) is listed, with the reason.
Not here: finding the values (`convert`), naming them (`describe`), and how a report looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from freevars._contract import Hoist, policy_name
from freevars._names.search import function_name
from freevars.jax import _compat
from freevars.jax._convert.convert import trace
from freevars.jax._convert.hoist import policy_of
from freevars.jax._convert.program import Program
from freevars.jax._describe.describe import captured_values
from freevars.jax._describe.reads import reads_of
from freevars.jax._describe.tracers import identity
from freevars.report import CaptureReport
from freevars.report._reads import Reads
from freevars.report._source import read_site, source_of

__all__ = ["report_of_function", "report_of_program"]


def report_of_function(
    fun: Callable[..., Any], example_args: Sequence[Any], hoist: Hoist
) -> CaptureReport:
    """What `fun` captures on the example; `hoist` is the conversion that the report tells about."""
    traced = trace(fun, example_args)
    return _report(fun, traced.jaxpr, traced.values, traced.kept, hoist)


def report_of_program(
    program: Program,
    values: Sequence[Any],
    origin: tuple[Callable[..., Any], Sequence[Any]] | None,
) -> CaptureReport:
    """What a program reads besides its arguments, with these values; the function and the example
    arguments that it was made from, if they are known, give names and lines."""
    known = [*program.fixed, *values]
    fun, jaxpr = None, program.jaxpr
    if origin is not None:
        fun, example_args = origin
        # The program may have been traced from another function that computes the same: trace this
        # one again for its lines. By now it may capture other values (a rebound name), then only
        # the lines are used, or other types, or its trace may be over.
        try:
            again = trace(fun, example_args)
        except Exception:  # noqa: BLE001, S110 (a user's function may raise anything)
            pass
        else:
            if _identities(again.values) == _identities(known):
                jaxpr, known = again.jaxpr, again.values
            elif [v.aval for v in again.jaxpr.invars] == [v.aval for v in jaxpr.invars]:
                jaxpr = again.jaxpr
    return _report(fun, jaxpr, known, program.fixed, "all", name=program.name)


def _report(
    fun: Callable[..., Any] | None,
    jaxpr: Any,
    values: Sequence[Any],
    held: Sequence[Any],
    hoist: Hoist,
    name: str = "",
) -> CaptureReport:
    hoisted = policy_of(hoist)
    in_rules = {identity(x) for x in held}
    own = {identity(x) for x in values}
    # Traced values that only a rule reads, which no program shows.
    hidden = {identity(x): x for x in held if _is_live_tracer(x) and identity(x) not in own}

    def policy(value: Any) -> tuple[bool, str]:
        if _compat.is_ref(value):
            return False, "refused: mutable reference"
        if identity(value) in in_rules:
            traced = isinstance(value, _compat.Tracer)
            return False, f"{'refused' if traced else 'constant'}: held by a custom rule"
        return hoisted(value), policy_name(hoist)

    reads = reads_of(jaxpr, len(values)) + [Reads() for _ in hidden]
    source = None if fun is None else source_of(fun)
    return CaptureReport(
        fun=name if fun is None else function_name(fun),
        where=None if source is None else read_site(source.file, source.line),
        source=source,
        values=captured_values(fun, [*values, *hidden.values()], reads, policy),
    )


def _identities(values: Sequence[Any]) -> set[Any]:
    return {identity(_compat.lowered(value)) for value in values}


def _is_live_tracer(x: Any) -> bool:
    return isinstance(x, _compat.Tracer) and _compat.is_live(x)
