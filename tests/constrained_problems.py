"""Minima with constraints whose solutions are written out, for both hosts.

Each solver finds its solution by trying all active sets of a quadratic program, so that no
tolerance of a solver stands between a problem and its closed form.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.rule_problems import RuleHost

__all__ = [
    "FIXED",
    "LEFT",
    "PROBLEMS",
    "REFUSED",
    "Refused",
    "active_set",
    "all_at_zero",
    "beside_bounds",
    "fixed_by",
    "free_and_small",
]


class Problem(NamedTuple):
    """Two functions of `t`, a float, with values of the same shape."""

    name: str
    solve: Callable[..., Any]  # (host, decorator options, t)
    exact: Callable[..., Any]  # (host, t)


def active_set(host: RuleHost, **options: Any) -> Any:
    """A solver for quadratic objectives and linear constraints, in NumPy by way of `host.to_numpy`:
    it steps from each set of active constraints and takes the best that is feasible."""

    def solver(fun, x0, bounds=None, equality=None, inequality=None):
        n = len(x0)
        zero, unit = host.array(np.zeros(n)), host.array(np.eye(n))
        value = lambda f, x: np.asarray(host.numpy(f(x)), float).reshape(-1)
        f = lambda x: float(value(fun, x)[0])
        linear, hess = _quadratic(f, zero, unit)

        def affine(c):
            at0 = value(c, zero)
            return np.stack([value(c, unit[i]) - at0 for i in range(n)], 1), at0

        always, sometimes = [], []
        if equality is not None:
            always += list(zip(*affine(equality), strict=True))
        if inequality is not None:
            sometimes += list(zip(*affine(inequality), strict=True))
        for side, sign in zip(bounds or (None, None), (1, -1), strict=True):
            if side is not None:
                ends = np.broadcast_to(np.asarray(host.numpy(side), float), (n,))
                sometimes += [
                    (sign * np.eye(n)[i], -sign * e) for i, e in enumerate(ends) if np.isfinite(e)
                ]
        points = _stationary_points(hess, linear, always, sometimes)
        return host.array(min(points, key=lambda x: linear @ x + x @ hess @ x / 2))

    return host.on_host(solver, **options)


def _quadratic(f: Any, zero: Any, unit: Any) -> tuple[Any, Any]:
    """Slope and curvature of a quadratic function, from its values."""
    n, f0 = len(zero), f(zero)
    ups, downs = [f(unit[i]) for i in range(n)], [f(-unit[i]) for i in range(n)]
    hess = np.diag([u + d - 2 * f0 for u, d in zip(ups, downs, strict=True)])
    for i, j in itertools.combinations(range(n), 2):
        hess[i, j] = hess[j, i] = f(unit[i] + unit[j]) - ups[i] - ups[j] + f0
    return np.array([(u - d) / 2 for u, d in zip(ups, downs, strict=True)]), hess


def _stationary_points(hess: Any, linear: Any, always: Any, sometimes: Any) -> Any:
    """The feasible ones, of every set of active constraints."""
    n = len(linear)
    for k in range(n - len(always) + 1):
        for chosen in itertools.combinations(sometimes, k):
            rows = [*always, *chosen]
            a = np.array([r for r, _ in rows]).reshape(len(rows), n)
            b = np.array([c for _, c in rows])
            kkt = np.block([[hess, a.T], [a, np.zeros((len(rows), len(rows)))]])
            if np.linalg.matrix_rank(kkt) < len(kkt):
                continue
            x = np.linalg.solve(kkt, np.concatenate([-linear, -b]))[:n]
            if all(r @ x + c >= -1e-12 for r, c in sometimes):
                yield x


def _box(host: RuleHost, solve: Any, t: Any) -> Any:
    a = t * host.array([1.0, 3.0, -2.0])
    return solve(
        lambda x: host.xp.sum((x - a) ** 2), host.array(np.full(3, 0.5)), bounds=(0.0, 1 + t**2 / 2)
    )


def _box_exact(host: RuleHost, t: Any) -> Any:
    return host.xp.stack([t, 1 + t**2 / 2, 0 * t])


def _budget(host: RuleHost, solve: Any, t: Any) -> Any:
    """Weights of a portfolio: one is at zero, the others share what is left."""
    gain = t * host.array([1.0, 1.5, -4.0])
    return solve(
        lambda x: host.xp.sum(x**2) / 2 - host.xp.sum(gain * x),
        host.array(np.full(3, 1 / 3)),
        bounds=(0.0, None),
        equality=lambda x: host.xp.sum(x) - t**3,
    )


def _budget_exact(host: RuleHost, t: Any) -> Any:
    price = (2.5 * t - t**3) / 2
    return host.xp.stack([t - price, 1.5 * t - price, 0 * t])


def _far(host: RuleHost, solve: Any, t: Any) -> Any:
    """The same, with numbers that stand for no limit."""
    gain = t * host.array([1.0, 1.5, -4.0])
    return solve(
        lambda x: host.xp.sum(x**2) / 2 - host.xp.sum(gain * x),
        host.array(np.full(3, 1 / 3)),
        bounds=(0.0, 1e20),
        equality=lambda x: host.xp.sum(x) - t**3,
        inequality=lambda x: 1e20 - x,
    )


def _half_space(host: RuleHost, solve: Any, t: Any) -> Any:
    """The nearest point on a line that captures t; another constraint does not hold anything."""
    target = host.array([2.0, 1.0])

    def inequality(x: Any) -> Any:
        return host.xp.stack([1 + t - x[0] - x[1], x[0] + 10.0])

    return solve(
        lambda x: t * host.xp.sum((x - target) ** 2), host.array(np.zeros(2)), inequality=inequality
    )


def _half_space_exact(host: RuleHost, t: Any) -> Any:
    return host.xp.stack([2 - (2 - t) / 2, 1 - (2 - t) / 2])


def _vertex(host: RuleHost, solve: Any, t: Any) -> Any:
    """A linear program: as many active constraints as unknowns."""
    return solve(
        lambda x: -x[0] - 2 * t * x[1],
        host.array(np.zeros(2)),
        bounds=(0.0, None),
        inequality=lambda x: host.xp.stack([4 * t - x[0] - x[1], 6 - x[0] - 3 * x[1]]),
    )


def _vertex_exact(host: RuleHost, t: Any) -> Any:
    return host.xp.stack([6 * t - 3, 3 - 2 * t])


PROBLEMS = [
    Problem("box", _box, _box_exact),
    Problem("budget", _budget, _budget_exact),
    Problem("limits of 1e20", _far, _budget_exact),
    Problem("half-space", _half_space, _half_space_exact),
    Problem("vertex", _vertex, _vertex_exact),
]
T = 0.8


class Refused(NamedTuple):
    """A result without a derivative: what the error says, and which."""

    name: str
    solve: Callable[..., Any]  # (host, options, t), a number
    error: str
    text: str


def _returning(host: RuleHost, x: list[float], options: Any) -> Any:
    def solver(fun, x0, bounds=None, equality=None, inequality=None):
        return host.array(x)

    return host.fv.argmin(host.on_host(solver), **options)


def _square(host: RuleHost, t: Any) -> Any:
    return lambda x: host.xp.sum((x - t) ** 2)


def _on(x: list[float], **constraints: Any) -> Any:
    """What is refused at x, as the minimum of (x - t)^2 for t = 1."""

    def solve(host: RuleHost, options: Any, t: Any) -> Any:
        given = {name: make(host) for name, make in constraints.items()}
        found = _returning(host, x, options)(_square(host, t), host.array([0.3] * len(x)), **given)
        return host.xp.sum(found)

    return solve


# Which side of a box that leaves no choice moves, where the minimum without it is, and by how much.
FIXED = [("lower", 3.0, 0.0), ("upper", 3.0, 1.0), ("lower", -3.0, 1.0), ("upper", -3.0, 0.0)]


def fixed_by(host: RuleHost, options: Any, side: str, goal: float, t: Any) -> Any:
    """The minimum of (x - goal)^2 between two bounds of 1, of which one is t."""
    bounds = (t, 1.0) if side == "lower" else (1.0, t)
    solve = _returning(host, [1.0], options)
    return solve(lambda x: host.xp.sum((x - goal) ** 2), host.array([0.3]), bounds=bounds)[0]


def beside_bounds(host: RuleHost, t: Any) -> Any:
    """The sum of x in their units, as an interior-point method leaves it: t. What lies beside a
    bound of zero has no size of its own, and all have different units."""
    units = np.array([1e-2, 1.0, 1e2])
    found = _returning(host, list(units * [0.8, 1e-9, 1e-9]), {})
    size, goal = host.array(units), host.array([1.0, -1.0, -2.0])
    x = found(lambda x: host.xp.sum((x / size - t * goal) ** 2), 0 * size, bounds=(0.0, None))
    return host.xp.sum(x / size)


# What a solver leaves of a component that lies on a bound of zero. The last is small where the
# equations tell how large x is, which linear ones do not.
LEFT = [0.0, 1e-300, 1e-17, 1e-12, 1e-9]


def all_at_zero(host: RuleHost, left: float, bend: float, t: Any) -> Any:
    """The sum of x, all of which is what a solver leaves at bounds of t - 1, for t = 1: 2 (t - 1).
    That is no size, and only the way from the start tells that it is small."""
    solve = _returning(host, [left, left], {})
    objective = lambda x: host.xp.sum((1 + t) * x + bend * x**2)
    return host.xp.sum(solve(objective, host.array([0.3, 0.3]), bounds=(t - 1.0, None)))


def free_and_small(host: RuleHost, size: float, t: Any) -> Any:
    """The sum of x over its size, which is small beside the start, and off the bounds: 2 t."""
    solve = _returning(host, [size, size], {})
    objective = lambda x: host.xp.sum((x - size * t) ** 2)
    return host.xp.sum(solve(objective, host.array([1.0, 1.0]), bounds=(0.0, None))) / size


def _none_of_it(host: RuleHost, options: Any, t: Any) -> Any:
    """The minimum of t x^2 for x >= 0, about."""
    solve = _returning(host, [1e-300, 1e-300], options)
    objective = lambda x: host.xp.sum(t * x**2)
    return host.xp.sum(solve(objective, host.array([0.3, 0.3]), bounds=(0.0, None)))


REFUSED = [
    Refused(
        "degenerate, from inside",
        _on([1 - 1e-5, 1.0], bounds=lambda host: (None, host.array([1.0, 3.0]))),
        "NotASolutionError",
        r"degenerate: the upper bound of x\[0\] is reached with a multiplier of zero",
    ),
    Refused(
        "degenerate",
        _on([1.0, 1.0], bounds=lambda host: (None, host.array([1.0, 3.0]))),
        "NotASolutionError",
        r"degenerate: the upper bound of x\[0\] is reached with a multiplier of zero",
    ),
    Refused(
        "degenerate, where all is zero",
        _none_of_it,
        "NotASolutionError",
        r"degenerate: the lower bound of x\[0\]",
    ),
    Refused(
        "violated",
        _on([1.0, 1.0], bounds=lambda host: (None, host.array([0.5, 3.0]))),
        "NotASolutionError",
        r"violates the upper bound of x\[0\] by",
    ),
    Refused(
        "crossed",
        _on(
            [1.0, 0.5], bounds=lambda host: (host.array([-9.0, 1.0]), 0.5 + host.array([9.0, 0.0]))
        ),
        "NotASolutionError",
        r"nothing lies between the bounds of x\[1\]: expected lower <= upper",
    ),
    Refused(
        "no number",
        _on([1.0, 0.5], bounds=lambda host: (host.array([np.nan, 0.5]), 9.0)),
        "NotASolutionError",
        r"nothing lies between the bounds of x\[0\]",
    ),
    Refused(
        "diverged, between bounds",
        _on([np.nan, 0.5], bounds=lambda host: (None, 0.5)),
        "NotASolutionError",
        "the solver returned a value that is not finite",
    ),
    Refused(
        "violated equality",
        _on([1.0, 1.0], equality=lambda host: lambda x: x[0] + x[1] - 3.0),
        "NotASolutionError",
        "violates the equality constraint",
    ),
    Refused(
        "wrong sign",
        _on([0.0, 1.0], inequality=lambda host: lambda x: x),
        "NotASolutionError",
        r"the multiplier of inequality\[0\] \(-.*\) has the wrong sign",
    ),
    Refused(
        "early",
        _on([0.5, 0.7], bounds=lambda host: (0.0, None)),
        "NotASolutionError",
        "did not converge",
    ),
    Refused(
        "dependent",
        _on(
            [0.5, 0.5],
            equality=lambda host: (
                lambda x: host.xp.stack([x[0] + x[1] - 1, 2 * x[0] + 2 * x[1] - 2])
            ),
        ),
        "SingularError",
        "gradients of the active constraints are not independent",
    ),
]
