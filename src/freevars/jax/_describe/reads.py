"""Who reads an input of a program: which operations, on which lines of the user's source.

An operation that calls a nested program reads what the nested program reads. Not here: what the
inputs are called.
"""

from __future__ import annotations

from typing import Any

from freevars.jax import _compat
from freevars.report._reads import Reads

__all__ = ["captured_by_rules", "first_read", "reads_of"]


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


def captured_by_rules(jaxpr: Any, count: int) -> dict[int, bool]:
    """Which of the first inputs of an open program the body of a function captures whose rule says
    nothing of the derivative along them; for each, whether that rule stays a function."""
    known: dict[int, dict[int, bool]] = {}  # by program: each is looked into once

    def of(jaxpr: Any) -> dict[int, bool]:
        if id(jaxpr) in known:
            return known[id(jaxpr)]
        place = {v: i for i, v in enumerate(jaxpr.invars)}
        found: dict[int, bool] = {}
        for eqn in jaxpr.eqns:
            if not eqn.params:
                continue
            stays = "captured" not in eqn.params  # it was not traced
            captured = [(i, stays) for i in range(_compat.captured_by_rule(eqn))]
            for program, positions in _nested(eqn):
                inside = [(positions[i], stays) for i, stays in of(program).items()]
                captured += [(i, stays) for i, stays in inside if i is not None]
            for i, stays in captured:
                v = eqn.invars[i]
                if type(v) is _compat.Var and v in place:
                    found[place[v]] = found.get(place[v], False) or stays
        known[id(jaxpr)] = found
        return found

    return {i: stays for i, stays in of(jaxpr).items() if i < count}


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
        for program, positions in _nested(eqn):
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


def _nested(eqn: Any) -> list[tuple[Any, list[int | None]]]:
    """The programs that an equation calls, with the operand that each of their inputs is.

    The carry of a loop is no operand but for the first turn: the loop itself reads that one.
    """
    params = eqn.params
    name = eqn.primitive.name
    operands = list(range(len(eqn.invars)))
    programs = [getattr(p, "jaxpr", p) for p in _compat.nested_programs(eqn)]
    if name == "while":
        cond, body = params["cond_nconsts"], params["body_nconsts"]
        carry = [None] * (len(operands) - cond - body)
        of_cond, of_body = operands[:cond], operands[cond : cond + body]
        named = [(params["cond_jaxpr"], of_cond), (params["body_jaxpr"], of_body)]
        return [(getattr(p, "jaxpr", p), [*positions, *carry]) for p, positions in named]
    if name == "scan":
        constants, carry_count = _compat.scan_counts(params)
        after = constants + carry_count
        positions = [i if i < constants or i >= after else None for i in operands]
        return [(program, positions) for program in programs]
    if name == "cond":
        return [(program, list(operands[1:])) for program in programs]
    if "captured" in params:  # a traced rule: what the rule holds stands between
        (program,), before = programs, params["captured"]
        after = len(operands) - (len(program.invars) - before)
        return [(program, [*operands[:before], *operands[after:]])]
    return [(p, list(operands)) for p in programs if len(p.invars) == len(operands)]
