"""Name the leaked value in JAX's errors about traced values, and the function that captures it.

JAX refuses a value that did not reach a rule through its arguments, but knows only its type. Its
traceback knows more: the frames contain the functions that ran, and these capture the value. Only
the error and its frames are examined, after the fact; nothing is recorded before. Not here: looking
into frames (`frames`), and naming (`describe`).
"""

from __future__ import annotations

import re
from contextlib import ContextDecorator
from dataclasses import replace
from itertools import islice
from types import TracebackType
from typing import Any

import jax

from freevars._names.search import function_name
from freevars.errors import LeakError
from freevars.jax import _compat
from freevars.jax._describe.describe import captured_value, names_of
from freevars.jax._describe.reads import reads_of
from freevars.jax._report.frames import (
    Candidate,
    Frames,
    candidates,
    frames_of,
    read_lines,
    tracers_in,
    tracers_of,
)
from freevars.report import CapturedValue, describe
from freevars.report._reads import Reads
from freevars.report._source import ReadSite, read_site, source_of

__all__ = ["explain_leaks"]

_MOST_CANDIDATES = 20
_PLAIN = 2  # links in the path of a variable that a function captures by itself


class explain_leaks(ContextDecorator):  # noqa: N801 (used like a function)
    """A context in which JAX's errors about traced values name the captured value.

    Within it, `jax.errors.UnexpectedTracerError`, "Detected differentiation of a custom_vjp
    function with respect to a closed-over value" and "No constant handler for type … Tracer" are
    raised as a `freevars.errors.LeakError` that names the value, the function that captures it and
    the fix, with the original as its cause. Every other error passes through. It costs nothing
    until one is raised, and works as a decorator too.

    Returns:
        A context manager.

    Raises:
        freevars.errors.LeakError: in place of these errors.

    Example:
        >>> import functools, jax, freevars.jax as fv
        >>> @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
        ... def solve(fun, x):
        ...     return x - fun(x) / jax.grad(fun)(x)
        >>> solve.defvjp(lambda fun, x: (solve(fun, x), x), lambda fun, x, x_bar: (x_bar,))
        >>> with fv.explain_leaks():
        ...     jax.grad(lambda a: solve(lambda x: x**2 - a, 1.0))(4.0)
        Traceback (most recent call last):
        freevars.errors.LeakError: a (float32[] at ...
    """

    def __enter__(self) -> None:
        # JAX removes its own frames from tracebacks, and these know the value.
        self._unfiltered = _compat.unfiltered_tracebacks()
        self._unfiltered.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._unfiltered.__exit__(kind, error, tb)
        if error is None or not isinstance(error, Exception):
            return
        message = _explain(error) if _is_about_a_tracer(error) else ""
        _compat.filter_traceback(error)
        if message:
            raise LeakError(message) from error


def _is_about_a_tracer(error: Exception) -> bool:
    return (
        isinstance(error, jax.errors.UnexpectedTracerError)
        or type(error).__name__ in ("CustomJVPException", "CustomVJPException")
        or bool(re.match(r"No constant handler for type.*Tracer", str(error)))
    )


def _explain(error: Exception) -> str:
    frames = frames_of(error.__traceback__)
    by_rule = not isinstance(error, jax.errors.UnexpectedTracerError) or any(
        _compat.is_rule_machinery(frame.f_code.co_filename) for frame, _ in frames
    )
    captured, fun = _captured(error, frames)
    if captured is None:
        return (
            "a traced value left the transformation that it belongs to; nothing in the traceback"
            " shows which. Call freevars.jax.captures(fun, *example_args) on the functions that"
            " are handed to others, where they are, for the values that they capture."
        )
    passed = f"freevars.jax.Closure({fun or 'fun'}, *example_args) in place of {fun or 'fun'}"
    if by_rule:
        who = (
            f"{fun} captures" if fun else "a custom derivative rule, or a function in it, captures"
        )
        return (
            f"{describe(captured)}: {who} this value, and a custom derivative rule sees its"
            f" arguments only. Make the value one: hand {passed} to the function that has the rule,"
            " as an ordinary argument (not one of nondiff_argnums); or, if the rule's own functions"
            " capture it, give them an argument more."
        )
    return (
        f"{describe(captured)}: {fun or 'a function'} uses this value outside the transformation"
        " that it belongs to. If it was stored by a side effect, return it from the transformed"
        f" function instead. If a function that captures it was handed on, pass {passed}, so that"
        " the value is an argument."
    )


def _captured(error: Exception, frames: Frames) -> tuple[CapturedValue | None, str]:
    """The value that an error is about and the name of the function that captures it."""
    closed = _closed_over(frames) if type(error).__name__.startswith("Custom") else None
    suspects = [] if closed else tracers_in(frames)
    met: list[Any] = list(suspects)
    best: tuple[int, CapturedValue, str] | None = None
    for candidate in islice(candidates(frames), _MOST_CANDIDATES):
        reached = tracers_of(candidate.fun)
        if suspects:
            reached = [x for x in reached if any(_same(x, s) for s in suspects)]
        elif closed is not None:
            reached = [x for x in reached if _compat.variable(x) in closed]
        else:
            reached = [x for x in reached if _fits(x, str(error))]
        met += reached
        for tracer in reached:
            value = _described(candidate, tracer, frames, closed)
            links = len(re.findall(r"[.\[]", value.paths[0])) if value is not None else 0
            if value is not None and (best is None or links < best[0]):
                best = (links, value, function_name(candidate.fun))
        if best is not None and best[0] <= _PLAIN:
            break
    if best is not None:
        return best[1:]
    for tracer in met:  # reached by nothing that is left
        return _from_jax(tracer, frames), ""
    return (None, "") if closed is None else (_from_equation(frames, closed), "")


def _described(
    candidate: Candidate, tracer: Any, frames: Frames, closed: dict[Any, Reads] | None
) -> CapturedValue | None:
    (names,) = names_of(candidate.fun, [tracer])
    if not names:
        return None
    value = captured_value(candidate.fun, tracer, names, Reads(), hoisted=False, policy="")
    sites: tuple[ReadSite, ...] = () if candidate.line is None else (candidate.line,)
    variable = _compat.variable(tracer)
    if not sites and closed is not None and variable in closed:
        sites = closed[variable].lines()
    sites = sites or read_lines(frames, tracer) or _mentions(candidate.fun, value.names[0])
    return replace(value, sites=sites)


def _mentions(fun: Any, name: str) -> tuple[ReadSite, ...]:
    """The first line of a function's source that reads a name."""
    source = source_of(fun)
    for read in source.reads if source is not None else ():
        if source is not None and read.text == name:
            return (read_site(source.file, source.line + read.row),)
    return ()


def _from_jax(tracer: Any, frames: Frames) -> CapturedValue:
    """A value whose capturing function is gone: as JAX knows it, an argument or made somewhere."""
    value = captured_value(None, tracer, (), Reads(), hoisted=False, policy="")
    name, fun = _compat.argument_of(tracer)
    sites = read_lines(frames, tracer)
    return replace(
        value,
        names=(f"argument {name} of {fun}",) if name else (),
        sites=sites,
    )


def _closed_over(frames: Frames) -> dict[Any, Reads] | None:
    """The variables that a function with a custom rule closes over, where its call was staged."""
    for frame, _ in frames:
        eqn: Any = frame.f_locals.get("eqn")
        if type(eqn) is _compat.EQUATION and "num_consts" in eqn.params:
            count = eqn.params["num_consts"]
            (program, *_) = _compat.nested_programs(eqn)
            reads = reads_of(getattr(program, "jaxpr", program), count)
            return dict(zip(eqn.invars[:count], reads, strict=True))
    return None


def _from_equation(frames: Frames, closed: dict[Any, Reads]) -> CapturedValue | None:
    for frame, _ in frames:
        jaxpr: Any = frame.f_locals.get("jaxpr")
        for variable, reads in closed.items():
            name, fun = _compat.argument_in(jaxpr, variable)
            if name:
                return CapturedValue(
                    names=(f"argument {name} of {fun}",),
                    shape=tuple(variable.aval.shape),
                    dtype=str(variable.aval.dtype),
                    sites=reads.lines(),
                )
    return None


def _same(x: Any, suspect: Any) -> bool:
    """Whether two traced values are one, or one wraps the other."""
    return any(a is suspect for a in _layers(x)) or any(a is x for a in _layers(suspect))


def _layers(x: Any) -> list[Any]:
    found = []
    while isinstance(x, _compat.Tracer):
        found.append(x)
        _, x, _ = _compat.layer(x)
    return found


def _fits(tracer: Any, message: str) -> bool:
    """Whether JAX's message speaks of a value of this type; if it speaks of none, all fit."""
    said = re.search(r"type (\S+) wrapped in a (\w+)", message)
    return said is None or said.groups() == (
        tracer.aval.str_short(),
        type(tracer).__name__,
    )
