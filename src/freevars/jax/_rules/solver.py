"""A solver with a JAX rule: each call is a differentiable function of everything that `fun` reads.

The rule maps a tangent of what `fun` reads to the tangent of x. The map is linear, so JAX
transposes it for reverse mode, and since the rule calls the decorated solver again for x,
derivatives of any order follow. Not here: the map (`rule`), reverse mode alone (`reverse_rule`),
what is done about a failure (`refusal`), how a call is taken apart (`signature`), and what problem
it is (`calls`).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Self, TypedDict, TypeVar, Unpack, overload

import jax
from jax import tree_util

from freevars._solvers import kkt
from freevars._solvers.decorated import DecoratedSolver
from freevars._solvers.options import check_options
from freevars._solvers.signature import SolverCall
from freevars._solvers.stated import States, kind_of
from freevars._solvers.verdict import OnFailure
from freevars.jax import _compat
from freevars.jax._closure import Closure
from freevars.jax._convert.static import as_static, from_static
from freevars.jax._host.host_solver import HostSolver
from freevars.jax._rules import (
    calls,
    constrained,
    linear,
    refusal,
    reverse,
    reverse_rule,
)
from freevars.jax._rules.explain import Diagnosis
from freevars.jax._rules.rule import Rule
from freevars.jax._rules.totals import Totals
from freevars.jax._solver.problem import Problem
from freevars.jax._solver.tangents import dots_of, zero_tangents
from freevars.jax._solver.unknown import as_unknown, is_array

__all__ = ["ImplicitSolver", "Options"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")


class Options(TypedDict, total=False):
    """The keyword arguments of all decorators; see `root`."""

    has_aux: bool  # False
    linear_solve: linear.LinearSolve  # None
    preconditioner: linear.Preconditioner | None  # None
    dense_limit: int  # 512
    on_failure: OnFailure  # "raise"
    check: bool  # True
    tol: float | None  # None
    polish: bool  # False
    conserved: Totals | None  # None
    jit: bool  # True
    one_sided: bool  # False


class ImplicitSolver(DecoratedSolver[P, R]):
    """A solver with a derivative rule; made by `implicit`, `root`, `argmin` and the like.

    It is called like the solver itself, which is `__wrapped__`, and may be a method.

    Example:
        >>> import jax, freevars.jax as fv
        >>> def newton(fun, x0):
        ...     return jax.lax.fori_loop(0, 20, lambda _, x: x - fun(x) / jax.grad(fun)(x), x0)
        >>> solver = fv.root(newton)
        >>> isinstance(solver, fv.ImplicitSolver), solver.__wrapped__ is newton
        (True, True)
    """

    def __init__(
        self, solver: Callable[P, R], states: States = "root", /, **options: Unpack[Options]
    ) -> None:
        kind = kind_of(states)
        check_options(kind, options, Options)
        self._states = states
        if isinstance(solver, HostSolver) and calls.argument_of(states) is not None:
            message = (
                "argument: a solver on the host asks its function at an x; got a condition whose"
                " function takes another argument."
            )
            raise TypeError(message)
        of_rule: dict[str, Any] = dict(options)
        of_method = {name: of_rule.pop(name) for name in linear.CHOICES if name in of_rule}
        method = linear.Method(
            **of_method,
            least_squares=options.get("on_failure") == "least_squares",
            check=options.get("check", True),
        )
        method.validate()
        self._jit = of_rule.pop("jit", True) and not isinstance(solver, HostSolver)
        super().__init__(solver, states, **options)
        self._rule = rule = Rule(self.__name__, kind, method, **of_rule)
        self._run = jax.jit(self._run_solver) if self._jit else self._run_solver
        self._run_converted = jax.jit(_call)
        self._multipliers = jax.jit(
            constrained.with_multipliers, static_argnames=("has_aux", "squares")
        )
        self._implicit = jax.custom_jvp(self._by_its_name(self._forward))
        self._implicit.defjvp(self._push, symbolic_zeros=True)
        in_reverse = self._by_its_name(self._forward_in_reverse)
        self._in_reverse = jax.custom_vjp(in_reverse, nondiff_argnums=(0,))
        by_rows = jax.jit(
            functools.partial(reverse_rule.solve_by_rows, rule), static_argnums=(0, 1)
        )
        pull_back = functools.partial(reverse_rule.pull_back, rule, by_rows)
        self._in_reverse.defvjp(self._save_for_reverse, pull_back, symbolic_zeros=True)

    @overload
    def __get__(self, instance: None, owner: Any = None, /) -> Self: ...
    @overload
    def __get__(
        self: ImplicitSolver[Concatenate[Any, Q], S], instance: object, owner: Any = None, /
    ) -> ImplicitSolver[Q, S]: ...
    def __get__(self, instance: Any, owner: Any = None, /) -> Any:
        return super().__get__(instance, owner)

    def _solve(self, call: SolverCall) -> Any:
        problem, x0, options = self._convert(call)
        captured = self._captured(problem, x0, options)
        known = _compat.nothing_traced()  # no derivative is asked for
        pullback = None
        if not known or self._rule.polish:  # which takes one, in forward mode, or is refused
            pullback = reverse_rule.only_in_reverse(self._rule, problem, x0)
        if known:
            out = self._forward(problem, x0, options, captured)
        elif pullback is not None:
            out = self._in_reverse(pullback, problem, x0, options, (captured[0], None))
        else:
            out = self._implicit(problem, x0, options, captured)
        return self._x_of(problem, out)

    def _x_of(self, problem: Problem, out: Any) -> Any:
        """What the solver returned, without multipliers."""
        if not problem.constrained:
            return out
        return (out[0]["x"], out[1]) if self._rule.has_aux else out["x"]

    def as_function(
        self, /, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Problem, Callable[[Problem], Any]]:
        """The problem into which the derivatives of one call flow, and x as a function of it."""
        problem, x0, options = self._convert(self._signature.take_apart(args, kwargs))

        def solve(problem: Problem) -> Any:
            out = self._implicit(problem, x0, options, self._captured(problem, x0, options))
            out = self._x_of(problem, out)
            return out[0] if self._rule.has_aux else out

        return problem, solve

    def __repr__(self) -> str:
        return f"<{self.__name__} with an implicit derivative rule>"

    def _convert(self, call: SolverCall) -> tuple[Problem, Any, dict[str, Any]]:
        x0 = as_unknown(call.x0, self.__name__)
        constraints = kkt.take_constraints(
            self._rule.kind, call.options, conserved=self._rule.conserved is not None
        )
        given = {name: value for name, value in call.options.items() if name not in constraints}
        # Python numbers among the options are static: solvers use them in Python.
        options: dict[str, Any] = as_static(given, is_array)
        if constraints:
            problem = calls.constrained_problem(call, x0, constraints, self.__name__)
            self._rule.check_equations(problem, x0)
            return problem, constrained.unknown(problem, x0), options
        problem = calls.problem_of(call, x0, self._states)
        self._rule.check_equations(problem, x0)
        if self._rule.conserved is not None:
            problem = problem._replace(totals=Closure(self._rule.conserved, x0))
        return problem, x0, options

    # Running the solver.

    def _run_solver(self, problem: Problem, x0: Any, options: dict[str, Any]) -> Any:
        if problem.constrained:
            out = self._run_plain(problem, x0["x"], options)
            x, *aux = out if self._rule.has_aux else (out,)
            how = {"has_aux": self._rule.fun_has_aux(problem, 1)}
            y = self._multipliers(
                problem, x, x0["x"], squares=self._rule.kind == "least_squares", **how
            )
            return (y, *aux) if aux else y
        return self._run_plain(problem, x0, options)

    def _run_plain(self, problem: Problem, x0: Any, options: dict[str, Any]) -> Any:
        given = from_static(options)
        if isinstance(self._solver, HostSolver):
            out = calls.run_on_host(self._solver, self._rule, problem, x0, given)
        else:
            call = calls.call_of(problem, x0, given)
            out = self._signature.call(self._solver, call)
        return calls.checked(out, x0, self.__name__, has_aux=self._rule.has_aux)

    def _own(self, problem: Problem, x0: Any, options: dict[str, Any]) -> Any:
        """What runs the solver of this call, a pytree, or None for `self._run`.

        Whatever the solver captures that may change between calls has to be an argument: traced
        values, which could not cross the rule otherwise, and the object of a method, which may have
        changed. The solution does not depend on any of it, so its derivative is zero. Asking JAX
        what it traced is cheap, converting costs a trace, and most solvers capture nothing.
        """
        if not self._jit:
            return None if self._bound_to is None else tree_util.Partial(self._run_solver)
        if self._bound_to is None and not isinstance(self._solver, types.MethodType):
            if _compat.nothing_traced():
                return None
            if not _compat.captured_tracers(self._run, problem, x0, options):
                return None
        return Closure(self._run_solver, problem, x0, options)

    def _captured(self, problem: Problem, x0: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        """What runs the solver, and what solves the linear system, as far as they capture."""
        return self._own(problem, x0, options), self._rule.linear_captures(problem, x0)

    def _forward(self, problem: Problem, x0: Any, options: dict[str, Any], captured: Any) -> Any:
        own, linear_captures = captured
        # The method of many objects shares this rule and what is compiled for it.
        if own is None:
            out = self._run(problem, x0, options)
        elif isinstance(own, Closure):
            out = self._run_converted(own, problem, x0, options)
        else:
            out = own(problem, x0, options)
        x, aux = out if self._rule.has_aux else (out, None)
        if self._rule.polish:
            leaves, tree = jax.tree.flatten(self._rule.read(problem, x0))
            x = self._rule.compiled_polish(tree, leaves, x, x0, linear_captures)
        x = _compat.tied(x)
        return (x, aux) if self._rule.has_aux else x

    def diagnose(self, /, *args: Any, **kwargs: Any) -> Diagnosis:
        """Solve, and return what is measured at the solution before its derivative is trusted.

        Args:
            *args: what the solver takes, with known values, not traced ones.
            **kwargs: the same.

        Returns:
            A `Diagnosis`.

        Raises:
            TypeError: a value is traced.
        """
        problem, x0, options = self._convert(self._signature.take_apart(args, kwargs))
        captured = self._captured(problem, x0, options)
        out = self._implicit(problem, x0, options, captured)
        x = out[0] if self._rule.has_aux else out
        return refusal.diagnosis(self._rule, problem, x, x0, options, captured[1])

    # The rule.

    def _push(self, primals: Any, tangents: Any) -> Any:
        traced = any(isinstance(leaf, _compat.Tracer) for leaf in jax.tree.leaves(primals))
        known = not traced and _compat.computes_now()
        if known:
            with _compat.at_once():
                out = self._forward(*primals)
        else:
            out = self._implicit(*primals)  # the rule again, for higher orders
        x, aux = out if self._rule.has_aux else (out, None)
        problem, x0, options, (_, captured) = primals
        leaves, tree = jax.tree.flatten(self._rule.read(problem, x0))
        n = 2 if self._rule.conserved else 1  # parts that the solution depends on
        moving, directions = dots_of(tangents[:n])
        others = dots_of(tangents[n:])[1] if self._rule.check else []
        if moving or others:
            given = leaves, x, x0, directions, others, captured
            dx, found = self._rule.derivative(tree, moving, *given, known=known)
            if self._rule.check and self._rule.on_failure != "nan":
                at = (x, x0, options, (tree, leaves))
                refusal.tell_failure(self._rule, found, at, dx, by_options=not moving)
        else:
            dx = zero_tangents(x)
        if not self._rule.has_aux:
            return x, dx
        return out, (dx, zero_tangents(aux))

    # The rule for reverse mode alone.

    def _forward_in_reverse(self, _: reverse.Pullback, *primals: Any) -> Any:
        return self._forward(*primals)

    def _save_for_reverse(self, pullback: reverse.Pullback, *told: Any) -> Any:
        primals = reverse.values(told)
        out = self._in_reverse(pullback, *primals)
        places = reverse.moving(told[0]), reverse.moving(told[1:])
        # The structure of a dict is known where its values are not.
        return out, (primals, out, [dict.fromkeys(some, ()) for some in places])


def _call(own: Callable[..., Any], problem: Problem, x0: Any, options: dict[str, Any]) -> Any:
    return own(problem, x0, options)
