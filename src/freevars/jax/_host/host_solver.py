"""Solvers that are not JAX code: scipy's, or any C or Fortran library that takes callbacks.

Where all values are known, the solver is simply called. Inside a program (`jit`, `vmap`, `scan`) it
runs in a thread beside the program, which answers its queries (`staged`). Arrays on the devices of
several processes are used only in programs, which all processes run. Not here: derivatives; the
decorators `root`, `argmin` and `fixed_point` above add them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import (
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
)

import jax
import numpy as np
from jax import tree_util

from freevars._solvers.decorated import DecoratedSolver
from freevars._solvers.options import check_options
from freevars._solvers.signature import SolverCall
from freevars.jax import _compat
from freevars.jax._convert.static import as_static, from_static
from freevars.jax._host.batching import batched_by, broadcast, on_batch_of_one
from freevars.jax._host.example_aux import aux_leaves, aux_type
from freevars.jax._host.oracle import (
    HostFunction,
    Layout,
    Oracle,
    PytreeForm,
    query_compiled,
    real,
)
from freevars.jax._host.resolution import Resolution
from freevars.jax._host.solver_thread import Solve
from freevars.jax._host.staged import call_staged
from freevars.jax._solver.problem import Problem
from freevars.jax._solver.ravel import to_vector
from freevars.jax._solver.tangents import dots_of, zero_tangents
from freevars.jax._solver.unknown import is_array

__all__ = ["HostSolver", "Options"]

Vmap = Literal["sequential", "whole"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")


class Options(TypedDict, total=False):
    """The keyword arguments of `on_host`."""

    flat: bool  # True
    aux: Any  # None
    vmap: Vmap  # "sequential"


class HostSolver(DecoratedSolver[P, R]):
    """A NumPy solver that runs inside JAX programs; made by `on_host`.

    It is called like the solver itself, which is `__wrapped__`, and may be a method. It has no
    derivative of its own: put a rule above it.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax as fv
        >>> solver = fv.on_host(lambda fun, x0: x0 - fun.grad(x0) / 2)
        >>> find = lambda a: solver(lambda x: jnp.sum((x - a) ** 2), jnp.zeros(2))
        >>> print(isinstance(solver, fv.HostSolver), jax.jit(find)(3.0))
        True [3. 3.]
    """

    def __init__(self, solver: Callable[P, R], /, **options: Unpack[Options]) -> None:
        check_options("on_host", options, Options)
        self._flat = options.get("flat", True)
        self.aux = options.get("aux")  # the example
        self._has_aux = self.aux is not None
        self._vmap: Vmap = options.get("vmap", "sequential")
        if self._vmap == "whole" and not self._flat:
            message = 'vmap="whole" needs flat=True: a batch of pytrees has no one form.'
            raise ValueError(message)
        super().__init__(solver, **options)

    def _use(self, solver: Callable[P, R]) -> None:
        super()._use(solver)
        self._program = jax.jit(self._traced, static_argnums=(0, 1))
        self._without_rule = jax.custom_jvp(self._by_its_name(self._solve_without_rule))
        self._without_rule.defjvp(self._refuse_derivative, symbolic_zeros=True)

    @overload
    def __get__(self, instance: None, owner: Any = None, /) -> Self: ...
    @overload
    def __get__(
        self: HostSolver[Concatenate[Any, Q], S], instance: object, owner: Any = None, /
    ) -> HostSolver[Q, S]: ...
    def __get__(self, instance: Any, owner: Any = None, /) -> Any:
        return super().__get__(instance, owner)

    def _solve(self, call: SolverCall) -> Any:
        problem = Problem.of(call.fun, call.x0, call.args, call.kwargs)
        options = as_static(call.options, is_array)
        return self._without_rule(problem, call.x0, options)

    def _solve_without_rule(self, problem: Problem, x0: Any, options: dict[str, Any]) -> Any:
        """A function of one number is an objective, any other are equations."""
        leaves = jax.tree.leaves(problem.fun.out_struct)
        equations = not (len(leaves) == 1 and leaves[0].shape == ())
        options = from_static(options)
        return self.solve(problem, x0, options, equations=equations, has_aux=False)

    def _refuse_derivative(self, primals: Any, tangents: Any) -> Any:
        if dots_of(tangents)[0]:
            message = (
                f"{self.__name__}: a solver on the host has no derivative of its own. Say what"
                " holds at its result: put fv.root (fun(x) = 0), fv.argmin (a minimum of fun),"
                " fv.fixed_point (fun(x) = x), fv.least_squares (a minimum of |fun(x)|) or"
                " fv.implicit (any other condition) above fv.on_host."
            )
            raise TypeError(message)
        out = self._without_rule(*primals)
        return out, zero_tangents(out)

    def __repr__(self) -> str:
        return f"<{self.__name__} on the host>"

    def solve(
        self, problem: Problem, x0: Any, options: dict[str, Any], *, equations: bool, has_aux: bool
    ) -> Any:
        """What the solver returns: `x`, or `(x, aux)`; `has_aux`: the function may have one too."""
        layout = Layout.of(x0)
        oracle = Oracle(layout, equations, has_aux, problem.constraints)
        if problem.bounds is not None:
            options |= {"bounds": self._as_taken(problem.bounds)}
        # Python numbers are static: solvers use them in Python.
        arrays, given = tree_util.tree_flatten(as_static(options, is_array))
        values = (*jax.tree.leaves((problem, x0)), *arrays)
        traced = any(isinstance(x, _compat.Tracer) for x in values) or not _compat.computes_now()
        if traced or any(map(_is_on_other_processes, values)):
            v0, to_x = to_vector(x0)
            v, aux = self._in_program(given, oracle, problem, v0, arrays)
            x = to_x(v)
        else:
            # NumPy rather than JAX: each JAX operation costs as much as a step of a short solve.
            form = PytreeForm(layout)
            v, aux = self._call_eagerly(given, oracle, problem, form.to_vector(x0), arrays)
            x = jax.tree.map(jax.numpy.array, form.to_tree(v))
        x = jax.tree.map(_compat.like_sharding, x, x0)
        if not self._has_aux:
            return x
        return x, tree_util.tree_unflatten(jax.tree.structure(self.aux), aux)

    def _as_taken(self, bounds: Any) -> Any:
        """The two sides as the solver takes an x."""
        return tuple(to_vector(side)[0] for side in bounds) if self._flat else bounds

    def _call(
        self, query: Any, oracle: Oracle, v0: Any, options: dict[str, Any]
    ) -> tuple[Any, list[Any]]:
        """Run the solver, in any thread."""
        form = None if self._flat else PytreeForm(oracle.layout)
        start = np.array(v0, np.float64)
        v0 = start.copy()  # many solvers change it in place
        resolution = Resolution([dtype for _, dtype in oracle.layout.leaves])
        fun = HostFunction(
            query,
            v0.shape,
            equations=oracle.equations,
            pytrees=form,
            told=resolution.asked,
        )
        x0 = form.to_tree(v0) if form else v0
        options |= {
            name: HostFunction.of_constraint(query, v0.shape, name, form)
            for name in oracle.constraints
        }
        try:
            out = self._signature.call(self._solver, SolverCall(fun, x0, (), {}, options))
        except Exception as error:
            error.add_note(f"raised by the solver {self.__name__} on the host")
            raise
        x, aux = out if self._has_aux else (out, None)
        v = form.to_vector(x) if form else real(x)
        if v.shape != v0.shape:
            message = (
                f"{self.__name__}: the solver returned a vector of shape {v.shape}, expected"
                f" {v0.shape}, like its starting point."
            )
            raise TypeError(message)
        resolution.check(v, start, query, self.__name__, equations=oracle.equations)
        lead = v0.shape[:1] if self._vmap == "whole" else ()
        return v, aux_leaves(aux, self.aux, lead, self.__name__)

    def _call_eagerly(
        self, given: Any, oracle: Oracle, problem: Problem, v0: Any, arrays: list[Any]
    ) -> tuple[Any, list[Any]]:
        """Call the solver directly."""
        query = query_compiled(oracle, problem)
        rest = [np.asarray(a) for a in arrays]
        if self._vmap == "whole":  # a batch of one
            rest = [a[None] for a in rest]
            v, aux = self._call(on_batch_of_one(query), oracle, v0[None], _options(given, rest))
            v, aux = v[0], [leaf[0] for leaf in aux]
        else:
            v, aux = self._call(query, oracle, v0, _options(given, rest))
        types = [aux_type(a).dtype for a in jax.tree.leaves(self.aux)]
        return v, [leaf.astype(t) for leaf, t in zip(aux, types, strict=True)]

    def _in_program(
        self, given: Any, oracle: Oracle, problem: Problem, v0: Any, arrays: list[Any]
    ) -> tuple[Any, list[Any]]:
        """Run the solver from the program that is being traced or run."""
        number = next(_CALLS)
        errors = _ERRORS[number] = []
        try:
            out: tuple[Any, list[Any]] = self._program(
                given, oracle, problem, v0, arrays, np.int32(number)
            )
            # Where the program runs right here: on a GPU the call itself does not wait for it.
            _compat.wait_for(out)
        except jax.errors.JaxRuntimeError:
            # Inside a user's `jit` its error carries ours as text.
            if errors:
                raise errors[0] from None
            raise
        finally:
            del _ERRORS[number]
        return out

    def _traced(
        self,
        given: Any,
        oracle: Oracle,
        problem: Problem,
        v0: Any,
        arrays: list[Any],
        number: Any,
    ) -> tuple[Any, list[Any]]:
        """The compiled function, one for all closures of one structure."""
        whole = self._vmap == "whole"

        def run(query: Any, v0: Any, arrays: Any) -> tuple[Any, list[Any]]:
            *rest, number = arrays
            try:
                return self._call(query, oracle, v0, _options(given, rest))
            except BaseException as error:
                _ERRORS.get(int(np.ravel(number)[0]), []).append(error)
                raise

        aux = [aux_type(a) for a in jax.tree.leaves(self.aux)]
        enter = functools.partial(call_staged, Solve(run, tuple(aux), self.__name__), oracle)

        def alone(problem: Problem, v0: Any, arrays: list[Any]) -> Any:
            if not whole:
                return enter(problem, v0, arrays)
            out = enter(problem, *jax.tree.map(lambda a: a[None], (v0, arrays)), lanes=1)
            return jax.tree.map(lambda a: a[0], out)

        def together(size: int, batched: Any, problem: Problem, v0: Any, arrays: list[Any]) -> Any:
            axes = jax.tree.map(lambda b: 0 if b else None, batched[0])
            v0, arrays = broadcast(size, tuple(batched[1:]), (v0, arrays))
            lanes = functools.partial(enter, lanes=size, problem_axes=axes)
            return batched_by(None, lanes)(problem, v0, arrays)

        one = batched_by(together if whole else None, alone)
        out: tuple[Any, list[Any]] = one(problem, v0, [*arrays, number])
        return out


# The errors of solvers in programs that run for a current call, by the number of the call. A number
# that is compiled into a user's program has been removed by the time the program runs.
_ERRORS: dict[int, list[BaseException]] = {}
_CALLS = itertools.count(1)


def _is_on_other_processes(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def _options(given: Any, arrays: Sequence[Any]) -> dict[str, Any]:
    """The options of a solver, from their structure and the arrays among them."""
    return dict(from_static(tree_util.tree_unflatten(given, arrays)))
