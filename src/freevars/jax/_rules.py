"""Derivatives for any solver, from the condition that its result satisfies.

Let x(t) solve F(x, t) = 0, where t is everything that the function reads besides x: its captured
values and its extra arguments. Differentiate the condition along a direction t':

    dF/dx x' + dF/dt t' = 0,    so    x' = -(dF/dx)^-1 (dF/dt t').

This holds for the exact solution of a regular system, however it was found, so the rule never looks
inside the solver. F is `fun` for a root, `grad fun` for a minimum, `fun(x) - x` for a fixed point. The
map t' -> x' is linear: JAX transposes it for reverse mode, and since the rule calls the decorated
solver again for x, it differentiates itself to any order.

Source: the implicit function theorem; in this form Blondel et al. 2022, "Efficient and Modular
Implicit Differentiation". Not here: how the linear system is solved (`_linear`), and how solvers that
are not JAX code are run (`_on_host`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from freevars.errors import NotASolutionError, SingularError
from freevars.jax import _compat, _linear
from freevars.jax._arguments import Spec, mismatch, split
from freevars.jax._closure import Closure
from freevars.jax._on_host import HostSolver
from freevars.jax._problem import Problem
from freevars.jax._vector import to_vector

__all__ = ["ImplicitSolver", "argmin", "fixed_point", "root"]

OnFailure = Literal["raise", "nan", "least_squares"]


def _root(problem: Problem, x: Any, *, has_aux: bool) -> Any:
    return problem.value(x, has_aux=has_aux)


def _stationary(problem: Problem, x: Any, *, has_aux: bool) -> Any:
    return jax.grad(lambda x: problem.value(x, has_aux=has_aux))(x)


def _unchanged(problem: Problem, x: Any, *, has_aux: bool) -> Any:
    return jax.tree.map(jnp.subtract, problem.value(x, has_aux=has_aux), x)


class State(NamedTuple):
    """What tells whether a derivative can be trusted; every entry depends on primals alone."""

    error: Any  # Float[Array, ""]: the norm of a Newton step, relative to the norm of x, absolute below 1
    rcond: Any  # Float[Array, ""]: see `_linear.Health`
    asymmetry: Any  # Float[Array, ""]: see `_linear.Health`
    finite: Any  # Bool[Array, ""]: x and the condition at x

    @staticmethod
    def of(solver: _linear.Solver, f: Any, x: Any) -> State:
        f = jax.lax.stop_gradient(f)
        error = solver.size_of(f) / jnp.maximum(jnp.linalg.norm(x), 1.0)
        finite = jnp.all(jnp.isfinite(x)) & jnp.all(jnp.isfinite(f))
        state = State(error, solver.health.rcond, solver.health.asymmetry, finite)
        return State(*(jax.lax.stop_gradient(entry) for entry in state))


class Call(NamedTuple):
    """The part of one call that is not differentiated and does not change what is compiled: which
    options came, and the values of those that are not arrays."""

    tree: Any
    statics: tuple[tuple[int, Any], ...]


class ImplicitSolver:
    """A solver with a derivative rule; made by `root`, `argmin` and `fixed_point`."""

    def __init__(
        self,
        solver: Callable[..., Any],
        condition: Callable[..., Any],
        *,
        has_aux: bool,
        linear_solve: Any,
        on_failure: OnFailure,
        check: bool,
        jit: bool,
    ) -> None:
        if on_failure not in ("raise", "nan", "least_squares"):
            msg = f'on_failure: expected "raise", "nan" or "least_squares", got {on_failure!r}.'
            raise ValueError(msg)
        functools.update_wrapper(self, solver, updated=())
        self._solver = solver
        self._signature = _solver_signature(solver)
        self._condition = condition
        self._has_aux = has_aux
        self._linear_solve = linear_solve
        self._on_failure = on_failure
        self._check = check
        self._jit = jit and not isinstance(solver, HostSolver)
        self._run = (
            jax.jit(self._run_solver, static_argnums=0) if self._jit else self._run_solver
        )
        self._tangent = jax.jit(self._tangent_map, static_argnums=(0, 1))
        self._implicit = jax.custom_jvp(self._forward, nondiff_argnums=(0,))
        self._implicit.defjvp(self._rule, symbolic_zeros=True)

    def __call__(self, fun: Callable[..., Any], x0: Any, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(fun, x0, *args, **kwargs)
        fun_args, fun_kwargs, options = _sort_arguments(bound)
        x0 = _as_unknown(x0, self.__name__)
        problem = Problem.of(fun, x0, fun_args, fun_kwargs)
        call, arrays = _split_options(options)
        own = self._own_captures(call, problem, x0, arrays)
        return self._implicit(call, problem, x0, arrays, own)

    def __repr__(self) -> str:
        return f"<{self.__name__} with an implicit derivative rule>"

    # Running the solver.

    def _run_solver(self, call: Call, problem: Problem, x0: Any, arrays: list[Any]) -> Any:
        options = tree_util.tree_unflatten(call.tree, _join(arrays, call.statics))
        if isinstance(self._solver, HostSolver):
            equations = self._condition is not _stationary
            out = self._solver.solve(problem, x0, options, equations=equations, has_aux=self._has_aux)
        else:
            out = _call_solver(self._signature, self._solver, problem, x0, options)
        x, aux = out if self._has_aux else (out, None)
        x = _like(x, x0, self.__name__)
        return (x, aux) if self._has_aux else x

    def _own_captures(self, call: Call, problem: Problem, x0: Any, arrays: list[Any]) -> Any:
        """The solver itself as a closure if it captures traced values, otherwise None.

        They have to become arguments too, or the rule could not be crossed; the solution does not
        depend on them, and so their derivative is zero. Asking JAX for what it traced costs little,
        converting costs a trace, and most solvers capture nothing.
        """
        if not self._jit or _compat.nothing_traced():
            return None
        if not _compat.captured_tracers(self._run, call, problem, x0, arrays):
            return None
        return Closure(functools.partial(self._run_solver, call), problem, x0, arrays)

    def _forward(self, call: Call, problem: Problem, x0: Any, arrays: list[Any], own: Any) -> Any:
        if own is not None:
            return own(problem, x0, arrays)
        return self._run(call, problem, x0, arrays)

    # The rule.

    def _rule(self, call: Call, primals: Any, tangents: Any) -> Any:
        out = self._implicit(call, *primals)
        x, aux = out if self._has_aux else (out, None)
        leaves, tree = tree_util.tree_flatten(primals[0])
        dots = tree_util.tree_leaves(tangents[0], is_leaf=_compat.is_symbolic_zero)
        moving = tuple(i for i, dot in enumerate(dots) if not _compat.is_symbolic_zero(dot))
        if moving:
            dx, state = self._tangent(tree, moving, leaves, x, [dots[i] for i in moving])
            if self._check and self._on_failure != "nan":
                self._raise_failure(state, to_vector(x)[0].size)
        else:
            dx = jax.tree.map(jnp.zeros_like, x)
        if not self._has_aux:
            return x, dx
        return (x, aux), (dx, jax.tree.map(_zero_tangent, aux))

    def _tangent_map(
        self, tree: Any, moving: tuple[int, ...], leaves: list[Any], x: Any, dots: list[Any]
    ) -> Any:
        """The direction x' for the direction `dots` of the moving leaves, and what tells whether to
        trust it. Linear in `dots`."""
        xv, to_x = to_vector(x)
        problem = tree_util.tree_unflatten(tree, leaves)

        def optimality(xv: Any, moved: list[Any]) -> Any:
            with_moved = list(leaves)
            for i, leaf in zip(moving, moved, strict=True):
                with_moved[i] = leaf
            problem = tree_util.tree_unflatten(tree, with_moved)
            value = self._condition(problem, to_x(xv), has_aux=self._has_aux)
            return self._square(to_vector(value)[0], xv)

        moved = [leaves[i] for i in moving]
        push = _push_of(problem.fun, self._condition)
        f, matvec = push(lambda xv: optimality(xv, moved), xv)
        solver = _linear.prepare(
            matvec,
            xv,
            symmetric=self._condition is _stationary,
            linear_solve=self._linear_solve,
            least_squares=self._on_failure == "least_squares",
            check=self._check,
        )
        _, by_moved = push(lambda moved: optimality(xv, moved), moved)
        dx = -solver.solve(by_moved(dots))
        if not self._check:
            return to_x(dx), None
        state = State.of(solver, f, jax.lax.stop_gradient(xv))
        good = state.finite & (state.error <= _linear.tolerance(xv.dtype))
        return to_x(dx * jnp.where(good, 1.0, jnp.nan).astype(dx.dtype)), state

    def _square(self, f: Any, x: Any) -> Any:
        if f.size != x.size:
            msg = (
                f"{self.__name__}: the optimality function has {f.size} components for {x.size}"
                " unknowns. A derivative exists where there is one equation for each unknown."
            )
            raise TypeError(msg)
        return f.astype(x.dtype)

    def _raise_failure(self, state: State, n: int) -> None:
        if any(isinstance(s, _compat.Tracer) for s in state):
            return  # inside a compiled program NaN tells
        error, rcond, asymmetry = (float(s) for s in state[:3])
        name, dtype = self.__name__, state.error.dtype
        tol = _linear.tolerance(dtype)
        if not state.finite:
            msg = f"{name}: the solver returned a value that is not finite, or at which its condition is not."
        elif rcond <= _linear.least_rcond(n, dtype) and self._on_failure != "least_squares":
            msg = (
                f"{name}: the system of the derivative is singular (reciprocal condition number about"
                f" {rcond:.1e}), so the solution is not a differentiable function of the captured"
                ' values there. on_failure="least_squares" takes the shortest solution.'
            )
            raise SingularError(msg)
        elif asymmetry > tol:
            msg = (
                f"{name}: the second derivative of the objective is not symmetric (by {asymmetry:.1e},"
                " relative): a custom rule in it is not a gradient. Give linear_solve=lineax.GMRES(...)."
            )
            raise SingularError(msg)
        elif error > tol:
            msg = (
                f"{name}: the solver did not converge: a Newton step from its result would still move"
                f" it by {error:.1e}, relative to its norm (absolute below norm 1); up to {tol:.1e} is"
                " accepted. Let it run longer, or declare the result good with check=False."
            )
        else:
            return
        raise NotASolutionError(msg)


def _push_of(closure: Closure[Any], condition: Callable[..., Any]) -> Callable[..., Any]:
    """How to push a direction through the condition: `push(f, x)` is f(x) and its derivative there.

    A function with a `custom_vjp` in it has no forward mode. But its pullback is linear, and the
    transpose of that is the derivative again.
    """
    if condition is _stationary or not _compat.has_custom_vjp(closure._program.jaxpr):  # noqa: SLF001
        return jax.linearize

    def push(f: Callable[[Any], Any], x: Any) -> tuple[Any, Callable[[Any], Any]]:
        value, pull = jax.vjp(f, x)
        transpose = jax.linear_transpose(pull, value)
        return value, lambda dot: transpose((dot,))[0]

    return push


def _solver_signature(solver: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(solver)
    positional = [
        p
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(positional) < 2:
        msg = f"a solver takes at least (fun, x0), got {solver!r} with the signature {signature}."
        raise TypeError(msg)
    return signature


def _sort_arguments(
    bound: inspect.BoundArguments,
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """The extra arguments of the function, and the options of the solver.

    What a solver collects in `*args` and `**kwargs`, or takes as a tuple named `args` as scipy's do,
    it passes on to the function; what it names is its own.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    options: dict[str, Any] = {}
    parameters = bound.signature.parameters
    for name, value in list(bound.arguments.items())[2:]:
        kind = parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            kwargs = dict(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL or name == "args":
            args = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        else:
            options[name] = value
    return args, kwargs, options


def _call_solver(
    signature: inspect.Signature,
    solver: Callable[..., Any],
    problem: Problem,
    x0: Any,
    options: dict[str, Any],
) -> Any:
    """Call the solver as its user did, with the converted function."""
    given: dict[str, Any] = dict(options)
    for i, (name, parameter) in enumerate(signature.parameters.items()):
        if i == 0:
            given[name] = problem.as_given()
        elif i == 1:
            given[name] = x0
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given[name] = problem.kwargs
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL or (name == "args" and problem.args):
            given[name] = problem.args
    bound = inspect.BoundArguments(signature, given)  # type: ignore[arg-type]
    return solver(*bound.args, **bound.kwargs)


def _split_options(options: dict[str, Any]) -> tuple[Call, list[Any]]:
    """The options that are arrays, and the rest. A Python number stays one: solvers count with it."""
    leaves, tree = tree_util.tree_flatten(options)
    arrays = [x for x in leaves if isinstance(x, (_compat.Array, np.ndarray, _compat.Tracer))]
    statics = tuple(
        (i, x)
        for i, x in enumerate(leaves)
        if not isinstance(x, (_compat.Array, np.ndarray, _compat.Tracer))
    )
    return Call(tree, statics), arrays


def _join(arrays: list[Any], statics: tuple[tuple[int, Any], ...]) -> list[Any]:
    return Spec(None, (), statics).join(arrays)


def _as_unknown(x0: Any, name: str) -> Any:
    """`x0` as arrays of definite floating or complex dtypes."""

    def convert(path: Any, leaf: Any) -> Any:
        where = f"{name}: x0{tree_util.keystr(path)}"
        if not _compat.is_array(leaf):
            msg = f"{where} is {leaf!r}; an unknown is a floating or complex array or number."
            raise TypeError(msg)
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            msg = (
                f"{where} has dtype {dtype}; an unknown is floating or complex, or the solution could"
                " not have a derivative. Start from a float, 1.0 for 1."
            )
            raise TypeError(msg)
        return jnp.asarray(leaf, dtype=dtype)

    return tree_util.tree_map_with_path(convert, x0)


def _like(x: Any, x0: Any, name: str) -> Any:
    """What a solver returned, if it is of the structure and types of `x0`."""
    arrays, tree, statics = split(x0)
    spec = Spec(tree, tuple(_compat.example_type(a) for a in arrays), statics)
    error = mismatch(spec, x, name=f"{name}: the returned x", weak_matters=False)
    if error is not None:
        raise error
    return jax.tree.map(lambda a, b: jnp.asarray(a, dtype=b.dtype), x, x0)


def _zero_tangent(x: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(np.shape(x), jax.dtypes.float0)


def _decorator(condition: Callable[..., Any], solver: Any, options: dict[str, Any]) -> Any:
    def decorate(solver: Callable[..., Any]) -> ImplicitSolver:
        return ImplicitSolver(solver, condition, **options)

    return decorate if solver is None else decorate(solver)


_DOC = """{first}

    The decorated solver is called as before, `solver(fun, x0, ...)`, and returns what it returned
    before, {x}. Derivatives, forward and reverse and of any order, flow into
    every value that `fun` captures and into the extra arguments that the solver passes on to `fun`:
    what its signature collects in `*args` and `**kwargs`, or a tuple named `args`. Everything else in
    its signature is an option of its own and gets derivative zero, and so does `x0`.

    Args:
      solver: `solver(fun, x0, ...)` in JAX, pure; it is given a `Closure` of `fun`.
      has_aux: the solver returns `(x, aux)`, and `fun` returns `(value, aux)`. This declares aux
        constant: it has derivative zero.
      linear_solve: how the system of the derivative is solved: a lineax solver, or a callable
        `solve(matvec, b)` on real vectors (a complex unknown counts as two real ones). None:
        factorise up to {limit} unknowns, beyond that {iterative}.
      on_failure: what happens where the derivative cannot be trusted: the solver did not converge (a
        Newton step from its result would move it by more than the fourth root of the dtype's spacing,
        1.2e-4 for float64 and 1.9e-2 for float32, relative to the norm of x, absolute below 1), the
        result is not finite, the system is singular (reciprocal condition number below 10 n eps) or an
        iterative solve stopped short (residual above the same tolerance, relative). "raise": an error
        where the values are known, NaN inside `jit` and `vmap` and in the backward pass of an iterative
        solve. "nan": NaN always. "least_squares": the shortest solution of a singular system, and as
        "raise" for the rest.
      check: False leaves all of this out; it costs one more right-hand side.
      jit: False runs the solver as it is, for one that cannot be traced; it then needs known values.

    Raises:
      freevars.errors.NotASolutionError, freevars.errors.SingularError: see `on_failure`.
      freevars.errors.StructureError: the solver returns another structure, shape or dtype than `x0`.
      TypeError: an unknown is not floating or complex.

    Source: implicit function theorem; Blondel et al. 2022, "Efficient and Modular Implicit
    Differentiation".

{example}
    """


def _rule(
    name: str, condition: Callable[..., Any], first: str, x: str, iterative: str, example: str
) -> Callable[..., Any]:
    def decorator(
        solver: Callable[..., Any] | None = None,
        /,
        *,
        has_aux: bool = False,
        linear_solve: Any = None,
        on_failure: OnFailure = "raise",
        check: bool = True,
        jit: bool = True,
    ) -> Any:
        def decorate(solver: Callable[..., Any]) -> ImplicitSolver:
            return ImplicitSolver(
                solver,
                condition,
                has_aux=has_aux,
                linear_solve=linear_solve,
                on_failure=on_failure,
                check=check,
                jit=jit,
            )

        return decorate if solver is None else decorate(solver)

    decorator.__name__ = decorator.__qualname__ = name
    decorator.__doc__ = _DOC.format(
        first=first, x=x, iterative=iterative, limit=_linear.DIRECT_LIMIT, example=example
    )
    return decorator


root = _rule("root", _root, "Give a root finder derivatives", "x", "g", "")
argmin = _rule("argmin", _stationary, "", "x", "g", "")
fixed_point = _rule("fixed_point", _unchanged, "", "x", "g", "")
