"""Derivatives of a definite integral, by the solver that computes it.

`freevars._solvers.integration` has Leibniz' rule. Both of its integrals are calls of the decorated
solver for another integrand. Not here: differential equations (`odeint`).
"""

import math
import operator
from collections.abc import Callable, Sequence
from numbers import Number, Real
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor

from freevars._contract import check_callable
from freevars._sequences import replaced
from freevars._solvers.integration import (
    INTEGRAL,
    IntegralOptions,
    IntegralRule,
    Takes,
    not_resolved,
)
from freevars._solvers.signature import SolverCall
from freevars.errors import StructureError
from freevars.torch._compat import pytree
from freevars.torch._convert.convert import closure_convert
from freevars.torch._rules.asked import Asked
from freevars.torch._rules.forms import Flat, evaluated, is_smooth, shape_of
from freevars.torch._rules.halves import difference, direction
from freevars.torch._rules.integrator import Integrator, operate
from freevars.torch._rules.partition import Remainder, partition
from freevars.torch._rules.products import jvp, paired, vjps
from freevars.torch._rules.unsupported import check_not_of_a_program

__all__ = ["IntegralSolver"]

P = ParamSpec("P")
R = TypeVar("R")
# The leaves of an integrand, from t and the tensors that it depends on.
Fun = Callable[[Tensor, Sequence[Tensor]], list[Tensor]]
# What the solver is given for these leaves, a tensor or a pytree, and back.
Pack = Callable[[list[Tensor]], Any]

_first = operator.itemgetter(0)


class IntegralSolver(Integrator[P, R]):
    """A solver with the derivatives of an integral; made by `integral`.

    It is called like the solver itself, which is `__wrapped__`, and may be a method.

    Example:
        >>> import freevars.torch as fv
        >>> solver = fv.integral(lambda f, a, b: (b - a) * f((a + b) / 2))
        >>> isinstance(solver, fv.IntegralSolver), float(solver(lambda t: 3 * t, 0.0, 2.0))
        (True, 6.0)
    """

    kind: ClassVar[str] = "integral"
    leads: ClassVar[tuple[str, ...]] = INTEGRAL
    options = IntegralOptions
    stated = IntegralRule

    def _solve(self, call: SolverCall) -> Any:
        check_callable(call.fun)
        ends, dtype = self._limits(*call.x0)

        def integrand(t: Tensor, args: Any, kwargs: Any) -> Any:
            value = call.fun(t, *args, **kwargs)
            if all(isinstance(leaf, Tensor | Number) for leaf in pytree.tree_leaves(value)):
                return pytree.tree_map(_inexact, value)
            message = (
                f"{self.__name__}: the integrand: expected a number, a tensor, or a pytree of"
                f" these, got {value!r}."
            )
            raise StructureError(message)

        extra = (call.args, call.kwargs)
        at = torch.zeros((), dtype=dtype)
        converted, hoisted = closure_convert(integrand, at, *extra, rng="replay")
        given, around = partition(extra)
        leaves, spec = pytree.tree_flatten(converted.out_struct)
        n = len(given)

        def fun(t: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
            args, kwargs = around.combine(values[:n])
            return pytree.tree_leaves(converted(t, args, kwargs, *values[n:]))

        def pack(leaves: list[Tensor]) -> Any:
            return pytree.tree_unflatten(leaves, spec)

        is_leaf = spec == pytree.tree_structure(0)
        takes = self.rule.form([tuple(leaf.shape) for leaf in leaves], is_leaf=is_leaf)
        of_options, options = partition(call.options)
        operation = _Integral(self, fun, pack, takes, options, dtype, ends)
        tensors = [torch.as_tensor(e, dtype=dtype) for e in call.x0]
        tensors += [*of_options, *given, *hoisted]
        check_not_of_a_program([*tensors, *converted.constants], self.__name__)
        value = pack(operate(operation, tensors))
        converted.replay.advance()
        return (value, operation.aux) if self.rule.has_aux else value

    def _limits(self, *ends: Any) -> tuple[list[float | None], torch.dtype]:
        """The limits that are infinite numbers, and the dtype of all points."""
        dtype = None
        for name, end in zip(("a", "b"), ends, strict=True):
            number = isinstance(end, Real) and not isinstance(end, bool)
            if not number and not (
                isinstance(end, Tensor) and not end.is_complex() and not end.dim()
            ):
                message = f"{self.__name__}: {name}: expected a real number, got {end!r}."
                raise StructureError(message)
            if isinstance(end, Tensor) and end.is_floating_point():
                dtype = end.dtype if dtype is None else torch.promote_types(dtype, end.dtype)
        infinite = [float(e) if not isinstance(e, Tensor) and math.isinf(e) else None for e in ends]
        return infinite, dtype or torch.get_default_dtype()


class _Integral:
    """One integral, of the limits, the options' tensors and the values that `fun` depends on."""

    first_option = 2

    def __init__(
        self,
        solver: IntegralSolver[..., Any],
        fun: Fun,
        pack: Pack,
        takes: Takes,
        options: Remainder,
        dtype: torch.dtype,
        infinite: Sequence[float | None],
    ) -> None:
        self.solver, self.fun, self.pack, self.takes = solver, fun, pack, takes
        self.options, self.dtype, self.infinite = options, dtype, infinite
        self.start = 2 + options.count  # of the values
        self.aux: Any = None

    def answer(self, tensors: Sequence[Tensor], point: tuple[Tensor, ...]) -> list[Tensor]:
        values = tensors[self.start :]
        return evaluated(lambda t: self.fun(t, values), *point)

    def run(self, tensors: Sequence[Tensor], asked: Asked) -> Sequence[Tensor]:
        values = tensors[self.start :]
        seen: list[Any] = []

        def integrand(t: Any, *_: Any, **__: Any) -> Any:
            point = (self._point(t),)
            leaves = self.answer(tensors, point)
            asked.note(point, leaves)
            value = self.pack(leaves)
            seen[:] = [pytree.tree_map(shape_of, value)]
            return value

        a, b = (t if e is None else e for t, e in zip(tensors, self.infinite, strict=False))
        call = SolverCall(None, (a, b), (), {}, self.options.combine(tensors[2 : self.start]))  # type: ignore[arg-type]
        out, self.aux = self.solver.call_solver(integrand, (a, b), call, "integral")
        low, high = (_inside(*tensors[:2]), _inside(*tensors[1::-1]))
        point = (low + 0.6 * (high - low),)
        asked.note_if_none(lambda: (point, self.answer(tensors, point)))
        return self._checked(out, seen, values, tensors)

    def _point(self, t: Any) -> Tensor:
        point = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else self.dtype)
        if point.dim() or torch.promote_types(point.dtype, self.dtype) != self.dtype:
            message = (
                f"{self.solver.__name__}: the integrand: expected a point of shape () and"
                f" {self.dtype}, as the limits have it, got {point.dtype}{list(point.shape)}. Give"
                " the limits as tensors of the dtype in which the solver works;"
                " torch.func.vmap(integrand) takes many points."
            )
            raise StructureError(message)
        return point.to(self.dtype)

    def _checked(self, out: Any, seen: list[Any], values: Any, tensors: Any) -> list[Tensor]:
        """The integral, of the structure and the shapes of the integrand."""
        if not seen:  # the solver did not ask
            leaves = self.fun(_inside(tensors[0], tensors[1]), values)
            seen.append(pytree.tree_map(shape_of, self.pack(leaves)))
        found = pytree.tree_map(shape_of, out)
        if found != seen[0]:
            message = (
                f"{self.solver.__name__}: the returned integral: expected the structure and shapes"
                f" of the integrand, {seen[0]}, got {found}. takes= says what the solver can"
                " integrate."
            )
            raise StructureError(message)
        # Numbers, as of scipy.integrate.quad, are as exact as the limits.
        return [
            leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf, dtype=self.dtype)
            for leaf in pytree.tree_leaves(out)
        ]

    # Derivatives.

    def pull(
        self, tensors: Sequence[Tensor], out: Sequence[Tensor], g: Sequence[Tensor], needed: Any
    ) -> Sequence[Tensor | None]:
        """Cotangents of the limits and of what the integrand depends on."""
        grads: list[Tensor | None] = [None] * len(tensors)
        values = list(tensors[self.start :])
        for i, sign in ((0, -1), (1, 1)):
            if needed[i]:
                there = self._value_at(tensors[i], tensors[1 - i], values)
                grads[i] = sign * paired(g, there).to(self.dtype)
        wanted = [i for i, v in enumerate(values) if needed[self.start + i] and is_smooth(v)]
        if wanted:
            found = self._pulled(tensors, out, g, wanted)
            for i, grad in zip(wanted, found, strict=True):
                grads[self.start + i] = grad
        return grads

    def _pulled(
        self, tensors: Sequence[Tensor], out: Sequence[Tensor], g: Sequence[Tensor], wanted: Any
    ) -> list[Tensor]:
        """Cotangents of those values that are wanted."""
        values = list(tensors[self.start :])
        n, of_out = len(values), Flat(out)
        flat = Flat([values[i] for i in wanted])

        def pulled(t: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
            def f(*some: Tensor) -> Tensor:
                return of_out.ravel(self.fun(t, replaced(inputs[:n], wanted, some)))

            arrived = of_out.ravel(inputs[n : n + len(g)])
            return list(vjps(f, [inputs[i] for i in wanted], arrived))

        def integrate(fun: Fun, pack: Pack) -> list[Tensor]:
            operation = self._like(fun, pack)
            return operate(operation, [*tensors, *g])

        if self.takes == "pytree":
            found = integrate(pulled, tuple)
        elif self.takes == "array":
            found = flat.unravel(integrate(lambda t, v: [flat.ravel(pulled(t, v))], _first)[0])
        else:
            numbers = [
                integrate(lambda t, v, k=k: [flat.ravel(pulled(t, v))[k]], _first)[0]  # type: ignore[misc]
                for k in range(flat.size)
            ]
            found = flat.unravel(torch.stack(numbers))
        along = direction(flat.ravel([values[i] for i in wanted]))

        def number(along: Tensor, cotangents: list[Tensor]) -> list[Tensor]:
            one = along @ flat.ravel(cotangents)
            return [one[None] if self.takes == "array" else one]

        form = tuple if self.takes == "pytree" else _first
        of = self._like(lambda t, v: number(v[-1], pulled(t, v)), form)
        # An input as well: a batch of integrals has a direction each.
        factor = of.judged([*tensors, *g, along], number(along, found), g)
        return [grad * factor for grad in found]

    def judged(
        self, tensors: Sequence[Tensor], whole: Sequence[Tensor], asked: Sequence[Tensor]
    ) -> Tensor | float:
        """A factor for what is derived from the integral `whole`: NaN where that is not good."""
        if not self.solver.rule.check or any(end is not None for end in self.infinite):
            return 1.0
        with torch.no_grad():
            a, b, *rest = (t.detach() for t in tensors)
            values = rest[self.options.count :]
            error = difference(
                lambda low, high: operate(self, [low, high, *rest]),
                lambda t: self.fun(t, values),
                (a, b),
                whole,
            )
        eps = max(float(torch.finfo(self.dtype).eps), Flat(whole).eps)
        return self.solver.judged(error, eps, asked, not_resolved)

    def push(
        self, tensors: Sequence[Tensor], out: Sequence[Tensor], dots: Sequence[Tensor | None]
    ) -> Sequence[Tensor]:
        """The tangent of the integral."""
        values, n = list(tensors[self.start :]), len(tensors) - self.start
        of_out = Flat(out)
        total = [torch.zeros_like(t) for t in out]
        moving = [i for i in range(n) if dots[self.start + i] is not None and is_smooth(values[i])]
        some = [d for i in moving if (d := dots[self.start + i]) is not None]
        if moving:

            def pushed(t: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
                def f(*some: Tensor) -> Tensor:
                    return of_out.ravel(self.fun(t, replaced(inputs[:n], moving, some)))

                like = inputs[moving[0]].new_zeros(of_out.size, dtype=of_out.dtype)
                at = [inputs[i] for i in moving]
                return of_out.unravel(jvp(f, at, inputs[n:], like=like))

            of = self._like(pushed, self.pack)
            total = operate(of, [*tensors, *some])
            factor = of.judged([*tensors, *some], total, some)
            total = [s * factor for s in total]
        for i, sign in ((0, -1), (1, 1)):
            change = dots[i]
            if change is not None:
                there = self._value_at(tensors[i], tensors[1 - i], values)
                total = [s + sign * f * change for s, f in zip(total, there, strict=True)]
        return [s.to(o.dtype) for s, o in zip(total, out, strict=True)]

    def _like(self, fun: Fun, pack: Pack) -> "_Integral":
        rest = (self.takes, self.options, self.dtype, self.infinite)
        return _Integral(self.solver, fun, pack, *rest)

    def _value_at(self, end: Tensor, other: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
        """F at one limit; zero where that is infinite, where nothing moves."""
        finite = torch.isfinite(end)
        # Some point inside in its place, so that no derivative of f is taken at infinity.
        leaves = self.fun(torch.where(finite, end, _inside(end, other)), values)
        return [torch.where(finite, leaf, torch.zeros_like(leaf)) for leaf in leaves]


def _inside(end: Tensor, other: Tensor) -> Tensor:
    """One limit, or a point between two where that is infinite."""
    beside = torch.where(torch.isfinite(other), other, torch.zeros_like(end))
    return torch.where(torch.isfinite(end), end, beside + torch.sign(end))


def _inexact(leaf: Any) -> Tensor:
    t = torch.as_tensor(leaf)
    return t if is_smooth(t) else t.to(torch.get_default_dtype())
