"""The hypergradient of the main job (examples/hyperparameters.py), all rules over one inner solver.

``python -m benchmarks.rules NAME STEPS`` prints the memory of one compiled hypergradient in MB.
"""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import freevars.jax as fv
from benchmarks._peers import installed
from benchmarks._table import Row, seconds
from benchmarks._timing import alternate

TITLE = "rules: the hypergradient of 30 regularisers, against the same with a hand-written rule"
SAMPLES, FEATURES, STEPS = 341, 30, 12  # Newton steps

Fit = Callable[[Array], Array]  # log-regularisers -> weights


def data() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Training and validation data of the size of the main job's."""
    keys = jax.random.split(jax.random.key(0), 4)
    truth = jax.random.normal(keys[0], (FEATURES,))

    def draw(key: Array, n: int) -> tuple[Array, Array]:
        features = jax.random.normal(key, (n, FEATURES))
        noise = jax.random.normal(keys[3], (n,))
        return features, jnp.sign(features @ truth + noise)

    return draw(keys[1], SAMPLES), draw(keys[2], 228)


def logistic_loss(w: Array, data: tuple[Array, Array]) -> Array:
    features, labels = data
    return jnp.mean(jax.nn.softplus(-labels * (features @ w)))


def objective(w: Array, log_reg: Array, train: Any) -> Array:
    return logistic_loss(w, train) + jnp.exp(log_reg) @ w**2 / (2 * SAMPLES)


def newton(fun: Any, x0: Array, steps: int = STEPS) -> Array:
    """Full Newton steps; from zero a logistic regression of this size needs eight."""
    step = lambda _, x: x - jnp.linalg.solve(jax.hessian(fun)(x), jax.grad(fun)(x))  # noqa: E731
    return jax.lax.fori_loop(0, steps, step, x0)


def descend(fun: Any, x0: Array, steps: int) -> Array:
    """Gradient descent: one cheap step many times, in a loop that reverse mode can unroll."""
    step = lambda x, _: (x - 0.5 * jax.grad(fun)(x), None)  # noqa: E731
    return jax.lax.scan(step, x0, None, length=steps)[0]


X0 = np.zeros(FEATURES)


def by_hand(train: Any, solver: Callable[..., Array] = newton, **options: Any) -> Fit:
    """The floor: everything explicit, the rule written for this objective."""

    @jax.custom_vjp
    def fit(log_reg: Array, train: Any) -> Array:
        return solver(lambda w: objective(w, log_reg, train), X0, **options)

    def forward(log_reg: Array, train: Any) -> Any:
        w = fit(log_reg, train)
        return w, (w, log_reg, train)

    def backward(saved: Any, w_bar: Array) -> Any:
        w, log_reg, train = saved
        u = -jnp.linalg.solve(jax.hessian(objective)(w, log_reg, train), w_bar)
        pull = jax.vjp(lambda r: jax.grad(objective)(w, r, train), log_reg)[1]
        return *pull(u), None

    fit.defvjp(forward, backward)
    return lambda log_reg: fit(log_reg, train)


def with_rule(solve: Fit, energy: Callable[..., Array], train: Any) -> Fit:
    """A solver with a rule for ``energy(w, log_reg, train)``, of which the backward part is
    compiled alone: what a program can have that is run eagerly."""
    fit = jax.custom_vjp(solve)

    def forward(log_reg: Array) -> Any:
        w = solve(log_reg)
        return w, (w, log_reg)

    @jax.jit
    def backward(saved: Any, w_bar: Array) -> Any:
        w, log_reg = saved
        u = -jnp.linalg.solve(jax.hessian(energy)(w, log_reg, train), w_bar)
        return jax.vjp(lambda r: jax.grad(energy)(w, r, train), log_reg)[1](u)

    fit.defvjp(forward, backward)
    return fit


def ours(train: Any, solver: Callable[..., Array] = newton, **options: Any) -> Fit:
    minimize = fv.argmin(solver, check=options.pop("check", True))
    return lambda log_reg: minimize(lambda w: objective(w, log_reg, train), X0, **options)


def ours_by_partial(train: Any) -> Fit:
    minimize = fv.argmin(newton)
    energy = jax.jit(lambda log_reg, train, w: objective(w, log_reg, train))
    return lambda log_reg: minimize(functools.partial(energy, log_reg, train), X0)


def by_custom_root(train: Any) -> Fit:
    def fit(log_reg: Array) -> Array:
        fun = lambda w: objective(w, log_reg, train)  # noqa: E731
        solve = lambda _, x0: newton(fun, x0)  # noqa: E731
        tangent = lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y)  # noqa: E731
        return jax.lax.custom_root(jax.grad(fun), X0, solve, tangent)

    return fit


def unrolled(train: Any, solver: Callable[..., Array] = newton, **options: Any) -> Fit:
    return lambda log_reg: solver(lambda w: objective(w, log_reg, train), X0, **options)


def peers(train: Any) -> dict[str, Fit]:
    found = {"lax.custom_root": by_custom_root(train), "unrolled": unrolled(train)}
    if installed("jaxopt"):
        import jaxopt

        rule = jaxopt.implicit_diff.custom_root(
            jax.grad(objective), solve=jaxopt.linear_solve.solve_lu
        )
        solver = rule(lambda x0, log_reg, train: newton(lambda w: objective(w, log_reg, train), x0))
        found["jaxopt"] = lambda log_reg: solver(X0, log_reg, train)
    if installed("optimistix"):
        import optimistix

        slope = lambda w, log_reg: jax.grad(objective)(w, log_reg, train)  # noqa: E731
        method = optimistix.Newton(rtol=1e-6, atol=1e-6)
        found["optimistix"] = lambda log_reg: (
            optimistix.root_find(slope, method, X0, log_reg, throw=False).value
        )
    return found


def hypergradient(fit: Fit, valid: Any) -> Callable[[Array], Array]:
    return jax.grad(lambda log_reg: logistic_loss(fit(log_reg), valid))


def ready(f: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(f(*args))


def jitted(train: Any, valid: Any) -> Iterator[Row]:
    log_reg = jnp.zeros(FEATURES)
    others = peers(train)
    fits = {"by hand": by_hand(train), "freevars": ours(train), **others}
    sides = {name: jax.jit(hypergradient(fit, valid)) for name, fit in fits.items()}
    sides["freevars, check=False"] = jax.jit(hypergradient(ours(train, check=False), valid))
    reference = sides["by hand"](log_reg)
    for name, side in sides.items():
        np.testing.assert_allclose(side(log_reg), reference, rtol=2e-2, atol=1e-5, err_msg=name)
    timing = alternate(*(ready(side, log_reg) for side in sides.values()), budget=4.0)
    ratios = dict(zip(sides, timing.ratios, strict=True))
    yield Row(
        "jitted",
        ratios["freevars"],
        1.05,
        seconds(timing.seconds[0]),
        seconds(timing.seconds[1]),
        tuple(list(ratios.items())[2:]),
    )


def eager(train: Any, valid: Any) -> Iterator[Row]:
    log_reg = jnp.zeros(FEATURES)
    fast = jax.jit(hypergradient(ours(train), valid))
    slow = {"freevars": hypergradient(ours(train), valid)}
    slow["lax.custom_root"] = hypergradient(by_custom_root(train), valid)
    slow |= {n: hypergradient(f, valid) for n, f in peers(train).items() if n == "optimistix"}
    partial = hypergradient(ours_by_partial(train), valid)
    solve = jax.jit(lambda log_reg: newton(lambda w: objective(w, log_reg, train), X0))
    hand = hypergradient(with_rule(solve, objective, train), valid)
    w = solve(log_reg)
    loss = lambda _: jax.grad(logistic_loss)(w, valid)  # noqa: E731
    sides = [partial, *slow.values(), loss, hand]
    timing = alternate(ready(fast, log_reg), *(ready(f, log_reg) for f in sides))
    yield Row(
        "eager, a fresh partial of a jitted objective each time, against jitted",
        timing.ratios[1],
        4.0,
        seconds(timing.seconds[0]),
        seconds(timing.seconds[1]),
        (("by hand", timing.ratios[-1]), ("the gradient of the loss alone", timing.ratios[-2])),
    )
    yield Row(
        "eager, a fresh lambda each time, against jitted",
        timing.ratios[2],
        15.0,
        seconds(timing.seconds[0]),
        seconds(timing.seconds[2]),
        tuple(zip(list(slow)[1:], timing.ratios[3:-2], strict=True)),
    )


def forward_mode(train: Any) -> Iterator[Row]:
    log_reg = jnp.zeros(FEATURES)
    fit = ours(train)
    alone = jax.jit(fit)

    def by_hand(log_reg: Array, dot: Array) -> tuple[Array, Array]:
        w = newton(lambda w: objective(w, log_reg, train), X0)
        slope = lambda log_reg: jax.grad(objective)(w, log_reg, train)  # noqa: E731
        b = jax.jvp(slope, (log_reg,), (dot,))[1]
        return w, -jnp.linalg.solve(jax.hessian(objective)(w, log_reg, train), b)

    sides: dict[str, Callable[..., Any]] = {
        name: functools.partial(lambda fit, r, d: jax.jvp(fit, (r,), (d,)), fit)
        for name, fit in {
            "freevars": fit,
            "freevars, check=False": ours(train, check=False),
        }.items()
    }
    sides["by hand"] = by_hand
    dot = log_reg + 1.0
    runs = [ready(jax.jit(side), log_reg, dot) for side in sides.values()]
    for run in runs[1:]:
        np.testing.assert_allclose(run()[1], runs[0]()[1], rtol=2e-2, atol=1e-5)
    timing = alternate(ready(alone, log_reg), *runs)
    yield Row(
        "jvp of a solve, against the solve alone",
        timing.ratios[1],
        1.1,
        seconds(timing.seconds[0]),
        seconds(timing.seconds[1]),
        tuple(zip(list(sides)[1:], timing.ratios[2:], strict=True)),
    )


MEMORY = {"freevars": ours, "unrolled": unrolled}


def compiled_memory(name: str, steps: int) -> float:
    """MB that the compiled hypergradient reserves for what it computes between."""
    train, valid = data()
    fit = MEMORY[name](train, solver=descend, steps=steps)
    compiled = jax.jit(hypergradient(fit, valid)).lower(jnp.zeros(FEATURES)).compile()
    return float(compiled.memory_analysis().temp_size_in_bytes) / 1e6


def memory() -> Iterator[Row]:
    def measured(name: str, steps: int) -> float:
        command = [sys.executable, "-m", "benchmarks.rules", name, str(steps)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(printed.stdout)

    few = measured("freevars", 10)
    for steps in (10, 100, 1000):
        yield Row(
            f"memory, {steps} inner steps, against ours of 10",
            measured("freevars", steps) / few,
            1.05,
            peers=(("unrolled", measured("unrolled", steps) / few),),
        )


def rows() -> Iterator[Row]:
    with jax.enable_x64(True):  # as the main job, and as scipy
        train, valid = data()
        yield from jitted(train, valid)
        yield from eager(train, valid)
        yield from forward_mode(train)
    yield from memory()


if __name__ == "__main__":
    print(compiled_memory(sys.argv[1], int(sys.argv[2])))
