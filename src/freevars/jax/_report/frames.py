"""Read a traceback's frames: the functions that ran, and the traced values that they reach.

A frame has no function object, but it has the code and the captured variables, which suffice for
naming. Functions that JAX calls later, such as custom derivative rules, are in JAX's own frames.
Nothing here keeps a frame alive beyond the caller. Not here: which value is at fault, and what to
say about it.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import CellType, FrameType, FunctionType, MethodType, TracebackType
from typing import Any, NamedTuple

from freevars._names.introspection import instance_dict
from freevars._names.search import FRAMEWORKS, name_values
from freevars.jax import _compat
from freevars.jax._describe.reads import reads_of
from freevars.report._source import ReadSite, read_site

__all__ = ["Candidate", "candidates", "frames_of", "read_lines", "tracers_in", "tracers_of"]

_MOST_PARTS = 10_000  # objects looked at behind the values of one frame
_NO_FUNCTIONS = frozenset({"<module>", "<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})

Frames = Sequence[tuple[FrameType, int]]  # with the line that was running, innermost first


class Candidate(NamedTuple):
    """A function that may be the one that captures, and the line of it that ran, if it did."""

    fun: Callable[..., Any]
    line: ReadSite | None


def frames_of(trace: TracebackType | None) -> Frames:
    """The frames of a traceback with their lines, innermost first."""
    return list(traceback.walk_tb(trace))[::-1]


def candidates(frames: Frames) -> Iterator[Candidate]:
    """The user's functions that ran or were handed on, the innermost first, each once."""
    seen: set[int] = set()
    for frame, line in frames:
        code = frame.f_code
        if _compat.is_users(code.co_filename) and code.co_name not in _NO_FUNCTIONS:
            yield Candidate(_stand_in(frame), read_site(code.co_filename, line))
        for fun in _functions(list(dict(frame.f_locals).values())):
            if id(fun) not in seen:
                seen.add(id(fun))
                yield Candidate(fun, None)


def _stand_in(frame: FrameType) -> Callable[..., Any]:
    """A function like the one that a frame runs, for inspection only."""
    code = frame.f_code
    values = dict(frame.f_locals)
    cells = [CellType(values[name]) if name in values else CellType() for name in code.co_freevars]
    fun = FunctionType(code, frame.f_globals, code.co_name, None, tuple(cells))
    fun.__qualname__ = code.co_qualname
    owner = code.co_varnames[0] if code.co_argcount else ""
    return MethodType(fun, values[owner]) if owner == "self" and owner in values else fun


def _functions(pending: list[Any]) -> Iterator[Callable[..., Any]]:
    """The user's functions among some values and behind JAX's wrappers around functions."""
    seen: dict[int, Any] = {}  # keeps what it has seen, so that no id is used twice
    while pending and len(seen) < _MOST_PARTS:
        x = pending.pop()
        if id(x) in seen:
            continue
        seen[id(x)] = x
        kind = type(x)
        if kind is MethodType or (kind is FunctionType and not _is_frameworks(x)):
            yield x
        else:
            pending += _behind(x)


def _is_frameworks(fun: FunctionType) -> bool:
    return str(fun.__module__).partition(".")[0] in FRAMEWORKS


def _behind(x: Any) -> Sequence[Any]:
    """What a container, a wrapper, or a function of JAX's own holds."""
    kind = type(x)
    if kind in (tuple, list):
        return list(x[:_MOST_PARTS])
    if kind is FunctionType:
        cells = [cell.cell_contents for cell in x.__closure__ or () if _is_filled(cell)]
        return [*cells, instance_dict(x).get("__wrapped__")]
    if kind is functools.partial:
        return [x.func, x.args, tuple(x.keywords.values())]
    if issubclass(kind, _compat.JITTED):
        return [x.__wrapped__]
    if kind is _compat.EQUATION:
        return list(x.params.values())
    if kind.__module__.partition(".")[0] == "jax":
        return _compat.function_parts(x) or ()
    return ()


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (raises where there is nothing)
    except ValueError:
        return False
    return True


def tracers_of(fun: Callable[..., Any]) -> list[Any]:
    """The traced values that a function reaches, each once."""
    found: dict[int, Any] = {}

    def is_leaf(x: Any) -> bool:
        if issubclass(type(x), _compat.Tracer):
            found[id(x)] = x
        return issubclass(type(x), _compat.ARRAY_TYPES)

    name_values(fun, [_NOTHING], is_leaf=is_leaf)
    return list(found.values())


_NOTHING: Any = type("Nothing", (), {})()  # looked for and never found, so that all is walked


def tracers_in(frames: Frames) -> list[Any]:
    """The traced values in the innermost of JAX's frames that has any: what the error is about."""
    for frame, _ in frames:
        if _compat.is_users(frame.f_code.co_filename):
            break
        found = [x for x in dict(frame.f_locals).values() if issubclass(type(x), _compat.Tracer)]
        if found:
            return found
    return []


def read_lines(frames: Frames, tracer: Any) -> tuple[ReadSite, ...]:
    """The lines that read a value in a program that is alive in one of JAX's frames."""
    for frame, _ in frames:
        if _compat.is_users(frame.f_code.co_filename):
            continue
        for jaxpr, values in _compat.programs_in(dict(frame.f_locals)):
            for position, value in enumerate(values):
                if value is tracer:
                    return reads_of(jaxpr, len(values))[position].lines()
    return ()
