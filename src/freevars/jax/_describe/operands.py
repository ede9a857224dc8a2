"""Match the operands of an equation with the inputs of the programs that it calls.

Not here: who reads an input (`reads`).
"""

from __future__ import annotations

from typing import Any

from freevars.jax import _compat

__all__ = ["captured_by_rules", "programs_of"]


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
            for program, positions in programs_of(eqn):
                inside = [(positions[i], stays) for i, stays in of(program).items()]
                captured += [(i, stays) for i, stays in inside if i is not None]
            for i, stays in captured:
                v = eqn.invars[i]
                if type(v) is _compat.Var and v in place:
                    found[place[v]] = found.get(place[v], False) or stays
        known[id(jaxpr)] = found
        return found

    return {i: stays for i, stays in of(jaxpr).items() if i < count}


def programs_of(eqn: Any) -> list[tuple[Any, list[int | None]]]:
    """The programs that an equation calls, with the operand that each of their inputs is.

    The carry of a loop is an operand in the first iteration only: the loop itself reads that one.
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
