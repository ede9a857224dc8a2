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
from freevars._solvers.options import check_options
from freevars._solvers.signature import SolverCall
from freevars.errors import SingularError, StructureError
from freevars.jax import _compat
from freevars.jax._closure import Closure
from freevars.jax._convert.static import as_static, from_static
from freevars.jax._host.on_host import HostSolver
from freevars.jax._rules import diagnostics, implicit, linear
from freevars.jax._rules.coordinates import Coordinates
from freevars.jax._rules.diagnostics import Diagnostics, OnFailure, failure
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
        self._jit = options.get("jit", True) and not isinstance(solver, HostSolver)
        super().__init__(solver, kind, **options)
        self._run = jax.jit(self._run_solver) if self._jit else self._run_solver
        self._run_converted = jax.jit(_call)
        self._tangent = jax.jit(self._tangent_map, static_argnums=(0, 1))
        self._implicit = jax.custom_jvp(self._forward)
        self._implicit.defjvp(self._rule, symbolic_zeros=True)

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
        return self._implicit(problem, x0, options, self._captured(problem, x0, options))

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
            msg = f"{self.__name__}: with has_aux=True a solver returns (x, aux), got {out!r}."
            raise StructureError(msg)
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
        leaves, tree = jax.tree.flatten(problem)

        def solve(leaves: list[Any], x: Any, b: Any, *, which: int) -> Any:
            found = self._linearise(tree, leaves, x, ())
            return self._method.methods(found.by_x, found.space, found.coordinates.eps)[which](b)

        b = Coordinates(x0).to_real(x0)
        solvers = [functools.partial(solve, which=which) for which in (0, 1)]
        if not _compat.captured_tracers(jax.jit(solvers[0]), leaves, x0, b):
            return None
        return tuple(Closure(solver, leaves, x0, b) for solver in solvers)

    def _forward(self, problem: Problem, x0: Any, options: dict[str, Any], captured: Any) -> Any:
        own, _ = captured
        # The method of many objects shares this rule and what is compiled for it.
        if own is None:
            return self._run(problem, x0, options)
        if isinstance(own, Closure):
            return self._run_converted(own, problem, x0, options)
        return own(problem, x0, options)

    # The rule.

    def _rule(self, primals: Any, tangents: Any) -> Any:
        out = self._implicit(*primals)  # the rule again, for higher orders
        x, aux = out if self._has_aux else (out, None)
        leaves, tree = jax.tree.flatten(primals[0])
        dots = jax.tree.leaves(tangents[0], is_leaf=_compat.is_symbolic_zero)
        moving = tuple(i for i, dot in enumerate(dots) if not _compat.is_symbolic_zero(dot))
        if moving:
            _, captured = primals[3]
            directions = [dots[i] for i in moving]
            dx, found = self._tangent(tree, moving, leaves, x, directions, captured)
            if self._check and self._on_failure != "nan":
                self._raise_failure(found, dx)
        else:
            dx = jax.tree.map(_compat.symbolic_zero, x)
        if not self._has_aux:
            return x, dx
        return out, (dx, jax.tree.map(_compat.symbolic_zero, aux))

    def _tangent_map(
        self,
        tree: Any,
        moving: tuple[int, ...],
        leaves: list[Any],
        x: Any,
        dots: list[Any],
        captured: Any,
    ) -> Any:
        """The direction x' for the direction `dots` of the moving leaves, which is linear in
        `dots`, and what tells whether to trust it."""
        first_order = self._linearise(tree, leaves, x, moving)
        coordinates, space, v, f, operator, by_moved = first_order
        bound = None
        if captured is not None:
            fixed = jax.lax.stop_gradient((leaves, x))
            forward, transposed = (functools.partial(closure, *fixed) for closure in captured)
            bound = (forward, transposed)
        system = self._method.prepare(operator, space, coordinates.eps, bound)
        minus = space.agree(system.solve(by_moved(dots)))
        dv = jax.tree.map(jnp.negative, minus)
        if not self._check:
            return coordinates.from_real(dv), None
        found = diagnostics.measure(system, coordinates.eps, v, f)
        good = found.good
        dv = jax.tree.map(lambda leaf: leaf * jnp.where(good, 1, jnp.nan).astype(leaf.dtype), dv)
        return coordinates.from_real(dv), found

    def _linearise(
        self, tree: Any, leaves: list[Any], x: Any, moving: tuple[int, ...]
    ) -> implicit.Linearised:
        problem = jax.tree.unflatten(tree, leaves)
        has_aux = self._fun_has_aux(problem, count(x))
        implicit.check_equations(self._condition, problem, x, has_aux=has_aux, name=self.__name__)
        rebuild = functools.partial(jax.tree.unflatten, tree)
        return implicit.linearise(self._condition, rebuild, leaves, x, moving, has_aux=has_aux)

    def _fun_has_aux(self, problem: Problem, n: int) -> bool:
        """With aux, `fun` may have one too: its value is then what is of the right size."""
        wanted = 1 if self._condition is implicit.stationary else n
        return self._has_aux and problem.has_aux(wanted)

    def _raise_failure(self, found: Diagnostics, dx: Any) -> None:
        """Raise what can be raised now: inside a compiled program NaN tells."""
        if isinstance(found.good, _compat.Tracer):
            return
        if not found.good:
            raise failure(found, count(dx), self.__name__)
        leaves = jax.tree.leaves(dx)
        known = not any(isinstance(dot, _compat.Tracer) for dot in leaves)
        if known and not all(np.all(np.isfinite(dot)) for dot in leaves):
            msg = (
                f"{self.__name__}: the derivative is not finite: the iterative linear solver"
                " stopped short, or the direction of differentiation is not finite itself. Give"
                " another linear_solve, or more steps."
            )
            raise SingularError(msg)


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
    an option of its own; options and `x0` get derivative zero, because the solution does not depend
    on them.

    Args:
      solver: `solver(fun, x0, ...)` in JAX, pure. `x0` is a pytree of floating or complex arrays,
        and so is the x that it returns. `fun` reaches it as a `Closure`.
      has_aux: the solver returns `(x, aux)`, and `fun` may return `(value, aux)`. This declares the
        aux constant: it has derivative zero.
      linear_solve: how the system of the derivative is solved: a lineax solver, a truncated series
        (`neumann`, `one_step`), or a function `solve(operator, b)` that takes a `LinearOperator`
        and returns a pytree like b: like x, with a pair of real arrays for each complex one. It may
        call the operator, as in `solve(matvec, b)`. A backward pass takes the transpose of the
        function where JAX can transpose it, and calls it for the transposed operator where not.
        None: divide by the slope of one unknown, factorise up to `dense_limit` unknowns, beyond
        that BiCGStab(2) (conjugate gradients for `argmin`) until |r| <= eps^(3/4) |b|, and the
        matrix or least squares where these stand still.
      preconditioner: for None: a function that takes the operator and returns a linear function of
        v that is about A^-1 v, symmetric and definite for `argmin`. With it nothing is factorised.
      dense_limit: see linear_solve. 0 never factorises a system of more than one unknown at once.
      on_failure: what happens where the derivative cannot be trusted. That is: the solver did not
        converge (a Newton step from its result would move it by more than the fourth root of the
        dtype's spacing, 1.2e-4 for float64 and 1.9e-2 for float32, relative to the norm of x,
        absolute below norm 1; an iterative linear solver only estimates the step), something is not
        finite, the system is singular (reciprocal condition number below 10 n eps), or it was not
        solved (residual above the same tolerance, relative). "raise": an error where values are
        known; NaN inside `jit` and `vmap`, and in a backward pass where an iterative linear solver
        stopped short. "nan": NaN always. "least_squares": the shortest solution of a singular
        system, else as "raise".
      check: False leaves all of that out. It costs two more right-hand sides.
      jit: False runs the solver as it is, for one that cannot be traced; it then needs known
        values.

    Raises:
      freevars.errors.NotASolutionError, freevars.errors.SingularError: see `on_failure`.
      freevars.errors.StructureError: the solver returns another structure, shape or dtype than
        `x0`.
      TypeError: an unknown is neither floating nor complex, or there is not one equation for each.

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
