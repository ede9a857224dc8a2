"""Derivatives of the solution of an ordinary differential equation, by the solver that finds it.

`freevars._solvers.integration` has the equations. Everything is a call of the decorated solver for
another field, so that it has derivatives itself, to any order. Not here: the linear map of what the
field captures and of y_0 (`adjoint`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from freevars._contract import check_callable
from freevars._solvers.integration import ODE, OdeOptions, OdeRule, Takes
from freevars._solvers.signature import SolverCall
from freevars.errors import StructureError
from freevars.jax import _compat
from freevars.jax._convert.static import Static, from_static
from freevars.jax._rules.adjoint import BySolver
from freevars.jax._rules.forms import Flat
from freevars.jax._rules.hosted import Hosted
from freevars.jax._rules.integrator import Integrator
from freevars.jax._solver.problem import Problem
from freevars.jax._solver.tangents import dots_of, full
from freevars.jax._solver.unknown import as_unknown, like

__all__ = ["OdeintSolver"]

P = ParamSpec("P")
R = TypeVar("R")


class OdeintSolver(Integrator[P, R]):
    """A solver with the derivatives of a differential equation; made by `odeint`.

    It is called like the solver itself, which is `__wrapped__`, and may be a method.

    Example:
        >>> import jax.numpy as jnp, freevars.jax as fv
        >>> def euler(field, y0, ts):  # one step to each time
        ...     ys = [y0]
        ...     for t, following in zip(ts[:-1], ts[1:]):
        ...         ys.append(ys[-1] + (following - t) * field(t, ys[-1]))
        ...     return jnp.stack(ys)
        >>> solver = fv.odeint(euler)
        >>> isinstance(solver, fv.OdeintSolver), solver.__wrapped__ is euler
        (True, True)
    """

    kind: ClassVar[str] = "odeint"
    leads: ClassVar[tuple[str, ...]] = ODE
    options = OdeOptions
    stated = OdeRule

    def _use(self, solver: Callable[P, R]) -> None:
        super()._use(solver)
        self._hosted = Hosted(solver, self._call_on_host) if self._on_host else None  # type: ignore[arg-type]

    def _solve(self, call: SolverCall) -> Any:
        check_callable(call.fun)
        y0 = as_unknown(call.x0[0], self.__name__, what="y0")
        ts = self._times(call.x0[1])

        def field(at: Any, *args: Any, **kwargs: Any) -> Any:
            return call.fun(*self.rule.t_and_y(*at), *args, **kwargs)

        problem = self._problem(field, y0, ts, call.args, call.kwargs)
        return self.solve(problem, (y0, ts, Static(_ALL)), self.as_options(call.options))

    def _problem(self, field: Any, y0: Any, ts: Any, args: Any = (), kwargs: Any = None) -> Problem:
        """A field as a function of (t, y), with a value like y."""
        expected = jax.tree.map(_type, y0)

        def checked(at: Any, *args: Any, **kwargs: Any) -> Any:
            value = field(at, *args, **kwargs)
            found = jax.tree.map(_type, value)
            if jax.tree.structure(found) != jax.tree.structure(expected) or any(
                not isinstance(a, jax.ShapeDtypeStruct)
                or a.shape != b.shape
                or (_is_complex(a) and not _is_complex(b))
                for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
            ):
                message = (
                    f"{self.__name__}: the field: expected a value like y0, {expected}, got"
                    f" {found}. {self.rule.order}"
                )
                raise StructureError(message)
            return jax.tree.map(
                lambda v, y: _compat.like_sharding(jnp.asarray(v).astype(y.dtype), y), value, y0
            )

        return Problem.of(checked, (jnp.zeros((), ts.dtype), y0), args, kwargs or {})

    def _times(self, ts: Any) -> Any:
        ts = jnp.asarray(ts)
        if ts.ndim != 1 or not ts.size or _is_complex(ts):
            message = f"{self.__name__}: ts: expected a vector of one or more times, got {ts!r}."
            raise StructureError(message)
        return ts if _compat.is_smooth(ts) else ts.astype(float)

    def _run_solver(self, problem: Problem, at: Any, options: Any) -> Any:
        y0, ts, kind = at
        run = functools.partial(self._run_through, problem, options, ts)
        return run(y0) if kind.value == _ALL else _over_leg(run, y0, ts, self.rule.has_aux)

    def _run_through(self, problem: Problem, options: Any, ts: Any, y0: Any) -> Any:
        leaves, tree = jax.tree.flatten(y0)
        if self._hosted is not None:
            flat = Flat(leaves)
            shape = (ts.size, flat.size)
            given, point = dict(from_static(options)), (ts[0], y0)
            start = (flat.ravel(leaves), ts)
            rows, aux = self._hosted(problem, point, shape, start, given)
            ys = tree.unflatten(flat.unravel(jnp.asarray(rows).astype(flat.dtype)))
        else:
            how = _AsField(self.rule, str(ts.dtype), self.__name__)
            fun: Any = jax.tree_util.Partial(how, problem.as_given())
            out = self.call_solver(fun, (y0, ts), problem, options)
            ys, aux = self.rule.split_aux(out, self.__name__, "ys")
        expected = jax.tree.map(lambda y: jnp.zeros((ts.size, *y.shape), y.dtype), y0)
        hint = " A solver returns the states at all times, like y0 with a leading axis over ts."
        ys = like(ys, expected, f"{self.__name__}: the returned ys", hint=hint)
        return (ys, aux) if self.rule.has_aux else ys

    def _call_on_host(self, fun: Any, at: Any, given: dict[str, Any], shape: Any) -> Any:
        del shape
        solver: Any = self._solver
        call = SolverCall(_HostField(fun, self.rule), at, (), {}, given)
        out = self._signature.call(solver.__wrapped__, call)
        return self.rule.split_aux(out, self.__name__, "ys")

    # The rule.

    def _push(self, primals: Any, tangents: Any) -> Any:
        problem, (y0, ts, kind), options, own = primals
        self.refuse_lost(own, tangents)
        out = self._operation(*primals)
        ys = self.result_of(out)
        types = jax.tree.leaves(jax.tree.map(jax.typeof, ys))
        d_start, dts, _ = tangents[1]
        moves = not _compat.is_symbolic_zero(dts)
        moving, dots = dots_of(tangents[0])
        terms = []
        if moving or moves or dots_of(d_start)[0]:
            start = jax.tree.leaves(full(d_start))
            if moves:
                slopes = jax.tree.leaves(problem.value((ts[0], y0), has_aux=False))
                start = [
                    d - f * dts[0].astype(f.real.dtype) for d, f in zip(start, slopes, strict=True)
                ]
            given, structure = jax.tree.flatten((problem, (y0, ts), options, ys))
            by_solver = BySolver(self, structure, moving, kind.value == _LEG)
            terms.append(_compat.linear_map(by_solver, given, [*dots, *start], types))
        if moves:
            every = jax.vmap(lambda t, y: problem.value((t, y), has_aux=False))(ts, ys)
            terms.append([_each(f, dts) for f in jax.tree.leaves(every)])
        return self.with_tangent(out, terms)

    def integrate(
        self, field: Any, state: Any, ts: Any, options: Any, takes: Takes, *, leg: bool
    ) -> list[Any]:
        """Solve another equation, for a list of arrays; over one leg, that between two times which
        may be equal, the solver runs only where they are not."""
        flat = Flat(state)
        whole = takes == "array"
        pack = flat.ravel if whole else tuple
        unpack = flat.unravel if whole else list
        # A solver returns strong types, even where the parameters are weakly typed.
        y0 = pack([jnp.asarray(part, part.dtype) for part in state])
        problem = self._problem(lambda at: pack(field(at[0], unpack(at[1]))), y0, ts)
        at = (y0, ts, Static(_LEG if leg else _ALL))
        states = unpack(self.result_of(self.solve(problem, at, options)))
        # In one vector all vary as the first does.
        return [*map(_compat.not_more_varying, states, state)]


_ALL, _LEG = "all times", "a leg"


def _over_leg(run: Callable[[Any], Any], y0: Any, ts: Any, has_aux: bool) -> Any:  # noqa: FBT001
    """What a solver finds at two times. Few solvers take equal ones, where y0 holds at both, or a
    y0 that is not finite, as the states are from where the solver stopped short: then it is NaN.

    It is a value of the operation, below its rule: the derivative by the times remains.
    """
    good = jnp.asarray(True)
    for leaf in jax.tree.leaves(y0):
        good &= jnp.all(jnp.isfinite(leaf))
    # The solver runs all the same: on other devices, with which the field may communicate, and for
    # the other members under `vmap`, it does.
    start = jax.tree.map(lambda y: jnp.where(good, y, jnp.zeros_like(y)), y0)
    types = jax.eval_shape(run, start)

    def still() -> Any:
        twice = jax.tree.map(lambda y: jnp.stack([y, y]), start)
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), types)
        value = (twice, nothing[1]) if has_aux else twice
        return jax.tree.map(
            lambda a, like: _compat.like_type(a.astype(like.dtype), like), value, types
        )

    out = jax.lax.cond(ts[0] == ts[1], still, lambda: run(start))
    ys = jax.tree.map(lambda y: jnp.where(good, y, jnp.nan), out[0] if has_aux else out)
    return (ys, out[1]) if has_aux else ys


def _each(f: Any, dts: Any) -> Any:
    return f * dts.reshape(-1, *[1] * (f.ndim - 1)).astype(f.real.dtype)


@dataclass(frozen=True)
class _AsField:
    """A function of (t, y) as the solver calls it; compares by what it says."""

    rule: OdeRule
    dtype: str
    name: str

    def __call__(self, fun: Any, first: Any, second: Any, /, *args: Any, **kwargs: Any) -> Any:
        t, y = self.rule.t_and_y(first, second)
        if not _compat.is_array(t) or jnp.shape(t) != ():
            message = (
                f"{self.name}: the field: expected a time of shape (), got"
                f" {jax.tree.map(_type, t)}. {self.rule.order}"
            )
            raise StructureError(message)
        return fun((jnp.asarray(t, self.dtype), y), *args, **kwargs)


class _HostField:
    """The field on the host: a NumPy function, with its Jacobian by the state."""

    def __init__(self, fun: Any, rule: OdeRule) -> None:
        self._fun, self._rule = fun, rule

    def _point(self, first: Any, second: Any) -> Any:
        t, y = self._rule.t_and_y(first, second)
        return np.concatenate([np.reshape(t, 1), np.ravel(y)])

    def __call__(self, first: Any, second: Any, /) -> Any:
        return self._fun(self._point(first, second))

    def jacobian(self, first: Any, second: Any, /) -> Any:
        """A row for each component of the field, a column for each of the state."""
        return self._fun.jacobian(self._point(first, second))[:, 1:]


def _is_complex(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.complexfloating))


def _type(x: Any) -> Any:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) if _compat.is_array(x) else x
