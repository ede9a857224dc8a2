"""Find the results of a program that may depend on some of its inputs.

Nested programs are searched too, since they may not read all of their operands. What is not known
to be independent counts as dependent. Not here: derivatives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from freevars.jax import _compat

__all__ = ["reached"]


def reached(jaxpr: Any, places: Iterable[int]) -> list[bool]:
    """Which outputs of an open program may depend on the inputs at `places`, but as constants."""
    moving = {jaxpr.invars[i] for i in places}
    for eqn in jaxpr.eqns:
        operands = [
            i for i, v in enumerate(eqn.invars) if type(v) is not _compat.Literal and v in moving
        ]
        if operands:
            results = _through(eqn, operands)
            moving.update(v for v, depends in zip(eqn.outvars, results, strict=True) if depends)
    return [type(v) is not _compat.Literal and v in moving for v in jaxpr.outvars]


def _through(eqn: Any, operands: Collection[int]) -> list[bool]:
    """Which results of an equation may depend on some of its operands."""
    name, params = eqn.primitive.name, eqn.params
    if name == "stop_gradient":
        return [False]
    programs = [getattr(p, "jaxpr", p) for p in _compat.nested_programs(eqn)]
    if name == "scan":
        constants, carry = _compat.scan_counts(params)
        return _in_a_loop(programs[0], operands, constants, carry)[0]
    if name == "while":
        first, second = params["cond_nconsts"], params["body_nconsts"]
        body, cond = (params[k].jaxpr for k in ("body_jaxpr", "cond_jaxpr"))
        in_body = {i - first for i in operands if i >= first}
        results, in_body = _in_a_loop(body, in_body, second, len(eqn.outvars))
        in_cond = {i for i in operands if i < first}
        in_cond |= {i - second + first for i in in_body if i >= second}
        if not any(reached(cond, in_cond)):
            return results
    elif name == "cond" and 0 not in operands:
        branches = [reached(program, [i - 1 for i in operands]) for program in programs]
        return [any(depends) for depends in zip(*branches, strict=True)]
    elif len(programs) == 1 and _is_call(eqn, programs[0]):
        return reached(programs[0], operands)
    return [True] * len(eqn.outvars)


def _is_call(eqn: Any, program: Any) -> bool:
    """Whether an equation does no more than what its program does, on the same operands."""
    of_eqn, of_program = (eqn.invars, eqn.outvars), (program.invars, program.outvars)
    return list(map(len, of_eqn)) == list(map(len, of_program))


def _in_a_loop(
    body: Any, inputs: Iterable[int], constants: int, carry: int
) -> tuple[list[bool], set[int]]:
    """Which results of a loop may depend on some inputs of its first iteration, and which inputs of
    a later one do; the carry comes after the constants."""
    inputs = set(inputs)
    while True:
        results = reached(body, inputs)
        came_back = {constants + i for i in range(carry) if results[i]}
        if came_back <= inputs:
            # Without an iteration, the carry is the result.
            kept = [constants + i in inputs for i in range(carry)]
            return [*kept, *results[carry:]], inputs
        inputs |= came_back
