"""Derivatives of a definite integral, by the solver that computes it.

`freevars._solvers.integration` has Leibniz' rule. Both of its integrals are calls of the decorated
solver for another integrand, so they have derivatives of any order themselves. Not here:
differential equations (`odeint`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from freevars._contract import check_callable
from freevars._sequences import replaced
from freevars._solvers.integration import (
    INTEGRAL,
    IntegralOptions,
    IntegralRule,
    not_resolved,
)
from freevars._solvers.signature import SolverCall
from freevars.errors import StructureError
from freevars.jax import _compat
from freevars.jax._convert.static import as_static, from_static
from freevars.jax._rules.forms import Flat
from freevars.jax._rules.halves import difference, direction
from freevars.jax._rules.hosted import Hosted
from freevars.jax._rules.integrator import Integrator, accepted
from freevars.jax._solver.problem import Problem
from freevars.jax._solver.tangents import dots_of

__all__ = ["IntegralSolver"]

P = ParamSpec("P")
R = TypeVar("R")


class IntegralSolver(Integrator[P, R]):
    """A solver with the derivatives of an integral; made by `integral`.

    It is called like the solver itself, which is `__wrapped__`, and may be a method.

    Example:
        >>> import freevars.jax as fv
        >>> solver = fv.integral(lambda f, a, b: (b - a) * f((a + b) / 2))
        >>> isinstance(solver, fv.IntegralSolver), float(solver(lambda t: 3 * t, 0.0, 2.0))
        (True, 6.0)
    """

    kind: ClassVar[str] = "integral"
    leads: ClassVar[tuple[str, ...]] = INTEGRAL
    options = IntegralOptions
    stated = IntegralRule

    def _use(self, solver: Callable[P, R]) -> None:
        super()._use(solver)
        self._hosted = Hosted(solver, self._call_on_host) if self._on_host else None  # type: ignore[arg-type]

    def _solve(self, call: SolverCall) -> Any:
        check_callable(call.fun)
        at, dtype = self._limits(*call.x0)

        def integrand(t: Any, *args: Any, **kwargs: Any) -> Any:
            value = call.fun(t, *args, **kwargs)
            if value is not None and _arrays(value):
                return jax.tree.map(_inexact, value)
            message = (
                f"{self.__name__}: the integrand: expected a number, an array, or a pytree of"
                f" these, got {value!r}."
            )
            raise StructureError(message)

        problem = Problem.of(integrand, jnp.zeros((), dtype), call.args, call.kwargs)
        return self.solve(problem, at, self.as_options(call.options))

    def _limits(self, *ends: Any) -> tuple[Any, Any]:
        """The limits as arrays, infinite Python numbers as they are; and their dtype."""
        numbers = []
        for name, end in zip(("a", "b"), ends, strict=True):
            real = _compat.is_array(end) and not jnp.issubdtype(
                jnp.result_type(end), jnp.complexfloating
            )
            if not real or jnp.shape(end) != ():
                message = f"{self.__name__}: {name}: expected a real number, got {end!r}."
                raise StructureError(message)
            numbers.append(end)
        dtype = jnp.result_type(float, *numbers)
        fixed = [isinstance(end, float) and math.isinf(end) for end in numbers]
        made = [e if f else jnp.asarray(e, dtype) for e, f in zip(numbers, fixed, strict=True)]
        return as_static(tuple(made), lambda end: not isinstance(end, float)), dtype

    def _run_solver(self, problem: Problem, at: Any, options: Any) -> Any:
        a, b = from_static(at)
        struct = problem.struct()
        t = problem.fun.in_struct[0]
        if self._hosted is not None:
            leaves, tree = jax.tree.flatten(struct)
            flat = Flat(leaves)
            number = tree.num_leaves == 1 and flat.size == 1 and leaves[0].shape == ()
            shape = () if number else (flat.size,)
            point = jnp.zeros((), t.dtype)
            vector, aux = self._hosted(problem, point, shape, (a, b), from_static(options))
            value = tree.unflatten(flat.unravel(jnp.reshape(vector, flat.size).astype(flat.dtype)))
        else:
            fun: Any = jax.tree_util.Partial(_At(str(t.dtype)), problem.as_given())
            out = self.call_solver(fun, (a, b), problem, options)
            value, aux = self.rule.split_aux(out, self.__name__, "integral")
            value = _like(value, struct, self.__name__)
        return (value, aux) if self.rule.has_aux else value

    def _call_on_host(self, fun: Any, at: Any, given: dict[str, Any], shape: Any) -> Any:
        def integrand(t: Any) -> Any:
            value = fun([t])
            return value if shape else float(value[0])

        solver: Any = self._solver
        out = self._signature.call(solver.__wrapped__, SolverCall(integrand, at, (), {}, given))
        return self.rule.split_aux(out, self.__name__, "integral")

    # The rule.

    def _push(self, primals: Any, tangents: Any) -> Any:
        problem, at, options, own = primals
        self.refuse_lost(own, tangents)
        out = self._operation(*primals)
        value = self.result_of(out)
        types = jax.tree.leaves(jax.tree.map(jax.typeof, value))
        terms = []
        moving, dots = dots_of(tangents[0])
        if moving:
            given, structure = jax.tree.flatten((problem, at, options))
            by_problem = _ByProblem(self, structure, moving)
            terms.append(_compat.linear_map(by_problem, given, dots, types))
        ends, moved = from_static(at), from_static(tangents[1])
        for i, sign in ((0, -1), (1, 1)):
            if isinstance(ends[i], float) or _compat.is_symbolic_zero(moved[i]):
                continue
            change = sign * moved[i]
            there = jax.tree.leaves(_value_at(problem, ends[i], ends[1 - i]))
            terms.append([(f * change).astype(t.dtype) for f, t in zip(there, types, strict=True)])
        return self.with_tangent(out, terms)

    def integrate(self, integrand: Callable[[Any], Any], t: Any, at: Any, options: Any) -> Any:
        """Another integral between the same limits; `t`: the type of a point."""
        problem = Problem.of(integrand, jnp.zeros((), t.dtype), (), {})
        return self.result_of(self.solve(problem, at, options))


@dataclass(frozen=True)
class _ByProblem:
    """dp -> int (df/dp dp) dt, for the leaves p of a problem that move."""

    solver: IntegralSolver[..., Any]
    tree: Any  # of the problem, the limits and the options
    moving: tuple[int, ...]

    def forward(self, given: Sequence[Any], x: Sequence[Any]) -> Sequence[Any]:
        out, error = _forward(self, list(given), list(x))
        self._tell(given, error)
        return out

    def transposed(self, given: Sequence[Any], g: Sequence[Any]) -> Sequence[Any]:
        out, error = _transposed(self, list(given), list(g))
        self._tell(given, error)
        return out

    def _tell(self, given: Sequence[Any], error: Any) -> None:
        self.solver.tell(error, _eps(self.tree.unflatten(given)[0]), not_resolved)

    def judged(
        self, integrand: Callable[[Any], Any], given: list[Any], whole: Any, out: list[Any], x: Any
    ) -> tuple[list[Any], Any]:
        """`out`, or NaN if `whole`, the integral of `integrand`, is inaccurate; and its error. Both
        are in the form that the solver takes; `out` is derived from `whole`, for the direction
        x."""
        problem, at, options = self.tree.unflatten(jax.lax.stop_gradient(given))
        ends = from_static(at)
        if not self.solver.rule.check or any(isinstance(end, float) for end in ends):  # infinite
            return out, jnp.zeros(())
        point = jnp.zeros((), problem.fun.in_struct[0].dtype)
        part = Problem.of(integrand, point, (), {})

        def over(a: Any, b: Any) -> list[Any]:
            found = self.solver.solve(part, as_static((a, b), _compat.is_array), options)
            return jax.tree.leaves(self.solver.result_of(found))

        error = difference(
            over, lambda t: jax.tree.leaves(integrand(t)), ends, jax.tree.leaves(whole)
        )
        return accepted(out, x, error <= self.solver.rule.limit(_eps(problem))), error

    def parts(self, given: list[Any]) -> tuple[Any, list[Any], Any, Any, Any]:
        """f(t, some of p), this part of p, the problem, the limits, the options."""
        problem, at, options = self.tree.unflatten(given)
        leaves, tree = jax.tree.flatten(problem)

        def f(t: Any, some: list[Any]) -> Any:
            return tree.unflatten(replaced(leaves, self.moving, some)).value(t, has_aux=False)

        return f, [leaves[i] for i in self.moving], problem, at, options


@functools.partial(jax.jit, static_argnums=0)
@_compat.any_rank
def _forward(by: _ByProblem, given: list[Any], x: list[Any]) -> tuple[list[Any], Any]:
    def pushed(given: list[Any], x: list[Any]) -> Callable[[Any], Any]:
        f, some, *_ = by.parts(given)
        return lambda t: jax.jvp(functools.partial(f, t), (some,), (x,))[1]

    problem, at, options = by.tree.unflatten(given)
    whole = by.solver.integrate(pushed(given, x), problem.fun.in_struct[0], at, options)
    fixed = pushed(*jax.lax.stop_gradient((given, x)))
    return by.judged(fixed, given, whole, jax.tree.leaves(whole), x)


@functools.partial(jax.jit, static_argnums=0)
@_compat.any_rank
def _transposed(by: _ByProblem, given: list[Any], g: list[Any]) -> tuple[list[Any], Any]:
    _, some, problem, at, options = by.parts(given)
    takes, flat = by.solver.takes(problem.struct()), Flat(some)
    types, tree = jax.tree.flatten(problem.struct())
    integrate = functools.partial(
        by.solver.integrate, t=problem.fun.in_struct[0], at=at, options=options
    )

    def pulled(given: list[Any], g: list[Any]) -> Callable[[Any], list[Any]]:
        f, some, *_ = by.parts(given)
        arrived = tree.unflatten([ct.astype(s.dtype) for ct, s in zip(g, types, strict=True)])
        return lambda t: jax.vjp(functools.partial(f, t), some)[1](arrived)[0]

    at_point = pulled(given, g)
    if takes == "pytree":
        found = list(integrate(lambda t: tuple(at_point(t))))
    elif takes == "array":
        found = flat.unravel(integrate(lambda t: flat.ravel(at_point(t))))
    else:
        # One number at a time, as a batch: what does not depend on the number is computed once.
        each = jax.vmap(lambda i: integrate(lambda t: flat.ravel(at_point(t))[i]))
        found = flat.unravel(each(jnp.arange(flat.size)))
    found = [*map(_compat.not_more_varying, found, some)]  # in one vector all vary as the first
    fixed, along = pulled(*jax.lax.stop_gradient((given, g))), direction(flat.ravel(some))

    def number(cotangents: list[Any]) -> Any:
        one = along @ flat.ravel(cotangents)
        return one[None] if takes == "array" else (one,) if takes == "pytree" else one

    return by.judged(lambda t: number(fixed(t)), given, number(found), found, g)


def _eps(problem: Problem) -> float:
    """The coarsest spacing of a point and of the integrand's values."""
    return Flat([problem.fun.in_struct[0], *jax.tree.leaves(problem.struct())]).eps


def _value_at(problem: Problem, end: Any, other: Any) -> Any:
    """F at one limit; zero where that is infinite, where nothing moves."""
    finite = jnp.isfinite(end)
    # Some point inside in its place, so that no derivative of f is taken at infinity.
    inside = jnp.where(jnp.isfinite(other), other + jnp.sign(end), 0).astype(end.dtype)
    there = problem.value(jnp.where(finite, end, inside), has_aux=False)
    return jax.tree.map(lambda f: jnp.where(finite, f, 0), there)


@dataclass(frozen=True)
class _At:
    """A function of t in the dtype that it was converted for; compares by this."""

    dtype: str

    def __call__(self, fun: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        return fun(jnp.asarray(t, self.dtype), *args, **kwargs)


def _inexact(leaf: Any) -> Any:
    leaf = jnp.asarray(leaf)
    return leaf if _compat.is_smooth(leaf) else leaf.astype(float)


def _like(value: Any, struct: Any, name: str) -> Any:
    """The integral, of the structure and the shapes of the integrand."""
    found = jax.tree.map(jnp.shape, value) if _arrays(value) else value
    expected = jax.tree.map(lambda s: s.shape, struct)
    if found != expected:
        message = (
            f"{name}: the returned integral: expected the structure and shapes of the integrand,"
            f" {expected}, got {found}. takes= says what the solver can integrate."
        )
        raise StructureError(message)
    return jax.tree.map(_inexact, value)


def _arrays(tree: Any) -> bool:
    return all(map(_compat.is_array, jax.tree.leaves(tree)))
