"""Checks for a user's own test-suite: are the derivatives of a decorated solver right?

The oracle is the solver itself, called again with each captured value moved a little. Not here:
what the derivatives rest on (`rules`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.test_util import check_grads

from freevars._names.search import name_values
from freevars.jax import _compat
from freevars.jax._rules.solver import ImplicitSolver
from freevars.jax._solver.problem import Problem

__all__ = ["check_rule"]


def check_rule(
    solver: ImplicitSolver[..., Any],
    fun: Callable[..., Any],
    x0: Any,
    *args: Any,
    order: int = 1,
    step: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    **kwargs: Any,
) -> None:
    """Compare the derivatives of `solver(fun, x0, *args, **kwargs)` with finite differences.

    Each floating or complex value that `fun` captures, and each such extra argument, is moved
    alone, along one random direction. Forward mode has to agree with the central difference of the
    solution, and reverse mode with both, along a random cotangent (`jax.test_util.check_grads`).

    Args:
        solver: a solver decorated by `root`, `argmin` or `fixed_point`. It has to converge well
            beyond the tolerance: a difference divides what it leaves by `step`.
        fun: the function, as the solver takes it. It captures known arrays, not traced ones; Python
            numbers and NumPy scalars are part of the program and not moved.
        x0: where the solver starts.
        *args: what the solver takes besides.
        **kwargs: the same.
        order: 1, or 2 for the derivatives of the derivatives as well, each mode of each.
        step: half the width of the difference, relative to the size of the value (the root of the
            mean square of its elements), absolute where that is below 1. None: the cube root of the
            spacing of the coarsest dtype among values and solution, 6e-6 for float64 and 5e-3 for
            float32.
        rtol: the accepted error of each component, relative to the difference. None: 4 `step`.
        atol: the accepted absolute error, added to that. None: `rtol`.

    Raises:
        AssertionError: a derivative and a difference are apart; it names the value and gives both.
        ValueError: there is no floating or complex value to differentiate by.
        TypeError: `solver` is not decorated.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax as fv
        >>> @fv.root
        ... def newton(fun, x0):
        ...     return jax.lax.fori_loop(0, 20, lambda _, x: x - fun(x) / jax.grad(fun)(x), x0)
        >>> a = jnp.array(4.0)
        >>> fv.testing.check_rule(newton, lambda x: x**2 - a, 1.0)
    """
    if not isinstance(solver, ImplicitSolver):
        message = (
            f"check_rule checks a solver decorated by root, argmin or fixed_point, got {solver!r}."
        )
        raise TypeError(message)
    problem, solve = solver.as_function(fun, x0, *args, **kwargs)
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, problem))
    moved = [i for i, leaf in enumerate(leaves) if _is_differentiable(leaf)]
    if not moved:
        message = (
            "the function captures no floating or complex array, and has no such extra argument."
        )
        raise ValueError(message)
    outputs = jax.tree.leaves(jax.eval_shape(solve, problem))
    if step is None:
        dtypes = [x.dtype for x in (*outputs, *(leaves[i] for i in moved))]
        step = max(float(jnp.finfo(dtype).eps) for dtype in dtypes) ** (1 / 3)
    rtol = 4 * step if rtol is None else rtol
    atol = rtol if atol is None else atol
    names = _names(problem, fun)
    for i in moved:

        def moved_by(u: Any, i: int = i) -> Any:
            here = leaves[i]
            size = jnp.maximum(jnp.sqrt(jnp.mean(jnp.abs(here) ** 2)), 1)
            # What was moved has lost that it was of weak type.
            there = _compat.cast((here + size * u).astype(here.dtype), jax.typeof(here))
            return solve(jax.tree.unflatten(tree, [*leaves[:i], there, *leaves[i + 1 :]]))

        try:
            check_grads(
                moved_by, (jnp.zeros_like(leaves[i]),), order, atol=atol, rtol=rtol, eps=step
            )
        except AssertionError as error:
            message = (
                f"{solver.__name__}: the derivative by {names[i]} is not the difference of two"
                f" solutions, in units of the size of {names[i]}: {error}"
            )
            raise AssertionError(message) from None


def _is_differentiable(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact)) and leaf.size > 0


def _names(problem: Problem, fun: Any) -> list[str]:
    """What to call each leaf of the problem."""
    found = name_values(fun, problem.fun.values)
    names = [called[0].name if called else f"captured value {i}" for i, called in enumerate(found)]
    extra = jax.tree_util.tree_leaves_with_path({"args": problem.args, "kwargs": problem.kwargs})
    return names + [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in extra]
