"""Custom derivative rules as programs: traced with the function that they belong to.

A rule is Python code that JAX runs later, whenever a derivative is needed, and it can read anything
then. Here it runs once, at conversion, as a derivative would run it: the equation that has the rule
is a program of its own, whose `jax.jvp` is the rule of a `custom_jvp`, and whose `jax.vjp` and the
pullback of that are the two halves of a `custom_vjp`. What the rule reads from outside becomes
constants of these programs, like anything else that a function captures. A rule may call its own
function: a rule that is already being traced is not traced again.

A rule that asks which tangents are zero is traced with none of them zero: a rule is linear in its
tangents, so this program covers all cases. Only tangents that cannot move are zero: those of the
results of a function whose rule raises, which is how a library says that no derivative passes
through. Such a rule has no program, and counts by what it raises. A few rules stay functions: JAX's
own and this library's, which are compared by identity and read no state; and those that fail where
they are traced alone. The rule of a `custom_vmap` and the transpose of a `linear_call` stay
functions too; these run once, to see what they read on their own. Not here: how a traced rule runs
(`rule_call`), and who compares programs (`jaxpr_key`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any

from freevars.jax import _compat
from freevars.jax._compat import Eqn, Literal
from freevars.jax._convert.rule import TOWER, Rule
from freevars.jax._convert.rule_programs import trace_jvp, trace_vjp
from freevars.jax._convert.static import Same
from freevars.jax._convert.wrapped import Wrapped
from freevars.jax._describe.tracers import identity

__all__ = ["RuleTracer", "Values"]

_DEEP = 16  # rules within rules
_MOST = 64  # functions beside equations that are looked at within others: each may make another


class Values:
    """Arrays and traced values, each once, with their types."""

    def __init__(self) -> None:
        self.found: dict[Any, tuple[Any, Any]] = {}
        self.read: list[Any] = []  # by a program
        self.held: list[Any] = []  # by a rule

    def add(self, value: Any, aval: Any) -> None:
        """One that a program reads."""
        self.read.append(value)
        self.found.setdefault(identity(value), (value, aval))

    def hold(self, held: Sequence[tuple[Any, Any]]) -> None:
        """Those of a rule."""
        for value, aval in held:
            self.held.append(value)
            self.found.setdefault(identity(value), (value, aval))

    @property
    def values(self) -> list[Any]:
        """All of them."""
        return [value for value, _ in self.found.values()]


class _Frame:
    """A rule that is being traced."""

    def __init__(self, key: Any, base: Any, rule: Rule, depth: int) -> None:
        self.key, self.base, self.rule = key, base, rule
        self.values = Values()
        self.members = [rule]  # with those inside that come back to it or to one below
        self.depth = self.low = depth  # the lowest that one of them comes back to


class RuleTracer:
    """The rules of one function, each traced once.

    Args:
        lift: takes the constants out of a program: the program with them as leading inputs, and the
            constants.
        stays: whether a rule of JAX's or of this library's stays a function.
    """

    def __init__(
        self,
        lift: Callable[[Any], tuple[Any, list[Any]]],
        stays: Callable[[Eqn], bool] = lambda _: True,
    ) -> None:
        # The keys of what JAX keeps of rules of its own, by identity.
        self.keys: dict[int, Hashable] = {}
        self._lift = lift
        self._stays = stays
        # By equation: its rule, and how many values its body captures.
        self._rules: dict[int, tuple[Eqn, Rule | None, int]] = {}
        self._whole: dict[Any, Rule] = {}
        self._part: dict[Any, tuple[Rule, _Frame]] = {}  # of a frame that is still open
        self._stack: list[_Frame] = []
        # What rules hold, with the types; not in the rules, which live on in compiled programs.
        self._held: dict[int, list[tuple[Any, Any]]] = {}
        self._wrapped = Wrapped()  # it keeps the objects whose ids are in keys
        self.beside = Values()  # what functions read on their own that stay functions
        self._looked_at: dict[int, Any] = {}  # of these functions, by identity
        self._within = 0  # of them, those that were met in another
        self._looking = False  # into one

    def rule_of(self, eqn: Eqn) -> tuple[Rule | None, int]:
        """The traced rule of an equation that was visited, or None where it stays a function; and
        how many values the body captures."""
        return self._rules[id(eqn)][1:]

    def held_by(self, rule: Rule) -> list[tuple[Any, Any]]:
        """The values that a rule holds, with their types; none while it is being traced."""
        return self._held.get(id(rule), [])

    def visit(self, closed: Any, values: Values) -> None:
        """Trace the rules in a program and in those nested in it; add what they and these hold."""
        self._visit(closed, values, {})

    def _visit(self, closed: Any, values: Values, seen: dict[int, Any]) -> None:
        if id(closed) in seen:
            return
        seen[id(closed)] = closed
        jaxpr = getattr(closed, "jaxpr", closed)
        for var, value in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=False):
            values.add(value, var.aval)
        still: set[Any] = set()
        for eqn in jaxpr.eqns:
            _add_literals(eqn.invars, values)
            if not _compat.has_parts(eqn):
                continue
            if eqn.primitive.name in _compat.RULED:
                rule = self._of(eqn, still)
                if rule is None:
                    continue  # it stays as it is, and so does its body
                values.hold(self.held_by(rule))
                if rule.refusal is not None:
                    still.update(eqn.outvars)
            else:
                self._look_beside(eqn)
            for nested in _compat.nested_programs(eqn):
                self._visit(nested, values, seen)
        _add_literals(jaxpr.outvars, values)

    def _look_beside(self, eqn: Eqn) -> None:
        """Add what an equation reads besides its operands."""
        for x in _compat.held_by_operation(eqn):
            self.beside.add(x, None)
        fun = _compat.function_beside(eqn)
        if fun is None or id(fun) in self._looked_at:
            return
        if self._looking and self._within >= _MOST:
            return
        if not self._wrapped.look(fun)[1]:
            return  # JAX's own, which reads no state
        self._looked_at[id(fun)] = fun
        self._within += self._looking
        try:
            program, constants = _compat.trace_beside(eqn)
        except Exception:  # noqa: BLE001 (JAX runs it where it is needed, and it raises there)
            return
        for x in constants:
            self.beside.add(x, None)
        outer, self._looking = self._looking, True
        self._visit(program, self.beside, {})
        self._looking = outer

    def _of(self, eqn: Eqn, still: set[Any]) -> Rule | None:
        if id(eqn) not in self._rules:
            count = _compat.captured_by_rule(eqn)
            args = eqn.invars[count:] if still and eqn.params["symbolic_zeros"] else []
            places = tuple([i for i, v in enumerate(args) if type(v) is not Literal and v in still])
            self._rules[id(eqn)] = (eqn, self._resolve(eqn, count, places), count)
        return self._rules[id(eqn)][1]

    def _resolve(self, eqn: Eqn, captured: int, still: tuple[int, ...]) -> Rule | None:
        kept = _compat.rule_objects(eqn)
        objects, foreign, programs = self._wrapped.look(*kept)
        key = (eqn.primitive, objects, tuple([v.aval for v in eqn.invars]), still)
        own = not foreign and not any(map(_reads_state, programs))
        if own and (not captured or eqn.params["symbolic_zeros"]) and self._stays(eqn):
            if not programs:
                self.keys.update(zip(map(id, kept), objects, strict=True))
            return None
        known = self._known(key)
        if known is not None:
            return known
        base = tuple([Same(x) for x in foreign if isinstance(x, FunctionType)])
        above = sum(frame.base == base for frame in self._stack)
        if len(self._stack) >= _DEEP or not _is_plain(eqn):
            return None
        rule = Rule(eqn, captured, still)
        if above >= TOWER:
            if not foreign:
                return None  # JAX's own, which reads no state
            rule.ends = True
        if rule.ends or not any(rule.smooth):  # no program of it is ever asked for
            return rule
        try:
            rule.raw = (trace_jvp if rule.kind == "jvp" else trace_vjp)(eqn, rule)
        except Exception as error:  # noqa: BLE001 (whatever a rule raises when it is alone)
            rule.refusal = None if rule.symbolic else _refusal(error)
            return None if rule.refusal is None else rule
        self._resolve_inside(rule, key, base)
        return rule

    def _known(self, key: Any) -> Rule | None:
        """A rule that is being traced, or was."""
        for frame in self._stack:
            if frame.key == key:
                return self._back_to(frame, frame.rule)
        if key in self._part:
            rule, frame = self._part[key]
            if frame in self._stack:
                return self._back_to(frame, rule)
        return self._whole.get(key)

    def _back_to(self, frame: _Frame, rule: Rule) -> Rule:
        self._stack[-1].low = min(self._stack[-1].low, frame.depth)
        return rule

    def _resolve_inside(self, rule: Rule, key: Any, base: Any) -> None:
        frame = _Frame(key, base, rule, len(self._stack))
        self._stack.append(frame)
        try:
            for program in rule.raw:
                self.visit(program, frame.values)
        finally:
            self._stack.pop()
        if frame.low < frame.depth:
            self._join(frame)
        else:
            self._close(frame)

    def _join(self, frame: _Frame) -> None:
        """A rule that comes back to one that is still open is part of that."""
        below = self._stack[-1]
        below.low = min(below.low, frame.low)
        below.members += frame.members
        below.values.hold(list(frame.values.found.values()))
        self._part[frame.key] = (frame.rule, self._stack[frame.low])

    def _close(self, frame: _Frame) -> None:
        """A rule that is whole, with all that come back to it: they hold the same values."""
        held = list(frame.values.found.values())
        place = {identity(value): i for i, (value, _) in enumerate(held)}
        for rule in frame.members:
            rule.held = len(held)
            self._held[id(rule)] = held
        for rule in frame.members:
            lifted = [self._lift(program) for program in rule.raw]
            rule.programs = [(p, tuple([place[identity(v)] for v in vs])) for p, vs in lifted]
            rule.raw = []
        self._whole[frame.key] = frame.rule


def _reads_state(program: Any) -> bool:
    """Whether a program that JAX's own rule is given holds an array or a rule of the user's."""
    jaxpr = getattr(program, "jaxpr", program)
    return bool(getattr(program, "consts", ())) or any(
        eqn.primitive.name in _compat.RULED or any(map(_reads_state, _compat.nested_programs(eqn)))
        for eqn in jaxpr.eqns
    )


def _refusal(error: Exception) -> tuple[type, tuple[Any, ...]] | None:
    """The class and the arguments of an error that a rule itself raises, outside JAX's code; the
    error itself would keep its frames alive. None for other errors, which may be due to tracing."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    plain = type(error).__module__ == "builtins" and all(type(x) is str for x in error.args)
    raised = last is not None and _compat.is_users(last.tb_frame.f_code.co_filename)
    return (type(error), error.args) if plain and raised else None


def _add_literals(atoms: Sequence[Any], values: Values) -> None:
    for v in atoms:
        if type(v) is Literal and _compat.is_array_literal(v):
            values.add(v.val, v.aval)


def _is_plain(eqn: Eqn) -> bool:
    return all(hasattr(v.aval, "dtype") and hasattr(v.aval, "shape") for v in eqn.invars)
