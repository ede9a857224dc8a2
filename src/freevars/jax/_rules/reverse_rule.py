"""JAX's rule for a solver whose function has no forward mode: reverse mode only.

`reverse` has the mathematics; this file connects it with the solver's call and the verdict.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from freevars.jax import _compat
from freevars.jax._rules import diagnostics, implicit, refusal, reverse
from freevars.jax._rules.coordinates import Space
from freevars.jax._rules.operator import LinearOperator
from freevars.jax._rules.rule import Rule
from freevars.jax._rules.seen import Equations
from freevars.jax._rules.sizes import Unknown, limits_of
from freevars.jax._rules.system import guarded
from freevars.jax._solver.problem import Problem, count
from freevars.jax._solver.tangents import full

__all__ = ["only_in_reverse", "pull_back", "solve_by_rows"]


def only_in_reverse(rule: Rule, problem: Problem, x0: Any) -> reverse.Pullback | None:
    """How the condition is pulled back, if that is the only way to a derivative."""
    if not problem.fun._program.has_custom_vjp:  # noqa: SLF001 (own package)
        return None
    types, tree = jax.tree.flatten(
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x0)
    )
    has_aux = rule.fun_has_aux(problem, count(x0))
    condition = rule.condition(problem)
    leaves, structure = jax.tree.flatten(problem)
    pullback = reverse.Pullback(condition, structure, (tree, tuple(types)), has_aux)
    needed = pullback.needed(pullback.coordinates.to_real(x0), leaves)
    if needed is not None and (rule.polish or rule.conserved):
        option = "polish=True" if rule.polish else "conserved="
        message = (
            f"{rule.name}: {option} takes a derivative of fun in forward mode, and fun holds a"
            " jax.custom_vjp whose backward pass JAX cannot transpose. Leave the option out, or"
            " give fun a jax.custom_jvp."
        )
        raise NotImplementedError(message)
    return needed


@_compat.any_rank
def pull_back(
    rule: Rule, by_rows: Any, pullback: reverse.Pullback, saved: Any, cotangent: Any
) -> Any:
    (problem, x0, *rest), out, (places, others) = saved
    x, g = (out[0], cotangent[0]) if rule.has_aux else (out, cotangent)
    coordinates = pullback.coordinates
    v, v0 = coordinates.to_real(x), coordinates.to_real(x0)
    (g,) = jax.linear_transpose(coordinates.from_real, v)(full(g))
    leaves, structure = jax.tree.flatten(problem)
    u, found = reverse.adjoint(
        pullback, functools.partial(_solve, rule, by_rows), v, leaves, v0, g, tuple(places)
    )
    cotangents: list[Any] = [None] * len(leaves)
    for i, ct in zip(places, found, strict=True):
        cotangents[i] = ct
    # Zero, if x is a solution; otherwise unknown.
    nothing = sum(0 * jnp.sum(leaf) for leaf in jax.tree.leaves(u))
    flat, tree = jax.tree.flatten((x0, *rest))
    none = [
        jnp.broadcast_to(nothing, leaf.shape).astype(leaf.dtype) if i in others else None
        for i, leaf in enumerate(flat)
    ]
    return jax.tree.unflatten(structure, cotangents), *tree.unflatten(none)


def _solve(
    rule: Rule,
    by_rows: Any,
    pullback: reverse.Pullback,
    transposed: bool,  # noqa: FBT001
    v: Any,
    leaves: list[Any],
    v0: Any,
    b: Any,
) -> Any:
    u, found = by_rows(pullback, transposed, v, leaves, v0, b)
    if rule.check and rule.on_failure != "nan":
        x, x0 = map(pullback.coordinates.from_real, (v, v0))
        refusal.tell_failure(rule, found, (x, x0, {}, None), u, by_options=False)
    return u


@_compat.any_rank
def solve_by_rows(
    rule: Rule,
    pullback: reverse.Pullback,
    transposed: bool,  # noqa: FBT001
    v: Any,
    leaves: list[Any],
    v0: Any,
    b: Any,
) -> Any:
    """The solution of the system or its transpose, by the matrix, and the verdict on v."""
    space = Space()
    limits = limits_of(pullback.coordinates, rule.tol)
    unknown = Unknown.of(v, v0, space, pullback.coordinates, limits)
    at = functools.partial(pullback.at, leaves=leaves)
    operator = LinearOperator(
        functools.partial(pullback.by_x, v, leaves, transposed=False),
        v,
        rmatvec=functools.partial(pullback.by_x, v, leaves, transposed=True),
        symmetric=pullback.condition in implicit.MINIMA,
    )
    sizes = unknown.v, unknown.far, unknown.d, limits
    rows = pullback.rows(v, leaves)
    system = rule.method.prepare_matrix(operator, space, rows, sizes)
    found, good = None, True
    if rule.check:
        found = diagnostics.measure(system, unknown, Equations(at(v), at))
        good = found.good
    assert system.scaled is not None  # noqa: S101 (a matrix is given)
    apply = system.scaled.transpose_of if transposed else system.scaled.of
    return guarded(space, good, operator.unravel(apply(operator.ravel(b))), b), found
