"""Derivatives for any solver, from the condition that its result satisfies.

The decorated solver is a function with a rule of JAX's: a direction of everything that the function
reads goes to the direction of x (`implicit`). That map is linear, JAX transposes it for reverse
mode, and since the rule calls the decorated solver again for x, it differentiates itself to any
order. Not here: the mathematics (`implicit`), how the linear system is solved (`linear`), when the
result counts (`diagnostics`), and how a call is taken apart (`signature`).
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import (
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Protocol,
    Self,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
)

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from freevars._solvers.decorated import DecoratedSolver
from freevars._solvers.failures import Context, failure
from freevars._solvers.options import check_options
from freevars._solvers.signature import SolverCall
from freevars._solvers.verdict import Figures, Limits, OnFailure
from freevars.errors import FreevarsError, SingularError, StructureError
from freevars.jax import _compat
from freevars.jax._closure import Closure
from freevars.jax._convert.static import as_static, from_static
from freevars.jax._host.on_host import HostSolver
from freevars.jax._rules import diagnostics, implicit, linear, reverse
from freevars.jax._rules.coordinates import Coordinates, Space
from freevars.jax._rules.diagnostics import Diagnostics
from freevars.jax._rules.explain import Diagnosis, explain, known_figures
from freevars.jax._rules.operator import LinearOperator
from freevars.jax._rules.totals import Totals
from freevars.jax._solver.problem import Problem, count
from freevars.jax._solver.unknown import as_unknown, is_array, like

__all__ = ["ImplicitSolver", "argmin", "fixed_point", "root"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")
Kind: TypeAlias = Literal["root", "argmin", "fixed_point"]

_CONDITIONS: dict[Kind, implicit.Condition] = {
    "root": implicit.zero,
    "argmin": implicit.stationary,
    "fixed_point": implicit.fixed,
}


class Options(TypedDict, total=False):
    """The keyword arguments of `root`, `argmin` and `fixed_point`; see `root`."""

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


class ImplicitSolver(DecoratedSolver[P, R]):
    """A solver with a derivative rule; made by `root`, `argmin` and `fixed_point`."""

    def __init__(
        self, solver: Callable[P, R], kind: Kind = "root", /, **options: Unpack[Options]
    ) -> None:
        check_options(kind, options, Options)
        self._condition = _CONDITIONS[kind]
        self._has_aux = options.get("has_aux", False)
        self._on_failure: OnFailure = options.get("on_failure", "raise")
        self._check = options.get("check", True)
        self._method = linear.Method(
            options.get("linear_solve"),
            options.get("preconditioner"),
            options.get("dense_limit", linear.DENSE_LIMIT),
            self._on_failure == "least_squares",
            self._check,
        )
        self._method.validate()
        self._tol = options.get("tol")
        self._polish = options.get("polish", False)
        self._conserved = options.get("conserved")
        self._jit = options.get("jit", True) and not isinstance(solver, HostSolver)
        super().__init__(solver, kind, **options)
        self._run = jax.jit(self._run_solver) if self._jit else self._run_solver
        self._run_converted = jax.jit(_call)
        self._tangent = jax.jit(self._tangent_map, static_argnums=(0, 1))
        self._implicit = jax.custom_jvp(self._forward)
        self._implicit.defjvp(self._rule, symbolic_zeros=True)
        self._in_reverse = jax.custom_vjp(self._forward_in_reverse, nondiff_argnums=(0,))
        self._in_reverse.defvjp(self._save_for_reverse, self._pull_back, symbolic_zeros=True)
        self._by_rows = jax.jit(self._solve_by_rows, static_argnums=(0, 1))
        self._verdict = jax.jit(self._verdict_map, static_argnums=0)
        self._kept = jax.jit(self._kept_map, static_argnums=0)
        self._newton_step = jax.jit(self._polished, static_argnums=0)

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
        pullback = None if _compat.nothing_traced() else self._only_in_reverse(problem, x0)
        if pullback is not None:
            return self._in_reverse(pullback, problem, x0, options, (captured[0], None))
        return self._implicit(problem, x0, options, captured)

    def as_function(
        self, /, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Problem, Callable[[Problem], Any]]:
        """What the derivatives of one call flow into, and x as a function of that."""
        problem, x0, options = self._convert(self._signature.take_apart(args, kwargs))

        def solve(problem: Problem) -> Any:
            out = self._implicit(problem, x0, options, self._captured(problem, x0, options))
            return out[0] if self._has_aux else out

        return problem, solve

    def __repr__(self) -> str:
        return f"<{self.__name__} with an implicit derivative rule>"

    def _convert(self, call: SolverCall) -> tuple[Problem, Any, dict[str, Any]]:
        x0 = as_unknown(call.x0, self.__name__)
        # A Python number among the options stays one: solvers count with it.
        options: dict[str, Any] = as_static(call.options, is_array)
        return Problem.of(call.fun, x0, call.args, call.kwargs), x0, options

    # Running the solver.

    def _run_solver(self, problem: Problem, x0: Any, options: dict[str, Any]) -> Any:
        if isinstance(self._solver, HostSolver):
            out = self._solver.solve(
                problem,
                x0,
                from_static(options),
                equations=self._condition is not implicit.stationary,
                has_aux=self._fun_has_aux(problem, count(x0)),
            )
        else:
            call = SolverCall(problem.as_given(), x0, *problem.extra(), from_static(options))
            out = self._signature.call(self._solver, call)
        if not self._has_aux:
            return like(out, x0, f"{self.__name__}: the returned x")
        if not (isinstance(out, tuple) and len(out) == 2):  # noqa: PLR2004
            message = f"{self.__name__}: with has_aux=True a solver returns (x, aux), got {out!r}."
            raise StructureError(message)
        return like(out[0], x0, f"{self.__name__}: the returned x"), out[1]

    def _own(self, problem: Problem, x0: Any, options: dict[str, Any]) -> Any:
        """What runs the solver of this call, a pytree, or None for `self._run`.

        What the solver captures that may be another value at the next call has to be an argument:
        the traced values, or the rule could not be crossed, and the object of a method, which may
        have changed. The solution does not depend on any of it, and so its derivative is zero.
        Asking JAX for what it traced costs little, converting costs a trace, and most solvers
        capture nothing.
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
        return self._own(problem, x0, options), self._linear_captures(problem, x0)

    def _linear_captures(self, problem: Problem, x0: Any) -> Any:
        """As `_own`, for the functions that solve the linear system: what solves it and
        what solves its transpose, as closures."""
        if not self._method.calls_users_functions or not count(x0) or _compat.nothing_traced():
            return None
        leaves, tree = jax.tree.flatten(self._read(problem, x0))

        def solve(leaves: list[Any], x: Any, b: Any, *, which: int) -> Any:
            found = self._linearise(tree, leaves, x, ())
            return self._method.methods(found.by_x, found.space, found.coordinates.eps)[which](b)

        b = Coordinates(x0).to_real(x0)
        solvers = [functools.partial(solve, which=which) for which in (0, 1)]
        if not _compat.captured_tracers(jax.jit(solvers[0]), leaves, x0, b):
            return None
        return tuple(Closure(solver, leaves, x0, b) for solver in solvers)

    def _forward(self, problem: Problem, x0: Any, options: dict[str, Any], captured: Any) -> Any:
        own, linear_captures = captured
        # The method of many objects shares this rule and what is compiled for it.
        if own is None:
            out = self._run(problem, x0, options)
        elif isinstance(own, Closure):
            out = self._run_converted(own, problem, x0, options)
        else:
            out = own(problem, x0, options)
        if not self._polish:
            return out
        leaves, tree = jax.tree.flatten(self._read(problem, x0))
        if self._has_aux:
            x, aux = out
            return self._newton_step(tree, leaves, x, x0, linear_captures), aux
        return self._newton_step(tree, leaves, out, x0, linear_captures)

    def _polished(self, tree: Any, leaves: list[Any], x: Any, x0: Any, captured: Any) -> Any:
        """The solution after one more step, of Newton's method.

        Unless a second one would be no shorter (Deuflhard's monotonicity test): then x is so far
        from a solution that a step tells nothing, or so near that rounding is all that is left.
        """
        point, unknown, system = self._system(tree, leaves, x, x0, (), captured)
        moved, _ = diagnostics.newton(system, unknown, point.f, point.at)
        return point.coordinates.from_real(moved)

    def diagnose(self, /, *args: Any, **kwargs: Any) -> Diagnosis:
        """Solve, and give what is measured of the solution before a derivative is believed.

        It takes what the solver takes, with known values.
        """
        problem, x0, options = self._convert(self._signature.take_apart(args, kwargs))
        captured = self._captured(problem, x0, options)
        out = self._implicit(problem, x0, options, captured)
        x = out[0] if self._has_aux else out
        leaves, tree = jax.tree.flatten(self._read(problem, x0))
        found, step = self._verdict(tree, leaves, x, x0, captured[1])
        if isinstance(found.good, _compat.Tracer):
            message = (
                f"{self.__name__}.diagnose: it gives numbers of Python, which are not known inside"
                ' jit, vmap or grad. on_failure="warn" tells of failures there.'
            )
            raise TypeError(message)
        limits = diagnostics.limits_of(Coordinates(x), self._tol)
        error = None if found.good else self._error(found, limits, x, x0, options, (tree, leaves))
        return Diagnosis(bool(found.good), error, known_figures(found.figures), limits, x, step)

    def _kept_map(self, tree: Any, leaves: list[Any], x: Any) -> Any:
        """Of a singular system: whether it is so because it keeps totals."""
        point = self._linearise(tree, leaves, x, ())
        return diagnostics.kept(point.by_x, point.space)

    def _verdict_map(self, tree: Any, leaves: list[Any], x: Any, x0: Any, captured: Any) -> Any:
        """The verdict on x, and the Newton step."""
        point, unknown, system = self._system(tree, leaves, x, x0, (), captured)
        found = diagnostics.measure(system, unknown, point.f, point.at)
        return found, point.coordinates.from_real(found.step)

    # The rule.

    def _rule(self, primals: Any, tangents: Any) -> Any:
        out = self._implicit(*primals)  # the rule again, for higher orders
        x, aux = out if self._has_aux else (out, None)
        problem, x0, options, (_, captured) = primals
        leaves, tree = jax.tree.flatten(self._read(problem, x0))
        read = (tangents[0], tangents[1] if self._conserved else ())
        dots = jax.tree.leaves(read, is_leaf=_compat.is_symbolic_zero)
        moving = tuple(i for i, dot in enumerate(dots) if not _compat.is_symbolic_zero(dot))
        others = jax.tree.leaves(
            tangents[2 if self._conserved else 1 :], is_leaf=_compat.is_symbolic_zero
        )
        others = [dot for dot in others if not _compat.is_symbolic_zero(dot)] * self._check
        if moving or others:
            directions = [dots[i] for i in moving]
            dx, found = self._tangent(tree, moving, leaves, x, x0, directions, others, captured)
            if self._check and self._on_failure != "nan":
                at = (x, x0, options, (tree, leaves))
                self._tell_failure(found, at, dx, by_options=not moving)
        else:
            dx = jax.tree.map(_compat.symbolic_zero, x)
        if not self._has_aux:
            return x, dx
        return out, (dx, jax.tree.map(_compat.symbolic_zero, aux))

    def _read(self, problem: Problem, x0: Any) -> tuple[Problem, Any]:
        """What the solution depends on."""
        return problem, x0 if self._conserved else ()

    def _tangent_map(
        self,
        tree: Any,
        moving: tuple[int, ...],
        leaves: list[Any],
        x: Any,
        x0: Any,
        dots: list[Any],
        others: list[Any],
        captured: Any,
    ) -> Any:
        """The direction x' for the direction `dots` of the moving leaves, which is linear in
        `dots`, and what tells whether to trust it. `others` are directions of what the solution
        does not depend on, if it is one."""
        finite = True
        if self._check:
            # A member of a batch that is not asked for contributes 0, and not 0 times infinity.
            for leaf in jax.tree.leaves(x):
                finite &= jnp.all(jnp.isfinite(leaf))
            x = jax.tree.map(lambda x, x0: jnp.where(jnp.isfinite(x), x, x0), x, x0)
        point, unknown, system = self._system(tree, leaves, x, x0, moving, captured)
        found, good = None, True
        if self._check:
            found = diagnostics.measure(system, unknown, point.f, point.at).unless(finite)
            good = found.good
        dv = jax.tree.map(jnp.zeros_like, point.v)
        if moving:
            minus = point.space.agree(system.solve(point.by_moved(dots), good))
            dv = jax.tree.map(jnp.negative, minus)
        if good is not True:
            none = linear.nothing_if(good, point.space, point.v, [*dots, *others])
            dv = jax.tree.map(jnp.add, dv, none)
        return point.to_x(dv), found

    def _system(
        self,
        tree: Any,
        leaves: list[Any],
        x: Any,
        x0: Any,
        moving: tuple[int, ...] = (),
        captured: Any = None,
    ) -> tuple[implicit.Linearised, diagnostics.Unknown, linear.LinearSystem]:
        """The condition at x to first order, x with its sizes, and the system dF/dx."""
        point = self._linearise(tree, leaves, x, moving)
        limits = diagnostics.limits_of(point.coordinates, self._tol)
        v0 = point.coordinates.to_real(x0)
        unknown = diagnostics.Unknown.of(point.v, v0, point.space, limits)
        bound = None
        if captured is not None:
            # An exact solve has its derivatives from the system, a truncated series its own.
            fixed = (leaves, x) if self._method.is_truncated else jax.lax.stop_gradient((leaves, x))
            forward, transposed = (functools.partial(closure, *fixed) for closure in captured)
            bound = (forward, transposed)
        sizes = unknown.v, unknown.d, limits
        eps = point.coordinates.eps
        return point, unknown, self._method.prepare(point.by_x, point.space, eps, bound, sizes)

    # The rule for reverse mode alone.

    def _only_in_reverse(self, problem: Problem, x0: Any) -> reverse.Pullback | None:
        """How the condition is pulled back, if that is the only way to a derivative."""
        if not _compat.has_custom_vjp(problem.fun._program.jaxpr):  # noqa: SLF001 (own package)
            return None
        if self._polish or self._conserved:
            return None
        types, tree = jax.tree.flatten(
            jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x0)
        )
        has_aux = self._fun_has_aux(problem, count(x0))
        implicit.check_equations(self._condition, problem, x0, has_aux=has_aux, name=self.__name__)
        leaves, structure = jax.tree.flatten(problem)
        pullback = reverse.Pullback(self._condition, structure, (tree, tuple(types)), has_aux)
        return pullback.needed(pullback.coordinates.to_real(x0), leaves)

    def _forward_in_reverse(self, _: reverse.Pullback, *primals: Any) -> Any:
        return self._forward(*primals)

    def _save_for_reverse(self, pullback: reverse.Pullback, *told: Any) -> Any:
        primals = reverse.values(told)
        out = self._in_reverse(pullback, *primals)
        places = reverse.moving(told[0]), reverse.moving(told[1:])
        # The structure of a dict is known where its values are not.
        return out, (primals, out, [dict.fromkeys(some, ()) for some in places])

    def _pull_back(self, pullback: reverse.Pullback, saved: Any, cotangent: Any) -> Any:
        (problem, x0, *rest), out, (places, others) = saved
        x, g = (out[0], cotangent[0]) if self._has_aux else (out, cotangent)
        coordinates = pullback.coordinates
        v, v0 = coordinates.to_real(x), coordinates.to_real(x0)
        (g,) = jax.linear_transpose(coordinates.from_real, v)(reverse.full(g))
        leaves, structure = jax.tree.flatten(problem)
        u, found = reverse.adjoint(pullback, self._solve_linear, v, leaves, v0, g, tuple(places))
        cotangents: list[Any] = [None] * len(leaves)
        for i, ct in zip(places, found, strict=True):
            cotangents[i] = ct
        # Nothing, if x is a solution; what else it depends on is not known.
        nothing = sum(0 * jnp.sum(leaf) for leaf in jax.tree.leaves(u))
        flat, tree = jax.tree.flatten((x0, *rest))
        none = [
            jnp.broadcast_to(nothing, leaf.shape).astype(leaf.dtype) if i in others else None
            for i, leaf in enumerate(flat)
        ]
        return jax.tree.unflatten(structure, cotangents), *tree.unflatten(none)

    def _solve_linear(
        self,
        pullback: reverse.Pullback,
        transposed: bool,  # noqa: FBT001
        v: Any,
        leaves: list[Any],
        v0: Any,
        b: Any,
    ) -> Any:
        u, found = self._by_rows(pullback, transposed, v, leaves, v0, b)
        if self._check and self._on_failure != "nan":
            x, x0 = map(pullback.coordinates.from_real, (v, v0))
            self._tell_failure(found, (x, x0, {}, None), u, by_options=False)
        return u

    def _solve_by_rows(
        self,
        pullback: reverse.Pullback,
        transposed: bool,  # noqa: FBT001
        v: Any,
        leaves: list[Any],
        v0: Any,
        b: Any,
    ) -> Any:
        """The solution of the system or its transpose, by the matrix, and the verdict on v."""
        space = Space()
        limits = diagnostics.limits_of(pullback.coordinates, self._tol)
        unknown = diagnostics.Unknown.of(v, v0, space, limits)
        at = functools.partial(pullback.at, leaves=leaves)
        operator = LinearOperator(
            functools.partial(pullback.by_x, v, leaves, transposed=False),
            v,
            rmatvec=functools.partial(pullback.by_x, v, leaves, transposed=True),
            symmetric=self._condition is implicit.stationary,
        )
        sizes = unknown.v, unknown.d, limits
        rows = pullback.rows(v, leaves)
        system = self._method.prepare_matrix(operator, space, rows, sizes)
        found, good = None, True
        if self._check:
            found = diagnostics.measure(system, unknown, at(v), at)
            good = found.good
        assert system.scaled is not None  # noqa: S101 (a matrix is given)
        apply = system.scaled.transpose_of if transposed else system.scaled.of
        return linear.guarded(space, good, operator.unravel(apply(operator.ravel(b))), b), found

    def _linearise(
        self, tree: Any, leaves: list[Any], x: Any, moving: tuple[int, ...]
    ) -> implicit.Linearised:
        problem, _ = jax.tree.unflatten(tree, leaves)
        has_aux = self._fun_has_aux(problem, count(x))
        implicit.check_equations(self._condition, problem, x, has_aux=has_aux, name=self.__name__)
        rebuild = functools.partial(jax.tree.unflatten, tree)
        return implicit.linearise(
            self._condition,
            rebuild,
            leaves,
            x,
            moving,
            has_aux=has_aux,
            totals=self._conserved,
        )

    def _fun_has_aux(self, problem: Problem, n: int) -> bool:
        """With aux, `fun` may have one too: its value is then what is of the right size."""
        wanted = 1 if self._condition is implicit.stationary else n
        return self._has_aux and problem.has_aux(wanted)

    def _tell_failure(
        self, found: Diagnostics, at: tuple[Any, Any, Any, Any], dx: Any, *, by_options: bool
    ) -> None:
        """Tell what can be told now: inside a compiled program NaN tells."""
        limits = diagnostics.limits_of(Coordinates(at[0]), self._tol)
        if self._on_failure == "warn":
            jax.debug.callback(functools.partial(self._warn, limits), found.good, found.figures)
            return
        if isinstance(found.good, _compat.Tracer):
            return
        if not found.good:
            raise self._error(found, limits, *at, by_options=by_options)
        leaves = jax.tree.leaves(dx)
        known = not any(isinstance(dot, _compat.Tracer) for dot in leaves)
        if known and not all(np.all(np.isfinite(dot)) for dot in leaves):
            message = (
                f"{self.__name__}: the derivative is not finite: the iterative linear solver"
                " stopped short, or the direction of differentiation is not finite itself. Give"
                " another linear_solve, or more steps."
            )
            raise SingularError(message)

    def _error(
        self,
        found: Diagnostics,
        limits: Limits,
        x: Any,
        x0: Any,
        options: Any,
        problem: Any,
        *,
        by_options: bool = False,
    ) -> FreevarsError:
        """The error for a verdict on known values."""
        x, x0, problem = jax.tree.map(_compat.lowered, (x, x0, problem))
        regular = bool(found.figures.rcond > limits.rcond)
        if problem is not None and not regular and self._on_failure != "least_squares":
            kept = self._kept(*problem, x)
            found = found._replace(figures=found.figures._replace(conserved=kept))
        return explain(
            found,
            limits,
            name=self.__name__,
            kind=_KINDS[self._condition],
            least_squares=self._on_failure == "least_squares",
            x=x,
            x0=x0,
            options=options,
            by_options=by_options,
        )

    def _warn(self, limits: Limits, good: Any, figures: Figures) -> None:
        """Called with known values, from inside a program too."""
        if not good:
            context = Context(self.__name__, _KINDS[self._condition])
            warnings.warn(str(failure(known_figures(figures), limits, context)), stacklevel=2)


_KINDS: dict[implicit.Condition, Kind] = {
    implicit.zero: "root",
    implicit.stationary: "argmin",
    implicit.fixed: "fixed_point",
}


def _call(own: Callable[..., Any], problem: Problem, x0: Any, options: dict[str, Any]) -> Any:
    return own(problem, x0, options)


class Decorator(Protocol):
    """Gives a solver a rule."""

    def __call__(self, solver: Callable[P, R], /) -> ImplicitSolver[P, R]:
        """The solver with derivatives."""


def _decorate(solver: Callable[..., Any] | None, kind: Kind, options: Options) -> Any:
    check_options(kind, options, Options)

    def decorate(solver: Callable[P, R], /) -> ImplicitSolver[P, R]:
        return ImplicitSolver(solver, kind, **options)

    return decorate if solver is None else decorate(solver)


@overload
def root(solver: Callable[P, R], /, **options: Unpack[Options]) -> ImplicitSolver[P, R]: ...
@overload
def root(**options: Unpack[Options]) -> Decorator: ...
def root(solver: Callable[..., Any] | None = None, /, **options: Unpack[Options]) -> Any:
    """Derivatives for a solver whose result x satisfies `fun(x, *args, **kwargs) = 0`.

    The decorated solver is called as before, `solver(fun, x0, ...)`, and returns what it returned
    before. Derivatives, forward and reverse and of any order, flow into every value that `fun`
    captures and into the extra arguments that the solver passes on to `fun`: what its signature
    collects in `*args` and `**kwargs`, or a tuple named `args`. Everything else in its signature is
    an option of its own; options and `x0` get derivative zero, because a solution does not depend
    on them; that it is one is checked then too.

    Args:
        solver: `solver(fun, x0, ...)` in JAX, pure. `x0` is a pytree of floating or complex arrays,
            and so is the x that it returns. `fun` reaches it as a `Closure`.
        has_aux: the solver returns `(x, aux)`, and `fun` may return `(value, aux)`. This declares
            the aux constant: it has derivative zero.
        linear_solve: how the system of the derivative is solved: a lineax solver, a truncated
            series (`neumann`, `one_step`), or a function `solve(operator, b)` that takes a
            `LinearOperator` and returns a pytree like b: like x, with a pair of real arrays for
            each complex one. It may call the operator, as in `solve(matvec, b)`. A backward pass
            takes the transpose of the function where JAX can transpose it, and calls it for the
            transposed operator where not. None: divide by the slope of one unknown, factorise up to
            `dense_limit` unknowns, beyond that BiCGStab(2) (conjugate gradients for `argmin`) until
            |r| <= eps^(3/4) |b|, and the matrix or least squares where these stand still.
        preconditioner: for None: a function that takes the operator and returns a linear function
            of v that is about A^-1 v, symmetric and definite for `argmin`. With it nothing is
            factorised.
        dense_limit: see linear_solve. 0 never factorises a system of more than one unknown at once.
        on_failure: what happens where the derivative cannot be trusted. That is: the solver did not
            converge (a Newton step from its result would move a component by more than 1% of its
            size, 1.9% in float32; or by more than the fourth root of the dtype's spacing, at most
            0.1%, while a second step with the same matrix is no smaller than 2% of the first),
            something is not finite, the system is singular (reciprocal condition number below 10
            eps, in units of the unknowns and of the equations), or it was not solved (residual
            above the fourth root of the spacing, relative). "raise": an error where values are
            known; NaN inside `jit` and `vmap`, and in a backward pass where an iterative linear
            solver stopped short. "warn": NaN always, and a warning that says why, from inside `jit`
            too. "nan": NaN always. "least_squares": the shortest solution of a singular system,
            else as "raise".
        check: False leaves all of that out.
        tol: the largest Newton step, relative to each component, that counts as converged, whatever
            a second one is. None: see `on_failure`.
        polish: True adds a Newton step to x before it is returned or differentiated.
        conserved: `conserved(x)`, an array or pytree of totals of x that the solver keeps as they
            are in x0. They complete equations that repeat each other, and derivatives flow into x0.
            It captures nothing that is differentiated by.
        jit: False runs the solver as it is, for one that cannot be traced; it then needs known
            values.

    Raises:
        freevars.errors.NotASolutionError, freevars.errors.SingularError: see `on_failure`.
        freevars.errors.StructureError: the solver returns another structure, shape or dtype than
            `x0`.
        TypeError: an unknown is neither floating nor complex, or there is not one equation for
            each.

    Source: the implicit function theorem; Blondel et al. 2022, "Efficient and Modular Implicit
    Differentiation".

    >>> import jax, freevars.jax as fv
    >>> @fv.root
    ... def newton(fun, x0):
    ...     return jax.lax.fori_loop(0, 20, lambda _, x: x - fun(x) / jax.grad(fun)(x), x0)
    >>> square_root = lambda a: newton(lambda x: x**2 - a, 1.0)
    >>> print(square_root(4.0), jax.grad(square_root)(4.0))
    2.0 0.25
    """
    return _decorate(solver, "root", options)


@overload
def argmin(solver: Callable[P, R], /, **options: Unpack[Options]) -> ImplicitSolver[P, R]: ...
@overload
def argmin(**options: Unpack[Options]) -> Decorator: ...
def argmin(solver: Callable[..., Any] | None = None, /, **options: Unpack[Options]) -> Any:
    """Derivatives for a solver whose result x satisfies `grad(fun)(x, *args, **kwargs) = 0`.

    A minimum, a maximum or a saddle of a real function of shape (), without constraints: x has to
    be where the gradient vanishes, and the second derivative there has to be regular. Everything
    else is as for `root`, which also says what may be given as options.

    >>> import jax, jax.numpy as jnp, freevars.jax as fv
    >>> @fv.argmin
    ... def descend(fun, x0, steps=200):
    ...     return jax.lax.fori_loop(0, steps, lambda _, x: x - 0.3 * jax.grad(fun)(x), x0)
    >>> data = jnp.array([1.0, 2.0, 6.0])
    >>> def center(penalty):
    ...     return descend(lambda m: jnp.mean((data - m) ** 2) + penalty * m**2, 0.0)
    >>> print(f"{center(0.5):.3f} {jax.grad(center)(0.5):.3f}")  # 3 / (1 + p), -3 / (1 + p)^2
    2.000 -1.333
    """
    return _decorate(solver, "argmin", options)


@overload
def fixed_point(solver: Callable[P, R], /, **options: Unpack[Options]) -> ImplicitSolver[P, R]: ...
@overload
def fixed_point(**options: Unpack[Options]) -> Decorator: ...
def fixed_point(solver: Callable[..., Any] | None = None, /, **options: Unpack[Options]) -> Any:
    """Derivatives for a solver whose result x satisfies `fun(x, *args, **kwargs) = x`.

    `fun` returns the structure and shapes of x. Everything else is as for `root`, which also says
    what may be given as options.

    >>> import jax, jax.numpy as jnp, freevars.jax as fv
    >>> @fv.fixed_point
    ... def iterate(fun, x0):
    ...     return jax.lax.fori_loop(0, 100, lambda _, x: fun(x), x0)
    >>> def kepler(eccentricity):  # E = M + e sin E
    ...     return iterate(lambda angle: 1.0 + eccentricity * jnp.sin(angle), 1.0)
    >>> print(f"{kepler(0.1):.4f} {jax.grad(kepler)(0.1):.4f}")  # sin E / (1 - e cos E)
    1.0886 0.9291
    """
    return _decorate(solver, "fixed_point", options)
