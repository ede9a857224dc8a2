"""The cases of the rules: problems for `root`, `argmin` and `fixed_point`, each with its solution
written out, and the ways in which a solution can fail to have a derivative.

Nothing here names a host: a host brings its arrays, its derivatives and its own `freevars` module,
and its tests bring the transformations (`test_rule_table.py` of each host).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from freevars.errors import NotASolutionError, SingularError


class RuleHost(NamedTuple):
    """What the problems need of a host."""

    xp: Any
    fv: Any  # freevars.jax or freevars.torch
    array: Callable[[Any], Any]  # of a list or NumPy array, in double precision
    grad: Callable[..., Any]
    jacobian: Callable[..., Any]
    loop: Callable[[int, Callable[[Any], Any], Any], Any]  # n steps from a start
    tree_map: Callable[..., Any]


class Problem(NamedTuple):
    """Two functions of `a` and `b` (floats, shape (2,)) with values of that shape."""

    name: str
    solve: Callable[..., Any]  # (host, a, b), by a decorated solver whose function captures both
    exact: Callable[..., Any]  # (host, a, b), in closed form


A = np.array([0.4, -0.3])
B = np.array([0.8, 0.5])


def newton(host: RuleHost) -> Any:
    """Newton's method for a vector."""

    def solver(fun: Any, x0: Any, steps: int = 7) -> Any:
        derivative = host.jacobian(fun)
        step = lambda x: x - host.xp.linalg.solve(derivative(x), fun(x))
        return host.loop(steps, step, x0)

    return solver


def least(host: RuleHost) -> Any:
    """Newton's method for the gradient."""
    return lambda objective, x0: newton(host)(host.grad(objective), x0)


def richardson(host: RuleHost) -> Any:
    """x <- x - 0.3 fun(x), in any structure: `fun` is called with all that the solver collects."""

    def solver(fun: Any, x0: Any, *args: Any, damping: Any = 1.0, **kwargs: Any) -> Any:
        def step(x: Any) -> Any:
            r = fun(x, *args, **kwargs)
            return host.tree_map(lambda x, r: x - 0.3 * damping * r, x, r)

        return host.loop(55, step, x0)

    return solver


def iterate(host: RuleHost) -> Any:
    """x <- fun(x)."""
    return lambda fun, x0: host.loop(60, fun, x0)


def _zeros(host: RuleHost) -> Any:
    return host.array(np.zeros(2))


def _rank_one(host: RuleHost, d: Any, b: Any, c: Any) -> Any:
    """The solution of (diag(d) + b b^T) x = c, by Sherman and Morrison."""
    by_d = c / d
    return by_d - b / d * host.xp.sum(b * by_d) / (1 + host.xp.sum(b * b / d))


def _root(host: RuleHost, a: Any, b: Any) -> Any:
    solve = host.fv.root(newton(host))
    return solve(lambda x: x**3 * host.xp.exp(a) - b**2 - 1, host.array(np.ones(2)))


def _root_exact(host: RuleHost, a: Any, b: Any) -> Any:
    return ((b**2 + 1) / host.xp.exp(a)) ** (1 / 3)


def _argmin(host: RuleHost, a: Any, b: Any) -> Any:
    xp = host.xp

    def objective(x: Any) -> Any:
        return xp.sum(xp.exp(a) * x**2 + xp.sum(b * x) ** 2 / 2) / 2 - xp.sum(xp.sin(a) * b * x)

    return host.fv.argmin(least(host))(objective, _zeros(host))


def _argmin_exact(host: RuleHost, a: Any, b: Any) -> Any:
    return _rank_one(host, host.xp.exp(a), b, host.xp.sin(a) * b)


def _fixed_point(host: RuleHost, a: Any, b: Any) -> Any:
    xp = host.xp
    solve = host.fv.fixed_point(iterate(host))
    return solve(lambda x: xp.cos(a) * x / 3 - b * xp.sum(b * x) / 4 + a, _zeros(host))


def _fixed_point_exact(host: RuleHost, a: Any, b: Any) -> Any:
    return _rank_one(host, 1 - host.xp.cos(a) / 3, b / 2, a)


def _pytree(host: RuleHost, a: Any, b: Any) -> Any:
    def residual(x: Any) -> Any:
        return {"u": 2 * x["u"] + x["v"][0] - a, "v": (2 * x["v"][0] - b**2 * x["u"],)}

    x = host.fv.root(richardson(host))(residual, {"u": _zeros(host), "v": (_zeros(host),)})
    return x["u"] + 3 * x["v"][0]


def _pytree_exact(host: RuleHost, a: Any, b: Any) -> Any:
    u = a / (2 + b**2 / 2)
    return u + 3 * b**2 * u / 2


def _complex(host: RuleHost, a: Any, b: Any) -> Any:
    c = a + 1j * b
    # Not holomorphic in what it captures.
    residual = lambda z: (2 + 1j) * z - c * host.xp.abs(c) ** 2
    z = host.fv.root(richardson(host))(residual, _zeros(host) * 1j)
    return host.xp.real(z) - 2 * host.xp.imag(z)


def _complex_exact(host: RuleHost, a: Any, b: Any) -> Any:
    # 1 / (2 + i) = (2 - i) / 5
    size = a**2 + b**2
    return size * ((2 * a + b) - 2 * (2 * b - a)) / 5


def _bilevel(host: RuleHost, a: Any, b: Any) -> Any:
    minimize = host.fv.argmin(least(host))

    def outer(y: Any) -> Any:
        x = minimize(lambda x: host.xp.sum((x - a * y) ** 2), _zeros(host))
        return host.xp.sum((x - 3 * b) ** 2 + y**2)

    return minimize(outer, _zeros(host))


def _bilevel_exact(host: RuleHost, a: Any, b: Any) -> Any:
    return 3 * a * b / (1 + a**2)


def _aux(host: RuleHost, a: Any, b: Any) -> Any:
    def solver(fun: Any, x0: Any) -> Any:
        x = newton(host)(lambda x: fun(x)[0], x0)
        return x, {"of fun": fun(x)[1], "steps": host.array([7.0])}

    x0 = host.array(np.ones(2))
    x, aux = host.fv.root(solver, has_aux=True)(lambda x: (x**2 - host.xp.exp(a), b), x0)
    # The aux is a constant of the derivative, so it must add nothing to it.
    return x * b + 0 * aux["of fun"] * aux["steps"]


def _aux_exact(host: RuleHost, a: Any, b: Any) -> Any:
    return host.xp.exp(a / 2) * b


def _arguments(host: RuleHost, a: Any, b: Any) -> Any:
    """What the solver collects it passes on; what it names is an option, with derivative zero."""

    def fun(x: Any, b: Any, *, shift: Any) -> Any:
        return 2 * x - a * b - shift

    solve = host.fv.root(richardson(host))
    return solve(fun, _zeros(host), b, shift=host.xp.sin(a), damping=1 + a[0] / 10)


def _arguments_exact(host: RuleHost, a: Any, b: Any) -> Any:
    return (a * b + host.xp.sin(a)) / 2


def _constants(host: RuleHost, a: Any, b: Any) -> Any:
    """Captured integers and booleans, a repeated and an unused value."""
    n, flag, swap = 2, host.array([1.0, 0.0]) > 0, [1, 0]

    def residual(x: Any) -> Any:
        host.xp.sin(b)  # dead code
        return x**n - host.xp.where(flag, host.xp.exp(a) * host.xp.exp(a), b[host.xp.asarray(swap)])

    return host.fv.root(newton(host))(residual, host.array(np.ones(2)))


def _constants_exact(host: RuleHost, a: Any, b: Any) -> Any:
    return host.xp.stack([host.xp.exp(a[0]), host.xp.sqrt(b[0])])


def _least_squares(host: RuleHost, a: Any, b: Any) -> Any:
    """Residuals that remain, and curve: J^T J alone gives another derivative."""
    xp = host.xp

    def solver(fun: Any, x0: Any) -> Any:
        derivative = host.jacobian(fun)
        return newton(host)(lambda x: derivative(x).T @ fun(x), x0)

    residual = lambda x: xp.concatenate([x**2 - xp.exp(a) - 1, b * x])
    return host.fv.least_squares(solver)(residual, host.array(np.ones(2)))


def _least_squares_exact(host: RuleHost, a: Any, b: Any) -> Any:
    return host.xp.sqrt(host.xp.exp(a) + 1 - b**2 / 2)


def _eigenpair(host: RuleHost, a: Any, b: Any) -> Any:
    """The largest eigenvalue of a symmetric matrix, and how much of its vector is the first unit:
    the solver is given the product with the matrix."""
    xp = host.xp

    def condition(matvec: Any, x: Any) -> Any:
        return matvec(x["v"]) - x["l"] * x["v"], xp.sum(x["v"] ** 2) - 1

    def power(matvec: Any, x0: Any) -> Any:
        step = lambda v: matvec(v) / xp.sqrt(xp.sum(matvec(v) ** 2))
        v = host.loop(40, step, x0["v"])
        return {"v": v, "l": xp.sum(v * matvec(v))}

    matvec = lambda v: xp.exp(a) * v + b[0] * v[xp.asarray([1, 0])]
    x0 = {"v": host.array([0.6, 0.8]), "l": host.array(1.0)}
    x = host.fv.implicit(condition, argument=lambda x: x["v"])(power)(matvec, x0)
    return xp.stack([x["l"], x["v"][0] ** 2])


def _eigenpair_exact(host: RuleHost, a: Any, b: Any) -> Any:
    first, second = host.xp.exp(a)
    half = host.xp.sqrt((first - second) ** 2 / 4 + b[0] ** 2)
    share = (1 + (first - second) / (2 * half)) / 2
    return host.xp.stack([(first + second) / 2 + half, share])


def _other_functions(host: RuleHost, a: Any, b: Any) -> Any:
    """The solver takes steps with a cheap function; what holds is said by an exact one, of which
    the solver's is no part."""
    xp = host.xp
    energy = lambda x: xp.sum(xp.exp(a) * x**4 / 4 - b * x)
    solve = host.fv.implicit(lambda _, x: host.grad(energy)(x))(richardson(host))
    return solve(lambda x: 1.2 * (x**3 * xp.exp(a) - b), host.array(np.ones(2)))


def _other_functions_exact(host: RuleHost, a: Any, b: Any) -> Any:
    return (b / host.xp.exp(a)) ** (1 / 3)


PROBLEMS = [
    Problem("root", _root, _root_exact),
    Problem("argmin", _argmin, _argmin_exact),
    Problem("fixed_point", _fixed_point, _fixed_point_exact),
    Problem("pytree", _pytree, _pytree_exact),
    Problem("complex", _complex, _complex_exact),
    Problem("bilevel", _bilevel, _bilevel_exact),
    Problem("aux", _aux, _aux_exact),
    Problem("arguments", _arguments, _arguments_exact),
    Problem("constants", _constants, _constants_exact),
    Problem("least_squares", _least_squares, _least_squares_exact),
    Problem("eigenpair", _eigenpair, _eigenpair_exact),
    Problem("other functions", _other_functions, _other_functions_exact),
]


class Failure(NamedTuple):
    """A problem of a scalar `t` without a derivative to be trusted: what is raised, and what the
    derivative is with `on_failure="least_squares"` and with `check=False`. None: it raises."""

    name: str
    program: Callable[..., Any]  # (host, options, t), a scalar
    error: type[Exception]
    match: str
    least_squares: float | None
    unchecked: float | None  # NOT_FINITE: it is not


NOT_FINITE = math.inf


def check_failure(failure: Failure, derivative: Callable[..., float]) -> None:
    """That `derivative(**options)` is, or raises, what `failure` says."""
    with pytest.raises(failure.error, match=failure.match):
        derivative()
    assert math.isnan(derivative(on_failure="nan"))
    for options, expected in (
        ({"on_failure": "least_squares"}, failure.least_squares),
        ({"check": False}, failure.unchecked),
    ):
        if expected is None:
            with pytest.raises(failure.error, match=failure.match):
                derivative(**options)
        elif expected == NOT_FINITE:
            assert not math.isfinite(derivative(**options))
        else:
            assert derivative(**options) == pytest.approx(expected, rel=1e-9)


SINGULAR = np.array([[1.0, 2.0], [2.0, 4.0]])
RIGHT = np.array([1.0, 2.0])


def _lazy(host: RuleHost, options: Any, t: Any) -> Any:
    solver = host.fv.root(lambda fun, x0: x0, **options)
    return host.xp.sum(solver(lambda x: 2 * x - t * host.array(RIGHT), host.array([9.0, 9.0])))


def _lazy_minimiser(host: RuleHost, options: Any, t: Any) -> Any:
    solver = host.fv.argmin(lambda fun, x0: x0, **options)
    objective = lambda x: host.xp.sum((x - t * host.array(RIGHT)) ** 2)
    return host.xp.sum(solver(objective, host.array([9.0, 9.0])))


def _infinite(host: RuleHost, options: Any, t: Any) -> Any:
    solver = host.fv.fixed_point(lambda fun, x0: x0 / 0.0, **options)
    return host.xp.sum(solver(lambda x: x / 2 + t, host.array([9.0, 9.0])))


def _singular(host: RuleHost, options: Any, t: Any) -> Any:
    """SINGULAR x = t RIGHT, whose shortest solution is t RIGHT / 5."""
    solver = host.fv.root(lambda fun, x0: x0 - fun(x0) / 5, **options)
    matrix, right = host.array(SINGULAR), host.array(RIGHT)
    return host.xp.sum(solver(lambda x: matrix @ x - t * right, host.array([0.0, 0.0])))


FAILURES = [
    Failure("root not found", _lazy, NotASolutionError, "did not converge", None, 1.5),
    Failure("minimum not found", _lazy_minimiser, NotASolutionError, "did not conv", None, 3.0),
    Failure("not finite", _infinite, NotASolutionError, "finite", None, 4.0),
    Failure("singular", _singular, SingularError, "reciprocal condition", 0.6, NOT_FINITE),
]

# Mistakes: what is called, and which exceptions tell, with what.
MISTAKES: list[tuple[Callable[[RuleHost], Any], type[Exception], str]] = [
    (lambda host: host.fv.root(lambda fun: fun), TypeError, "x0|starting point"),
    (lambda host: host.fv.root(newton(host), on_failure="ignore"), ValueError, "on_failure: exp"),
    (lambda host: host.fv.root(newton(host))(lambda x: x, {"n": "3"}), TypeError, "x0"),
    (
        lambda host: host.fv.root(lambda fun, x0: (x0, x0))(lambda x: x, _zeros(host)),
        TypeError,
        "expected",
    ),
    (
        lambda host: host.fv.root(lambda fun, x0: x0[:1])(lambda x: x, _zeros(host)),
        TypeError,
        r"float64\[2\].*float64\[1\]",
    ),
]
