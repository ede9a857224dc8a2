"""One call of a solver with constraints, as a condition: its Karush-Kuhn-Tucker system.

The unknown is x with the multipliers of `equality` and `inequality`, side by side. Not here: the
equations, and which constraints are active (`active.py`).
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from freevars._solvers import kkt
from freevars._solvers.kkt import CONSTRAINTS, Found, Side
from freevars.errors import FreevarsError, StructureError
from freevars.torch._compat import pytree
from freevars.torch._convert.convert import Converted
from freevars.torch._describe import function_name
from freevars.torch._rules.active import (
    ActiveSet,
    Functions,
    constraints_at,
    multipliers_at,
    system_at,
)
from freevars.torch._rules.condition import Condition, Solution
from freevars.torch._rules.optimality import check_parts, joined, numbers_in, value_of
from freevars.torch._rules.problem import Problem
from freevars.torch._rules.ravel import Unknown

__all__ = ["ConstrainedProblem", "bounds_like", "unknown_of"]


def bounds_like(bounds: Any) -> Callable[..., Any]:
    """The two sides as a function of x, each like x; infinite where there is none."""

    def sides(x: Any, _args: Any = (), _kwargs: Any = None) -> Any:
        lower, upper = bounds
        return _side(lower, x, -math.inf), _side(upper, x, math.inf)

    return sides


def _side(given: Any, x: Any, default: float) -> Any:
    leaves, spec = pytree.tree_flatten(x)
    if given is None or isinstance(given, (int, float, Tensor)):
        sides = [given] * len(leaves)
    else:
        sides, other = pytree.tree_flatten(given)
        if other != spec:
            message = f"bounds: expected each side like x0, or a number, got {given!r}."
            raise StructureError(message)
    found = []
    for side, leaf in zip(sides, leaves, strict=True):
        if leaf.is_complex():
            message = "bounds: complex numbers have no order, got a complex x0."
            raise StructureError(message)
        value = default if side is None else side
        try:
            found.append(torch.zeros_like(leaf) + value)
        except RuntimeError as error:
            message = f"bounds: expected each side like x0, or a number: {error}."
            raise StructureError(message) from None
    return pytree.tree_unflatten(found, spec)


def unknown_of(x0: Any, functions: Mapping[str, Converted[..., Any]], of_x: Unknown) -> Any:
    """x0 with multipliers of zero, as the unknown has it."""
    like = pytree.tree_leaves(x0)[0]
    parts = [x0]
    for name in ("equality", "inequality"):
        if name in functions:
            function = functions[name]
            leaves = check_parts(name, function.out_struct, of_x.batch, function_name(function))
            if name == "inequality" and any(t.is_complex() for t in leaves):
                message = "inequality: complex numbers have no order, got a complex value."
                raise StructureError(message)
            count = sum(numbers_in(t, of_x) * (2 if t.is_complex() else 1) for t in leaves)
            shape = (*of_x.batch, count)
            parts.append(torch.zeros(shape, dtype=of_x.dtype, device=like.device))
    return tuple(parts)


class ConstrainedProblem(Problem):
    """The Karush-Kuhn-Tucker system of the user's functions, and how the user's solver finds x."""

    constrained = True
    ends_on_bounds = False

    @property
    def stating(self) -> Mapping[str, Converted[..., Any]]:
        return self.functions

    def _functions(
        self, functions: Mapping[str, Callable[[Any], Any]], x: Tensor, x0: Tensor
    ) -> Functions:
        of_x, has_aux = self.of_x, self._fun_has_aux

        def objective(x: Tensor) -> Tensor:
            value = value_of(self.rule.kind, functions["fun"](of_x.unravel(x)), of_x, has_aux)
            return value.reshape(of_x.problems)

        def vectors(name: str) -> Callable[[Tensor], Tensor]:
            return lambda x: joined(functions[name](of_x.unravel(x)), of_x, x)

        lower, upper = x.new_tensor(-math.inf), x.new_tensor(math.inf)
        if "bounds" in functions:
            sides = functions["bounds"](of_x.unravel(x))
            lower, upper = (of_x.ravel(side, "a bound") for side in sides)
        else:
            lower, upper = lower.expand_as(x), upper.expand_as(x)
        names = [name for name in CONSTRAINTS[1:] if name in functions]
        moved = (x - self._split(x0)[0]).detach()
        return Functions(objective, {name: vectors(name) for name in names}, lower, upper, moved)

    def _split(self, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        sizes = [self.of_x.n]
        names = [name for name in CONSTRAINTS[1:] if name in self.functions]
        shapes = self.unknown.shapes
        sizes += [shape[-1] for shape in shapes[len(shapes) - len(names) :]]
        x, *parts = torch.split(y, sizes, 1)
        return x, dict(zip(names, parts, strict=True))

    def optimality(
        self, functions: Mapping[str, Callable[[Any], Any]], x: Tensor, x0: Tensor
    ) -> Tensor:
        point, multipliers = self._split(x)
        return system_at(
            self._functions(functions, point, x0),
            point,
            multipliers,
            eps=float(torch.finfo(self.unknown.dtype).eps),
            one_sided=self.rule.one_sided,
            check=self.rule.check,
            nan=self.rule.on_failure == "nan",
            to_bounds=self.ends_on_bounds,
        )

    def to_bounds(self) -> Self:
        there = copy.copy(self)
        Condition.__init__(there)  # with systems of its own
        there.ends_on_bounds = True
        return there

    def _start(self, values: Sequence[Tensor]) -> Any:
        return self.of_x.unravel(self._split(values[0])[0])

    def _options(self, options: dict[str, Any], values: Sequence[Tensor]) -> dict[str, Any]:
        views = self.views(values)
        return options | {name: views[name] for name in CONSTRAINTS[1:] if name in self.functions}

    def _found(self, out: Any, values: Sequence[Tensor]) -> Tensor:
        x = self.of_x.ravel(out, f"the result of {self.rule.name}").detach()
        multipliers = multipliers_at(self._functions(self.views(values), x, values[0]), x)
        return torch.cat([x, *multipliers.values()], 1).detach()

    # --- an error in words of the constraints

    def explained(
        self, k: int, name: str, at: Solution, values: Sequence[Tensor]
    ) -> FreevarsError | None:
        y = at.x.detach()
        x, multipliers = self._split(y)
        functions = self._functions(self.views(values), x, values[0])
        active_set = ActiveSet.of(functions, x, multipliers)
        eps = float(torch.finfo(self.unknown.dtype).eps)
        sides: list[Side] = []
        fixed = functions.fixed[k]
        components = [c.name for c in self.of_x.components(k, x, x)]
        for side, gap, other, pair in (
            ("lower", active_set.gaps[0], active_set.gaps[1], active_set.lower),
            ("upper", active_set.gaps[1], active_set.gaps[0], active_set.upper),
        ):
            for i in (torch.isfinite(gap[k]) & ~fixed).nonzero()[:, 0].tolist():
                there = (float(t[k, i]) for t in (gap, other, active_set.pulls[0], pair.certain))
                sides.append(Side.of_bound(side, components[i], *there, eps=eps))
        if active_set.inequality is not None:
            of = (active_set.gaps[2], active_set.pulls[1], active_set.inequality.certain)
            each = zip(*(t[k].tolist() for t in of), strict=True)
            sides += [Side(f"inequality[{i}]", *numbers) for i, numbers in enumerate(each)]
        bounds = functions.lower[k], functions.upper[k]
        crossed = kkt.are_crossed(*bounds, active_set.size[k], self._limits().certain)
        found = Found(
            sides,
            [components[i] for i in crossed.nonzero()[:, 0].tolist()],
            float(active_set.violated[k]),
            float(active_set.left[k]),
            self._is_dependent(functions, x, active_set, k),
        )
        return kkt.explain(name, found, self._limits(), eps)

    def _is_dependent(self, functions: Functions, x: Tensor, active_set: ActiveSet, k: int) -> bool:
        """Whether the gradients of the constraints that hold at x are, in the space that bounds
        leave; those that hold, and not those with a multiplier, which then is not determined."""
        near = self._limits().certain
        free = ~((active_set.gaps[0].abs() <= near) | (active_set.gaps[1].abs() <= near))[k]
        free &= ~functions.fixed[k]
        rows = (constraints_at(functions, x)[1] * active_set.size[:, None])[k]
        if active_set.inequality is not None:
            holds = active_set.gaps[2][k].abs() <= near
            keep = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            keep[len(rows) - len(holds) :] = holds
            rows = rows[keep]
        rows = rows[:, free]
        if not len(rows):
            return False
        if not rows.shape[1]:
            return True
        rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        least = 10 * float(torch.finfo(rows.dtype).eps) * max(rows.shape)
        return bool((torch.linalg.svdvals(rows) > least).sum() < len(rows))
