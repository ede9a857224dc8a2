"""Find the operations that read an input of a program, and their lines in the user's source.

An operation that calls a nested program reads what the nested program reads. Not here: what the
inputs are called.
"""

from __future__ import annotations

from typing import Any

from freevars.jax import _compat
from freevars.jax._describe.operands import programs_of
from freevars.report._reads import Reads

__all__ = ["first_read", "reads_of"]


def reads_of(jaxpr: Any, count: int) -> list[Reads]:
    """The reads of each of the first `count` inputs of an open program."""
    found = [Reads() for _ in range(count)]
    _walk(jaxpr, {var: [found[i]] for i, var in enumerate(jaxpr.invars[:count])})
    return found


def first_read(jaxpr: Any, position: int) -> str:
    """Where an input is read first, for an error: ` (first read at model.py:44: 'y = x @ w')`."""
    sites = reads_of(jaxpr, position + 1)[position].lines()
    if not sites:
        return ""
    return f" (first read at {sites[0]}{f': {sites[0].text!r}' if sites[0].text else ''})"


def _walk(jaxpr: Any, readers: dict[Any, list[Reads]], caller: Any = None) -> None:
    """Add the reads of the variables in `readers`; one variable may stand for several inputs.

    Operations within JAX's own functions have no line of the user: that of the `caller` is theirs.
    """
    for eqn in jaxpr.eqns:
        operands = [() if type(v) is _compat.Literal else readers.get(v, ()) for v in eqn.invars]
        if not any(operands):
            continue
        line = _compat.user_line(eqn.source_info) or caller
        inside: set[int] = set()  # operands whose reads are found in a nested program
        before = {id(r): r.count for found in operands for r in found}
        for program, positions in programs_of(eqn):
            inner: dict[Any, list[Reads]] = {}
            for var, position in zip(program.invars, positions, strict=True):
                if position is not None and operands[position]:
                    inner[var] = list(operands[position])
                    inside.add(position)
            if inner:
                _walk(program, inner, line)
        counted: set[int] = set()
        for position, found in enumerate(operands):
            for reads in found:
                passed = position in inside and reads.count > before[id(reads)]
                if not passed and id(reads) not in counted:
                    counted.add(id(reads))
                    reads.add(line)
