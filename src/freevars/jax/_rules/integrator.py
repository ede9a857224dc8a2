"""Solvers of integrals and differential equations: one call as a differentiable operation.

`_operation(problem, at, options, own)` runs the solver for the function `problem` between the
points `at`; the rule is the subclass's `_push`, in which the same solver solves for the derivative.
Not here: what the derivative is (`integral`, `odeint`).
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar, overload

import jax
import jax.numpy as jnp
from jax import tree_util

from freevars._solvers.decorated import DecoratedSolver
from freevars._solvers.integration import IntegralRule, Takes, no_derivative
from freevars._solvers.options import check_options
from freevars._solvers.signature import SolverCall
from freevars.errors import CaptureError, NotASolutionError
from freevars.jax import _compat
from freevars.jax._closure import Closure
from freevars.jax._convert.static import as_static, from_static
from freevars.jax._host.host_solver import HostSolver
from freevars.jax._solver.problem import Problem
from freevars.jax._solver.tangents import zero_tangents
from freevars.jax._solver.unknown import is_array

__all__ = ["Integrator", "Told", "accepted"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")
Told = Callable[..., NotASolutionError]  # of a name, error= and limit=


class Integrator(DecoratedSolver[P, R]):
    """What the decorated solvers of `integral` and `odeint` have in common."""

    kind: ClassVar[str]
    options: ClassVar[Any]  # a TypedDict
    stated: ClassVar[type[IntegralRule]]

    def __init__(self, solver: Callable[P, R], /, **options: Any) -> None:
        check_options(self.kind, options, self.options)
        self.rule: Any = self.stated(**options)
        super().__init__(solver, **options)

    def _use(self, solver: Callable[P, R]) -> None:
        super()._use(solver)
        self._on_host = isinstance(solver, HostSolver)
        self._run = self._run_solver if self._on_host else jax.jit(self._run_solver)
        self._run_converted = jax.jit(_call)
        self._operation = jax.custom_jvp(self._by_its_name(self._forward))
        self._operation.defjvp(self._push, symbolic_zeros=True)

    @overload
    def __get__(self, instance: None, owner: Any = None, /) -> Self: ...
    @overload
    def __get__(
        self: Integrator[Concatenate[Any, Q], S], instance: object, owner: Any = None, /
    ) -> Integrator[Q, S]: ...
    def __get__(self, instance: Any, owner: Any = None, /) -> Any:
        return super().__get__(instance, owner)

    def __repr__(self) -> str:
        return f"<{self.__name__} with the derivative rule of {self.kind}>"

    def solve(self, problem: Problem, at: Any, options: Any) -> Any:
        """Run the solver; differentiable by the problem and the points."""
        return self._operation(problem, at, options, self._own(problem, at, options))

    @staticmethod
    def as_options(options: dict[str, Any]) -> Any:
        """Python numbers among the options are static: solvers use them in Python."""
        return as_static(options, is_array)

    def _own(self, problem: Problem, at: Any, options: Any) -> Any:
        """A closure of the solver where it captures traced values, else None."""
        if self._on_host or _compat.nothing_traced():
            return None
        is_method = self._bound_to is not None or isinstance(self._solver, types.MethodType)
        if not is_method and not _compat.captured_tracers(self._run, problem, at, options):
            return None
        return Closure(self._run_solver, problem, at, options)

    def _forward(self, problem: Problem, at: Any, options: Any, own: Any) -> Any:
        if own is None:
            out = self._run(problem, at, options)
        else:
            out = self._run_converted(own, problem, at, options)
        if not self.rule.has_aux:
            return _compat.tied(out)
        return _compat.tied(out[0]), out[1]

    def refuse_lost(self, own: Any, tangents: Any) -> None:
        """Refuse a derivative of which a part would be lost.

        The rule covers what the function reads, and the points. A derivative is a call for another
        function in another trace, where a traced value that the solver captures does not exist.
        """
        options = from_static(tangents[2])
        constant = "jax.lax.stop_gradient of it"
        for name, dot in options.items():
            if _moves(dot):
                raise no_derivative(self.__name__, f"the option {name}=", self.leads, constant)
        if _moves(tangents[3]):
            by = "a value that the solver captures"
            raise no_derivative(self.__name__, by, self.leads, f"{constant} as an option")
        traced = [] if own is None else [v for v in own.values if isinstance(v, _compat.Tracer)]
        if traced and _moves(tangents):
            types = ", ".join(str(jax.typeof(value)) for value in traced)
            message = (
                f"{self.__name__}: expected a solver whose traced values are all arguments, got one"
                f" that captures {types}: its derivative calls it again elsewhere. Pass it as an"
                f" option of the solver, a parameter of its own after {', '.join(self.leads)}."
            )
            raise CaptureError(message)

    def _run_solver(self, problem: Problem, at: Any, options: Any) -> Any:
        raise NotImplementedError

    def _push(self, primals: Any, tangents: Any) -> Any:
        raise NotImplementedError

    def with_tangent(self, out: Any, terms: Sequence[Sequence[Any]]) -> tuple[Any, Any]:
        """What the solver returned and its tangent, the sum of some terms, leaf by leaf."""
        result = self.result_of(out)
        if terms:
            leaves = [sum(each[1:], each[0]) for each in zip(*terms, strict=True)]
            dot = jax.tree.structure(result).unflatten(leaves)
        else:
            dot = zero_tangents(result)
        return out, (dot, zero_tangents(out[1])) if self.rule.has_aux else dot

    def call_solver(self, fun: Any, at: tuple[Any, Any], problem: Problem, options: Any) -> Any:
        """Call the user's solver for `fun` with the extra arguments of the problem."""
        call = SolverCall(fun, at, *problem.extra(), from_static(options))
        return self._signature.call(self._solver, call)

    def tell(self, error: Any, eps: float, told: Told) -> None:
        """Report a derivative that is inaccurate, for values with this spacing; inside a compiled
        program it is NaN."""
        how, limit = self.rule.on_failure, self.rule.limit(eps)
        if not self.rule.check or how == "nan":
            return
        told = functools.partial(told, self.__name__, limit=limit)
        if how == "warn":
            jax.debug.callback(functools.partial(_warn, limit, told), error)
        elif not isinstance(error, _compat.Tracer) and not error <= limit:
            raise told(error=float(error))

    def takes(self, struct: Any) -> Takes:
        """What the solver integrates where one value of a call was like this."""
        leaves, tree = jax.tree.flatten(struct)
        shapes = [jnp.shape(leaf) for leaf in leaves]
        form: Takes = self.rule.form(shapes, is_leaf=tree_util.treedef_is_leaf(tree))
        return form

    def result_of(self, out: Any) -> Any:
        """What the solver returned, without its aux."""
        return out[0] if self.rule.has_aux else out


def accepted(out: list[Any], asked: list[Any], good: Any) -> list[Any]:
    """NaN in place of what is not good, except where the direction is zero."""
    nothing = jnp.all(jnp.stack([jnp.all(a == 0) for a in asked])) if asked else True
    # A factor, so that a derivative of what is not good is NaN too.
    factor = jnp.where(good | nothing, 1, jnp.nan)
    found = [leaf * factor.astype(leaf.real.dtype) for leaf in out]
    # What all devices share is NaN where that of one is.
    return [*map(_compat.not_more_varying, found, out)]


def _warn(limit: float, told: Told, error: Any) -> None:
    if not error <= limit:
        warnings.warn(str(told(error=float(error))), stacklevel=2)


def _moves(tangents: Any) -> bool:
    leaves = tree_util.tree_leaves(tangents, is_leaf=_compat.is_symbolic_zero)
    # Python numbers among the options are static, and never move.
    return any(isinstance(dot, jax.Array) and not _compat.is_symbolic_zero(dot) for dot in leaves)


def _call(own: Callable[..., Any], problem: Problem, at: Any, options: Any) -> Any:
    return own(problem, at, options)
