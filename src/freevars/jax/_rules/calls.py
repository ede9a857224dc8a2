"""One call of a decorated solver: turned into a problem, and passed on to the solver.

Not here: what the derivative of a call is (`solver`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from freevars._contract import check_callable
from freevars._solvers.signature import SolverCall, split_aux
from freevars._solvers.stated import States
from freevars.errors import StructureError
from freevars.jax import _compat
from freevars.jax._host.host_solver import HostSolver
from freevars.jax._rules import constrained
from freevars.jax._rules.rule import Rule
from freevars.jax._solver.problem import Problem, count
from freevars.jax._solver.unknown import like

__all__ = [
    "argument_of",
    "call_of",
    "checked",
    "constrained_problem",
    "problem_of",
    "run_on_host",
]


def argument_of(states: States) -> Callable[[Any], Any] | None:
    """What a condition passes to the solver's function, if that is not x."""
    return None if isinstance(states, str) else states[1]


def problem_of(call: SolverCall, x0: Any, states: States) -> Problem:
    """The problem of a call without constraints."""
    fun, args, kwargs = call.fun, call.args, call.kwargs
    if isinstance(states, str):
        return Problem.of(fun, x0, args, kwargs)
    condition, argument = states
    functions = {
        "fun": lambda x, args, kwargs: fun(x, *args, **kwargs),
        "condition": lambda x, args, kwargs: condition(
            lambda *point: fun(*point, *args, **kwargs), x
        ),
    }
    check_callable(fun)
    point = x0 if argument is None else argument(x0)
    return Problem.of_parts(functions, {"fun": point, "condition": x0}, args, kwargs)


def constrained_problem(
    call: SolverCall, x0: Any, constraints: dict[str, Any], name: str
) -> Problem:
    """The problem of a call with constraints."""
    fun, args, kwargs = call.fun, call.args, call.kwargs
    check_callable(fun)
    functions: dict[str, Callable[..., Any]] = {
        "fun": lambda x, args, kwargs: fun(x, *args, **kwargs)
    }
    for kind in ("equality", "inequality"):
        if kind in constraints:
            functions[kind] = lambda x, _args, _kwargs, kind=kind: constraints[kind](x)
    bounds = constraints.get("bounds")
    if bounds is not None:
        bounds = constrained.bounds_like(bounds, x0, name)
    problem = Problem.of_parts(functions, dict.fromkeys(functions, x0), args, kwargs, bounds)
    for kind in problem.constraints:
        _check_constraint(kind, problem.struct(kind), name)
        if problem.coupled:  # the objective alone may be
            _refuse_coupled(problem, kind, x0, name)
    return problem


def _refuse_coupled(problem: Problem, kind: str, x0: Any, name: str) -> None:
    """Refuse a constraint on the parts of several devices: each would decide alone whether it is
    active."""
    axes = _compat.coupled_axes(jax.make_jaxpr(problem.constraint(kind))(x0).jaxpr)
    if axes:
        names = ", ".join(map(repr, sorted(axes)))
        message = (
            f"{name}: {kind}: expected a constraint on x of one device, got one that sends values"
            f" along the named axis {names} (psum, say). Solve outside of shard_map, pmap or"
            " vmap(axis_name=...): there an array that is spread over devices is one unknown."
        )
        raise NotImplementedError(message)


def _check_constraint(kind: str, value: Any, name: str) -> None:
    """Refuse a constraint whose value has no derivative, or no sign."""
    wanted, shown = (jnp.inexact, " or complex") if kind == "equality" else (jnp.floating, "")
    for leaf in jax.tree.leaves(value):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, wanted):
            message = (
                f"{name}: {kind}: expected a function of x that returns floating{shown} arrays, got"
                f" {leaf!r}."
            )
            raise StructureError(message)


def call_of(problem: Problem, x0: Any, options: dict[str, Any]) -> SolverCall:
    """The call that gives a JAX solver a problem."""
    given = dict(options)
    if problem.bounds is not None:
        given["bounds"] = problem.bounds
    given |= {name: problem.constraint(name) for name in problem.constraints}
    return SolverCall(problem.as_given(), x0, *problem.extra(), given)


def run_on_host(
    solver: HostSolver[Any, Any], rule: Rule, problem: Problem, x0: Any, options: dict[str, Any]
) -> Any:
    """The result of a host solver for a problem."""
    return solver.solve(
        problem,
        x0,
        options,
        equations=_gives_equations(rule, problem),
        has_aux=rule.fun_has_aux(problem, count(x0)),
    )


def _gives_equations(rule: Rule, problem: Problem) -> bool:
    """Whether a solver on the host is given equations, and not an objective."""
    if rule.kind != "implicit":
        return rule.kind != "argmin"
    leaves = jax.tree.leaves(problem.struct())
    return not (len(leaves) == 1 and leaves[0].shape == ())


def checked(out: Any, x0: Any, name: str, *, has_aux: bool) -> Any:
    """What a solver returned, with x like x0."""
    if not has_aux:
        return like(out, x0, f"{name}: the returned x")
    x, aux = split_aux(out, name)
    return like(x, x0, f"{name}: the returned x"), aux
