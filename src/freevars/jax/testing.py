"""Checks for a user's own test-suite: are the derivatives of a decorated solver right?

The oracle is the solver itself, called again with each captured value moved a little. Not here:
what the derivatives rest on (`rules`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from freevars._names.search import name_values
from freevars.jax import _compat
from freevars.jax._rules.rules import ImplicitSolver
from freevars.jax._solver.problem import Problem
from freevars.jax._solver.ravel import to_vector

__all__ = ["check_rule"]

Function = Callable[[list[Any]], Any]  # from all values to one real number


class _Value(NamedTuple):
    """One value to differentiate by."""

    place: int  # among the leaves of the problem
    name: str
    direction: Any  # like the value, as long as the value, and no shorter than 1


class _Accepted(NamedTuple):
    """How far two numbers may be apart, and the half width of a difference."""

    step: float
    rtol: float
    atol: float


def check_rule(
    solver: ImplicitSolver,
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

    The solution is reduced to one number by fixed weights. Each floating or complex value that
    `fun` captures, and each such extra argument, is moved along a fixed direction, and along i
    times it where it is complex. Forward mode, reverse mode and the central difference have to
    agree.

    Args:
      solver: a solver decorated by `root`, `argmin` or `fixed_point`. It has to converge well
        beyond the tolerance: a difference divides what it leaves by `step`.
      fun: the function, as the solver takes it. It captures known arrays, not traced ones; Python
        numbers and NumPy scalars are part of the program and not moved.
      x0: where the solver starts.
      *args: what the solver takes besides.
      **kwargs: the same.
      order: 1, or 2 for the derivative of the derivative as well, forward and reverse over reverse.
      step: half the width of the difference, relative to the norm of the value, absolute below 1.
        None: the cube root of the spacing of the coarsest dtype among values and solution, 6e-6
        for float64 and 5e-3 for float32.
      rtol: the accepted error, relative to the larger number. None: 4 `step`.
      atol: the accepted absolute error, added to that. None: `rtol`.

    Raises:
      AssertionError: two of the numbers differ; it names the value and gives both.
      ValueError: there is no floating or complex value to differentiate by.
      TypeError: `solver` is not decorated.

    >>> import jax, jax.numpy as jnp, freevars.jax as fv
    >>> @fv.root
    ... def newton(fun, x0):
    ...     return jax.lax.fori_loop(0, 20, lambda _, x: x - fun(x) / jax.grad(fun)(x), x0)
    >>> a = jnp.array(4.0)
    >>> fv.testing.check_rule(newton, lambda x: x**2 - a, 1.0)
    """
    if not isinstance(solver, ImplicitSolver):
        msg = (
            f"check_rule checks a solver decorated by root, argmin or fixed_point, got {solver!r}."
        )
        raise TypeError(msg)
    problem, solve = solver.as_function(fun, x0, *args, **kwargs)
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, problem))
    values = _values(problem, fun)
    if not values:
        msg = "the function captures no floating or complex array, and has no such extra argument."
        raise ValueError(msg)

    def number(leaves: list[Any]) -> Any:
        x = to_vector(solve(jax.tree.unflatten(tree, leaves)))[0]
        return x @ _weights(x.size, 2.1).astype(x.dtype)

    dtypes = [jax.eval_shape(number, leaves).dtype, *(v.direction.dtype for v in values)]
    if step is None:
        step = max(float(jnp.finfo(d).eps) for d in dtypes) ** (1 / 3)
    rtol = 4 * step if rtol is None else rtol
    accepted = _Accepted(step, rtol, rtol if atol is None else atol)
    _compare(number, leaves, values, f"{solver.__name__}: the derivative", accepted)
    if order > 1:

        def slope(leaves: list[Any]) -> Any:
            return sum(_reverse(number, leaves, value) for value in values)

        what = f"{solver.__name__}: the second derivative"
        _compare(slope, leaves, values, what, accepted)


def _compare(
    f: Function, leaves: list[Any], values: list[_Value], what: str, accepted: _Accepted
) -> None:
    step, rtol, atol = accepted
    for value in values:
        at, here = _by(f, leaves, value), leaves[value.place]
        forward = float(jax.jvp(at, (here,), (value.direction,))[1])
        reverse = float(_reverse(f, leaves, value))
        ends = [at(here + t * value.direction) for t in (step, -step)]
        central = float(ends[0] - ends[1]) / (2 * step)
        for name, other in (("reverse mode", reverse), ("a central difference", central)):
            allowed = atol + rtol * max(abs(forward), abs(other))
            if not abs(forward - other) <= allowed:  # NaN differs from everything
                msg = (
                    f"{what} by {value.name} is {forward!r} in forward mode and"
                    f" {other!r} by {name}; they may differ by {allowed:.1e}."
                )
                raise AssertionError(msg)


def _by(f: Function, leaves: list[Any], value: _Value) -> Callable[[Any], Any]:
    """`f` as a function of one value."""
    before, after = leaves[: value.place], leaves[value.place + 1 :]
    expected = jax.typeof(leaves[value.place])  # a moved one may have lost that it is of weak type
    return lambda leaf: f([*before, _compat.cast(leaf, expected), *after])


def _reverse(f: Function, leaves: list[Any], value: _Value) -> Any:
    gradient = jax.grad(_by(f, leaves, value))(leaves[value.place])
    return jnp.sum(gradient * value.direction).real


def _values(problem: Problem, fun: Any) -> list[_Value]:
    captured = problem.fun.values
    names = [
        called[0].name if called else f"captured value {i}"
        for i, called in enumerate(name_values(fun, captured))
    ]
    extra = jax.tree_util.tree_leaves_with_path({"args": problem.args, "kwargs": problem.kwargs})
    names += [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in extra]
    leaves = [*captured, *(leaf for _, leaf in extra)]
    found = zip(range(len(leaves)), leaves, names, strict=True)
    return [value for place, x, name in found for value in _directions(place, x, name)]


def _directions(place: int, x: Any, name: str) -> Iterator[_Value]:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact) or x.size == 0:
        return
    # Other than the weights of the solution: u.Bu is the same for B and its transpose.
    unit = _weights(x.size, 1.3).reshape(x.shape)
    direction = (unit * jnp.maximum(jnp.linalg.norm(jnp.ravel(x)), 1.0)).astype(x.dtype)
    yield _Value(place, name, direction)
    if jnp.iscomplexobj(x):
        yield _Value(place, f"{name} along i", 1j * direction)


def _weights(n: int, frequency: float) -> Any:
    """A fixed vector of length 1 with a bit of every direction."""
    v = jnp.cos(frequency * jnp.arange(n) + 0.3)
    return v / jnp.linalg.norm(v)
