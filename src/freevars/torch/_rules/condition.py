"""The condition at a solution, F(x, values) = 0, with its linear systems and their verdict.

A condition says how F is computed and how a root is found; this file derives what the rule needs: a
solution with its recorded graph, and trustworthy solutions of systems with A = dF/dx. The unknown
is Float[Tensor, "problems n"], each row a problem of its own; the first of the values is x0.

Not here: the user's function and solver (`problem.py`), derivatives (`record.py`, `implicit.py`).
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Self

import torch
from torch import Tensor

from freevars._sequences import replaced
from freevars._solvers.bounds import on_a_bound
from freevars._solvers.failures import Context, failure, option_matters
from freevars._solvers.verdict import Limits, is_minimum
from freevars.errors import FreevarsError
from freevars.torch import _compat
from freevars.torch._rules import comparison, diagnostics
from freevars.torch._rules.conserved import completion
from freevars.torch._rules.coupling import check_independent, check_same_steps, check_shared
from freevars.torch._rules.dense import Dense
from freevars.torch._rules.derivative import Derivative
from freevars.torch._rules.forms import is_smooth
from freevars.torch._rules.linear import system_of
from freevars.torch._rules.ravel import Unknown
from freevars.torch._rules.rule import Rule
from freevars.torch._rules.sizes import PARTS, Sizes
from freevars.torch._rules.system import LinearSolve, System
from freevars.torch._rules.unsupported import (
    check_not_exported,
    check_not_recorded,
    naming_reentrant_checkpoints,
)

__all__ = ["Condition", "Solution"]


class Solution(NamedTuple):
    """A root, and what was recorded there: F, and the columns that complete a condition whose
    totals the solver keeps (Float[Tensor, "problems n totals"]; mostly there are none)."""

    x: Tensor
    f: Tensor
    columns: Tensor


class _Judged(NamedTuple):
    """A system, and which of its problems have a derivative to be trusted."""

    system: System
    figures: diagnostics.Figures
    good: Tensor
    all_good: bool


class Condition:
    """F(x, *values) = 0, and how a root is found."""

    rule: Rule
    unknown: Unknown
    constants: frozenset[int]  # the positions of values on which x does not depend, or not smoothly
    others: frozenset[int]  # those on which it does not depend if it is a root
    by_options: Sequence[str] = ()  # what a derivative is by, where the function reads none of it
    constrained: bool = False  # the solver's bounds are part of the equations
    communicates: bool = False  # F does, with other processes
    watched: bool = False  # a conversion looks on, which would take a recorded leaf for a capture
    recorded: tuple[Tensor, Tensor] | None = None  # the leaf and the value of the recorded F
    saved: _compat.Saved  # by the graph of the recorded F
    nearby: Sequence[Tensor] = ()  # F nearby, recorded where x is tiny next to x - x0

    # What a subclass defines:
    equations: Callable[..., Tensor]  # F of (x, *values), differentiable to any order
    totals: Callable[..., Tensor]  # of the same, "problems totals": what the solver keeps from x0
    run: Callable[..., tuple[Tensor, ...]]  # of the values, plain: a root and what comes with it
    numbers: Callable[[], Iterable[float]]  # that the solver was given: its bounds may be there
    own_linear_solve: Callable[[Sequence[Tensor]], LinearSolve | None]  # with these values
    inputs_recorded: Callable[[], Sequence[Tensor]]  # that the recorded F reaches, to be asked by
    # Inside, F reads its constants as they are now, even if its graph is used later.
    constants_as_they_are: Callable[[], AbstractContextManager[None]]

    def __init__(self) -> None:
        self._known: tuple[tuple[Tensor, ...], Derivative, System] | None = None
        self._measured: tuple[System, Hashable, diagnostics.Figures] | None = None

    def run_many(
        self, size: int, dims: Sequence[int | None], *values: Tensor
    ) -> tuple[Tensor, ...] | None:
        """`run` for `size` conditions at once, by a solver that takes a batch itself."""
        del size, dims, values
        return None

    def start(self, x0: Tensor) -> Tensor:
        """The first of the values as Float[Tensor, "problems n"]."""
        return x0

    def read(self, values: Sequence[Tensor], /) -> Sequence[Tensor]:
        """What the recorded F reads where it reads one of the values."""
        return values

    # --- a solution

    def residual(self, x: Tensor, columns: Tensor, /, *values: Tensor) -> Tensor:
        """F, completed by the totals that are kept."""
        with _compat.for_many_passes():
            return self.completed(self.equations(x, *values), x, columns, *values)

    def completed(self, f: Tensor, x: Tensor, columns: Tensor, /, *values: Tensor) -> Tensor:
        if self.rule.conserved is None:
            return f
        change = self.totals(x, *values) - self.totals(values[0], *values)
        return f + (columns @ change[..., None])[..., 0]

    def find(self, *values: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """A root, the completing columns there, and what comes with it."""
        x, *others = self.run(*values)
        columns = self._columns(x, values)
        if self.rule.polish and x.numel():
            check_not_recorded()
            x = self._polished(x, columns, values)
        return x, columns, others

    def to_bounds(self) -> Self:
        """The condition for a step that ends on the bounds that are active, where x is near."""
        return self

    def _polished(self, x: Tensor, columns: Tensor, values: Sequence[Tensor]) -> Tensor:
        """The solution after one more step, of Newton's method.

        Unless a second one would be no shorter (Deuflhard's monotonicity test): then x is so far
        from a solution that a step tells nothing, or so near that rounding is all that is left.
        Nor where the step is not finite, or leads to where the function has no value.
        """
        of = self.to_bounds()

        def f_at(x: Tensor) -> tuple[Tensor, Tensor]:
            at = x.clone().requires_grad_()
            with torch.enable_grad():
                return at, of.residual(at, columns, *values)

        system = of._system(of._derivative(*f_at(x)), values)  # noqa: SLF001 (as self)
        step = system.newton_step()
        finite = torch.isfinite(step).all(1, keepdim=True)
        if not bool(finite.any()):
            return x
        step = torch.where(finite, step, 0)
        try:
            f = f_at(x - step)[1].detach()
        except Exception:  # noqa: BLE001 (out of the function's domain)
            return x
        following = system.solve(f, transposed=False)
        unit = diagnostics.units(self._size(x, self.start(values[0])))
        first, second = ((s / unit).abs().amax(1, keepdim=True) for s in (step, following))
        return torch.where(second < first, x - step, x)

    def solve(self, *values: Tensor) -> tuple[Tensor, ...]:
        """A solution, and what comes with it."""
        x, columns, others = self.find(*values)
        # With a leaf, as a derivative will evaluate it: some operations round differently without
        # one.
        with torch.enable_grad():
            f = self.residual(x.clone().requires_grad_(), columns, *values)
        return x, f.detach(), columns, *others

    def _columns(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        if self.rule.conserved is None:
            return x.new_empty(*x.shape, 0)
        at = x.clone().requires_grad_()
        with torch.enable_grad():
            f = self.equations(at, *values)
            totals = self.totals(at, *values)
        return completion(
            at, f, totals, diagnostics.units(self._size(x, self.start(values[0]))), self.rule.name
        )

    # --- its linear systems

    def linear(
        self,
        transposed: bool,  # noqa: FBT001
        at: Solution,
        values: tuple[Tensor, ...],
        b: Tensor,
    ) -> Tensor:
        """`u` with A u = b or A^T u = b, for `b` of one more axis also many at once; raises, or is
        NaN, where it cannot be trusted. A problem without a share in `b` is not asked about."""
        if not b.numel() or b.is_meta:  # there are no numbers to solve with
            return torch.empty_like(b)
        check_not_exported(self.rule.name)
        plain = Solution(*(t.detach() for t in at)), tuple(v.detach() for v in values)
        with naming_reentrant_checkpoints(at.f, self.rule.name):
            derivative, system = self._system_at(*plain)
            if self.communicates and not isinstance(system, Dense):
                check_same_steps(derivative.at, derivative.f, b, self.rule.name)
            u = system.solve(b, transposed=transposed)
            judged = self._judge(system, derivative, *plain)
        if judged.all_good:
            return u
        wanted = (b != 0).any(-1)
        while wanted.dim() > 1:
            wanted = wanted.any(0)
        bad = ~judged.good & wanted
        if bool(bad.any()):
            if self.rule.on_failure != "nan":
                raise self._failure(judged, int(bad.nonzero()[0]), at, values)
            u = torch.where(bad[:, None], float("nan"), u)
        return torch.where((~judged.good & ~wanted)[:, None], 0, u)

    def explained(
        self, k: int, name: str, at: Solution, values: Sequence[Tensor], /
    ) -> FreevarsError | None:
        """The error of problem k in terms of the user's problem, where that says more."""
        del k, name, at, values
        return None

    def _failure(
        self, judged: _Judged, k: int, at: Solution, values: Sequence[Tensor]
    ) -> FreevarsError:
        problems = len(judged.good)
        name = self.rule.name + (f" (problem {k} of {problems})" if problems > 1 else "")
        explained = self.explained(k, name, at, values)
        if explained is not None:
            return explained
        at_start = torch.equal(at.x[k], self.start(values[0])[k])
        limits, kind = self._limits(), self.rule.kind
        figures = judged.figures.of(k)
        least_squares = self.rule.on_failure == "least_squares"
        regular = least_squares or figures.rcond > limits.rcond
        if not figures.change < math.inf:  # not known
            limits = limits._replace(step=limits.certain)
        changes = figures.step <= limits.step and not figures.change <= limits.change
        accepted = limits.negligible if changes else limits.step
        stopped = figures.finite and not figures.step <= accepted and not at_start
        if stopped and regular and self.by_options:
            return option_matters(name, kind, figures.step, accepted, self.by_options)
        bounded: list[str] = []
        if stopped and not self.constrained and isinstance(judged.system, Dense):
            change = judged.system.newton_step()
            components = self.unknown.components(k, at.x, change)
            bounded = on_a_bound(components, self.numbers(), kind, accepted)
        context = Context(name, kind, least_squares, bounded, at_start, self.rule.polish)
        return failure(figures, limits, context)

    def _limits(self) -> Limits:
        return diagnostics.limits_of(self.unknown.dtype, self.rule.tol)

    def _system_at(self, at: Solution, values: tuple[Tensor, ...]) -> tuple[Derivative, System]:
        """The system at a solution; the backward passes of one call share it."""
        key = (*at, *values)
        if self._known is None or not all(map(torch.equal, self._known[0], key)):
            leaf, f = self._evaluated(at, values)
            derivative = self._derivative(leaf, f)
            if self.rule.check:
                check_independent(leaf, f, self.rule.name)
            self._known = (key, derivative, self._system(derivative, values))
        return self._known[1:]

    def _judge(
        self, system: System, derivative: Derivative, at: Solution, values: tuple[Tensor, ...]
    ) -> _Judged:
        figures = diagnostics.Figures.unmeasured(at.x)
        if not self.rule.check:
            return _Judged(system, figures, torch.ones_like(figures.finite), all_good=True)
        known, evidence = self._measured, system.evidence
        if known is None or known[:2] != (system, evidence):
            inputs = functools.partial(self._with_inputs, at, values)
            figures = system.figures(derivative, self._sizes(at, values), self._limits(), inputs)
            self._measured = known = (system, evidence, figures)
        figures = known[2]
        figures = figures._replace(
            # Of an x that is not, F and its derivative may be: a linear objective, for one.
            finite=figures.finite & torch.isfinite(at.x).all(1),
            residual=figures.residual.clamp(min=system.residual),
        )
        least_squares = self.rule.on_failure == "least_squares"
        good = figures.good(self._limits(), least_squares=least_squares)
        return _Judged(system, figures, good, bool(good.all()))

    def _evaluated(self, at: Solution, values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """F at a leaf: what was recorded, or evaluated again and compared with it."""
        if self.recorded is not None and torch.equal(self.recorded[0], at.x):
            return self.recorded
        leaf = at.x.clone().requires_grad_()
        with torch.enable_grad():
            f = self.residual(leaf, at.columns, *values)
        self.compare(f.detach(), at.f)
        return leaf, f

    def _with_inputs(
        self, at: Solution, values: tuple[Tensor, ...]
    ) -> tuple[Derivative, Sequence[Tensor], bool]:
        """F with a graph also to what a derivative is by: as it was recorded, or evaluated with a
        graph to all that may be."""
        if self.recorded is not None and torch.equal(self.recorded[0], at.x):
            return self._derivative(*self.recorded), self.inputs_recorded(), True
        moving = [i for i, v in enumerate(values) if is_smooth(v) and i not in self.constants]
        by = [values[i].detach().clone().requires_grad_() for i in moving]
        leaf = at.x.clone().requires_grad_()
        with torch.enable_grad():
            f = self.residual(leaf, at.columns, *replaced(values, moving, by))
        return self._derivative(leaf, f), by, False

    def _nearby(self, at: Solution, values: tuple[Tensor, ...]) -> Sequence[Tensor]:
        if self.recorded is not None and torch.equal(self.recorded[0], at.x):
            return self.nearby
        with torch.no_grad():
            return [self.residual((1 - h) * at.x, at.columns, *values).detach() for h in PARTS]

    def compare(self, now: Tensor, recorded: Tensor) -> None:
        """Refuses an F that is not bit for bit what was recorded, 0.0 and -0.0 apart."""
        comparison.compare(now, recorded, self.rule.name)

    def _derivative(self, leaf: Tensor, f: Tensor) -> Derivative:
        # With constraints, F is not a gradient: it contains them as they are.
        return Derivative(leaf, f, symmetric=self._minimum and not self.constrained)

    @property
    def _minimum(self) -> bool:
        return is_minimum(self.rule.kind) and self.rule.conserved is None

    def _system(self, derivative: Derivative, values: Sequence[Tensor]) -> System:
        if self.communicates:
            check_shared(derivative.at, derivative.f, self.rule.name)
        size = self._size(derivative.at.detach(), self.start(values[0]))
        return system_of(
            derivative,
            size,
            self.unknown.structure,  # a method of this object would hold the system in a circle
            own=self.own_linear_solve(values),
            least_squares=self.rule.on_failure == "least_squares",
            tensors=self.unknown.leafwise(size),
            minimum=self._minimum,
            fixed_point=self.rule.kind == "fixed_point" and self.rule.conserved is None,
        )

    def _sizes(self, at: Solution, values: tuple[Tensor, ...]) -> Sizes:
        x, x0 = at.x, self.start(values[0])

        def by_leaf(unit: Tensor | None) -> tuple[Tensor, Tensor]:
            d = torch.ones_like(x) if unit is None else unit
            near, way = (d * self.unknown.leafwise(v / d) for v in (x, x - x0))
            if unit is not None:
                # A soft direction has a large unit too, with nothing in it that is so large.
                near, way = (
                    torch.minimum(size, self.unknown.largest(v))
                    for size, v in ((near, x), (way, x - x0))
                )
            return near, torch.maximum(near, way)

        def nearby() -> Sequence[Tensor]:
            return self._nearby(at, values)

        return Sizes(x, self.unknown.magnitude(x), self._size(x, x0), by_leaf, nearby)

    def _size(self, x: Tensor, x0: Tensor) -> Tensor:
        return torch.maximum(self.unknown.magnitude(x), self.unknown.magnitude(x - x0))
