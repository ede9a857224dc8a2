"""Programs are pickled, and recognised when they come back.

A closure is sent as its program and its values, never as the Python function that it was made from:
that function may no longer exist, or may read other things by now or in the other process.

A program carries a mark. One that comes back to a process where it still lives becomes that same
object, so a gradient returned by another process has the structure of the closure that was sent
there. Not here: what a program is as data (`packed`).
"""

from __future__ import annotations

import copyreg
import pickle
import uuid
import weakref
from typing import Any

from freevars.jax._convert.pack import pack
from freevars.jax._convert.packed import Packed
from freevars.jax._convert.program import Program
from freevars.jax._convert.unpack import unpack

__all__ = ["from_bytes", "to_bytes"]


_MARKS: weakref.WeakKeyDictionary[Program, str] = weakref.WeakKeyDictionary()
_MARKED: weakref.WeakValueDictionary[str, Program] = weakref.WeakValueDictionary()


def _send(program: Program) -> Any:
    mark = _MARKS.get(program)
    if mark is None:
        mark = _mark(program, uuid.uuid4().hex)
    return _receive, (mark, pack(program))


def _receive(mark: str, packed: Packed) -> Program:
    program = _MARKED.get(mark)
    if program is None:
        program = unpack(packed)
        _mark(program, mark)
    return program


def _mark(program: Program, mark: str) -> str:
    _MARKED[mark] = program
    _MARKS[program] = mark  # of two, the one of who sent it last
    return mark


copyreg.pickle(Program, _send)


def to_bytes(program: Program) -> bytes:
    """The program, pickled."""
    return pickle.dumps(program)


def from_bytes(data: bytes) -> Program:
    """The program of such bytes. As with all that is pickled, they can run any code."""
    program: Program = pickle.loads(data)  # noqa: S301 (the caller trusts what was exported)
    return program
