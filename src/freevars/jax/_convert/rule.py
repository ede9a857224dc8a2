"""A custom derivative rule as programs, and the equation that represents a function with a rule.

Not here: how it is traced (`traced_rules`, `rule_programs`), and how it runs (`rule_call`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from freevars.jax import _compat
from freevars.jax._compat import Eqn, Primitive

__all__ = ["TOWER", "Rule", "rule_p"]

# An equation of a function with a traced rule, until `rule_call` makes one of JAX's of it. Its
# operands are what the body captures, what the rule holds, and the arguments; its parameters are
# `rule`, `body` (a program of the captures and the arguments) and `captured` (how many).
rule_p = Primitive("freevars_rule")
rule_p.multiple_results = True

# How often the rule of one function may lead to itself with other static arguments: a rule that
# needs the next derivative each time never ends. Derivatives of a higher order are refused.
TOWER = 3


class Rule:
    """One traced rule: programs of what it holds, the arguments, and tangents or cotangents."""

    def __init__(self, eqn: Eqn, captured: int, still: Sequence[int] = ()) -> None:
        self.kind = _compat.RULED[eqn.primitive.name]  # "jvp" or "vjp"
        # Which arguments and results have a derivative; those of `still` never move.
        args = eqn.invars[captured:]
        self.smooth = tuple(
            [_compat.is_smooth(v.aval) and i not in still for i, v in enumerate(args)]
        )
        self.smooth_out = tuple([_compat.is_smooth(v.aval) for v in eqn.outvars])
        self.moved = self.smooth_out  # which results have a tangent by the rule
        self.symbolic = bool(eqn.params["symbolic_zeros"])  # whether it asks which are zero
        # Whether it has no program, being one more of a tower of rules without end (`TOWER`).
        self.ends = False
        self.refusal: tuple[type, tuple[Any, ...]] | None = None  # the error that it always raises
        self.name = _compat.program_name(eqn.params["call_jaxpr"])
        self.raw: list[Any] = []  # the programs as traced, with their constants
        # How many values the programs hold. Rules that call each other in a circle hold the same.
        self.held = 0
        # The programs without constants, and which of the held values each one takes.
        self.programs: list[tuple[Any, tuple[int, ...]]] = []
        self.native: dict[int, Any] = {}  # see `rule_call`
