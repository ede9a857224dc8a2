"""The hypergradient of the main job with scipy on the host, called eagerly.

The same data, objective and solver as in examples/hyperparameters.py, against a rule written by
hand around the same call of scipy. The hand-written side compiles its gradient once, from explicit
arguments. Ours takes the objective as users write it, a lambda made afresh for each call; whatever
is not compiled in it has to be traced once more each time, which the first row shows and the second
avoids. The third takes a partial of a jitted objective, which is not traced at all, and the fourth
the same by `freevars.jax.scipy.minimize`, which adds a Newton step and the value at the minimum.
Two rows before them are about batches.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import Array
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import freevars.jax as fv
from benchmarks._table import Row, seconds
from benchmarks._timing import alternate
from benchmarks.rules import with_rule

TITLE = "host: the hypergradient of the main job through scipy, eager, against a hand-written rule"

Data = tuple[Array, Array]
Fit = Callable[[Array], Array]  # log-regularisers -> weights
FARTHEST = {"gtol": 1e-12, "ftol": 0.0, "maxcor": 30}  # as the main job: 46 evaluations
NEAR = {"gtol": 1e-6, "ftol": 0.0}  # as short as the rule accepts: 30


def load() -> tuple[Data, Data]:
    """(train, validation), each (standardised features [n, 30], label -1 or +1 [n])."""
    features, labels = load_breast_cancer(return_X_y=True)
    train_x, valid_x, train_y, valid_y = train_test_split(
        features, 2 * labels - 1, test_size=0.4, stratify=labels, random_state=0
    )
    scaler = StandardScaler().fit(train_x)
    train = jnp.asarray(scaler.transform(train_x)), jnp.asarray(train_y)
    return train, (jnp.asarray(scaler.transform(valid_x)), jnp.asarray(valid_y))


def logistic_loss(weights: Array, data: Data) -> Array:
    x, y = data
    return jnp.mean(jax.nn.softplus(-y * (x @ weights[:-1] + weights[-1])))


def objective(w: Array, log_reg: Array, train: Data) -> Array:
    return logistic_loss(w, train) + jnp.exp(log_reg) @ w[:-1] ** 2 / (2 * len(train[1]))


def lbfgs(value_and_grad: Callable[[Any], Any], x0: Any, options: dict[str, float]) -> Any:
    found = scipy.optimize.minimize(
        value_and_grad, x0, jac=True, method="L-BFGS-B", options=options
    )
    return found.x


def solve_by_hand(train: Data, options: dict[str, float]) -> Fit:
    value_and_grad = jax.jit(jax.value_and_grad(objective))
    x0 = np.zeros(train[0].shape[1] + 1)

    def solve(log_reg: Array) -> Array:
        def f(v: Any) -> Any:
            value, slope = value_and_grad(v, log_reg, train)
            return float(value), np.asarray(slope)

        return jnp.asarray(lbfgs(f, x0, options))

    return solve


def by_hand(train: Data, options: dict[str, float]) -> Fit:
    return with_rule(solve_by_hand(train, options), objective, train)


def polished_by_hand(train: Data, options: dict[str, float]) -> Fit:
    solve = solve_by_hand(train, options)

    @jax.jit
    def step(w: Array, log_reg: Array) -> tuple[Array, Array]:
        slope, curvature = jax.grad(objective), jax.hessian(objective)
        w = w - jnp.linalg.solve(curvature(w, log_reg, train), slope(w, log_reg, train))
        return w, objective(w, log_reg, train)

    return lambda log_reg: step(solve(log_reg), log_reg)[0]


def in_both_modes(solve: Fit, train: Data) -> Fit:
    fit = jax.custom_jvp(solve)

    @jax.jit
    def push(w: Array, log_reg: Array, dot: Array) -> Array:
        gradient = lambda r: jax.grad(objective)(w, r, train)  # noqa: E731
        pushed = jax.jvp(gradient, (log_reg,), (dot,))[1]
        return -jnp.linalg.solve(jax.hessian(objective)(w, log_reg, train), pushed)

    @fit.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        w = fit(*primals)
        return w, push(w, *primals, *tangents)

    return fit


def ours(train: Data, options: dict[str, float], energy: Any = objective) -> Fit:
    minimize = fv.argmin(fv.on_host(lambda fun, x0: lbfgs(fun.value_and_grad, x0, options)))
    x0 = jnp.zeros(train[0].shape[1] + 1)
    return lambda log_reg: minimize(lambda w: energy(w, log_reg, train), x0)


def ours_by_partial(train: Data, options: dict[str, float]) -> Fit:
    minimize = fv.argmin(fv.on_host(lambda fun, x0: lbfgs(fun.value_and_grad, x0, options)))
    x0 = jnp.zeros(train[0].shape[1] + 1)
    energy = jax.jit(lambda log_reg, train, w: objective(w, log_reg, train))
    return lambda log_reg: minimize(functools.partial(energy, log_reg, train), x0)


def ours_by_scipy(train: Data, options: dict[str, float]) -> Fit:
    """The same by `freevars.jax.scipy.minimize`, which polishes."""
    x0 = jnp.zeros(train[0].shape[1] + 1)
    energy = jax.jit(lambda log_reg, train, w: objective(w, log_reg, train))
    how: dict[str, Any] = {"method": "L-BFGS-B", "options": options}
    return lambda r: fv.scipy.minimize(functools.partial(energy, r, train), x0, **how).x


def with_a_trace(fit: Fit, train: Data) -> Fit:
    x0 = jnp.zeros(train[0].shape[1] + 1)

    def traced(log_reg: Array) -> Array:
        jax.make_jaxpr(lambda w: objective(w, log_reg, train))(x0)
        return fit(log_reg)

    return traced


def kepler(angle: Any, mean: Any) -> Any:
    return angle - 0.3 * jnp.sin(angle) - mean


def brackets() -> Row:
    """Many roots by brentq, against a loop of NumPy that calls a jitted function."""
    means = np.linspace(0.1, 3.0, 500)
    f = jax.jit(kepler)

    def loop() -> Any:
        return [scipy.optimize.brentq(lambda x, m=m: float(f(x, m)), m - 1, m + 1) for m in means]

    def one(mean: Any) -> Any:
        own = lambda x: kepler(x, mean)  # noqa: E731
        return fv.scipy.root_scalar(own, bracket=(mean - 1, mean + 1)).root

    batch = jax.jit(jax.vmap(one))
    ours = lambda: jax.block_until_ready(batch(means))  # noqa: E731
    np.testing.assert_allclose(ours(), loop(), rtol=1e-9)
    timing = alternate(loop, ours, budget=6.0)
    base, own = map(seconds, timing.seconds)
    return Row("brentq on a batch of 500, vmap", timing.ratios[1], 10.0, base, own)


def together() -> Row:
    """A solver that takes batches, against one solve after the other."""
    means = jnp.linspace(0.1, 3.0, 200)

    def newton(fun: Any, x0: Any) -> Any:
        x = x0
        for _ in range(8):
            x = x - fun(x) / fun.hvp(x, np.ones_like(x))
        return x

    def side(how: Any) -> Callable[[], Any]:
        solver = fv.root(fv.on_host(newton, vmap=how))
        batch = jax.jit(jax.vmap(lambda m: solver(lambda x: kepler(x, m), m[None])))
        return lambda: jax.block_until_ready(batch(means))

    timing = alternate(side("sequential"), side("whole"), budget=4.0)
    base, own = map(seconds, timing.seconds)
    return Row('a batch of 200 with vmap="whole"', timing.ratios[1], 0.1, base, own)


def rows() -> Iterator[Row]:
    with jax.enable_x64(True):  # as the main job, and as scipy
        yield brackets()
        yield together()
        train, valid = load()
        log_reg = jnp.zeros(train[0].shape[1])

        def hypergradient(fit: Fit) -> Callable[[], Any]:
            gradient = jax.grad(lambda log_reg: logistic_loss(fit(log_reg), valid))
            return lambda: jax.block_until_ready(gradient(log_reg))

        for name, options in (("the main job", FARTHEST), ("as short as accepted", NEAR)):
            hand = by_hand(train, options)
            both = in_both_modes(solve_by_hand(train, options), train)
            fits = [
                hand,
                ours(train, options),
                ours(train, options, jax.jit(objective)),
                ours_by_partial(train, options),
                ours_by_scipy(train, options),
                with_a_trace(hand, train),
                with_a_trace(both, train),
                both,
                in_both_modes(polished_by_hand(train, options), train),
            ]
            sides = [hypergradient(fit) for fit in fits]
            reference = sides[0]()
            for side in sides[1:]:  # one of them polishes x
                atol = 1e-3 * np.max(np.abs(reference))
                np.testing.assert_allclose(side(), reference, rtol=1e-3, atol=atol)
            timing = alternate(*sides, budget=6.0)
            base, first, second, third, fourth, *_ = map(seconds, timing.seconds)
            names = ("by hand and a trace of the lambda", "the same with a rule for both modes")
            peers = tuple(zip(names, timing.ratios[5:7], strict=True))
            alone = (("by hand, a rule for both modes", timing.ratios[7]),)
            polished = (("by hand, a rule for both modes, polished", timing.ratios[8]),)
            yield Row(name, timing.ratios[1], 1.2, base, first, peers)
            yield Row(f"{name}, the objective jitted", timing.ratios[2], 1.2, base, second)
            yield Row(f"{name}, a partial of it", timing.ratios[3], 1.1, base, third, alone)
            by_scipy = f"{name}, by fv.scipy.minimize"
            yield Row(by_scipy, timing.ratios[4], 1.1, base, fourth, polished)
