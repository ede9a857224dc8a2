"""A solver with a derivative rule written by hand: what ``fv.Closure`` alone is good for.

    python examples/custom_rule.py

The job is that of hyperparameters.py, where ``fv.argmin`` brings the rule. Here the solver and its
rule are the example's own, with ``jax.custom_vjp``. The solver is generic: it is handed a function,
and cannot know that this function was made from data and regularisers. ``fv.Closure`` makes the
captured values visible, so that the rule, written once, differentiates by whatever the objective
captured.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from tqdm import trange

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

# --- A solver of our own, and its derivative rule -------------------------------------------------


@jax.custom_vjp
def minimize(objective: fv.Closure, x0: Array) -> Array:
    """The minimiser of a strictly convex ``objective``, from ``x0``, by a damped Newton method."""

    def is_unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, decrement, count = state
        return (decrement > 1e-20) & (count < 100)

    def newton_step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x, _, count = state
        slope = jax.grad(objective)(x)
        step = -jnp.linalg.solve(jax.hessian(objective)(x), slope)
        # Halve the step until the objective falls; near the minimum rounding hides any fall, and
        # the whole step is right there.
        sizes = 0.5 ** jnp.arange(12)
        heights = jax.vmap(lambda size: objective(x + size * step))(sizes)
        falls = heights <= objective(x) + 1e-4 * sizes * (slope @ step) + 1e-12
        return x + sizes[jnp.argmax(falls)] * step, -slope @ step, count + 1

    return jax.lax.while_loop(is_unfinished, newton_step, (x0, jnp.inf, 0))[0]


def minimize_forward(objective: fv.Closure, x0: Array) -> tuple[Array, tuple[fv.Closure, Array]]:
    x = minimize(objective, x0)
    return x, (objective, x)


def minimize_backward(saved: tuple[fv.Closure, Array], x_bar: Array) -> tuple[fv.Closure, Array]:
    """At the minimum the gradient is zero whatever the captured values c are: differentiating
    g(x(c), c) = 0 gives dx/dc = -H^-1 dg/dc, and this is its transpose applied to ``x_bar``."""
    objective, x = saved
    u = -jnp.linalg.solve(jax.hessian(objective)(x), x_bar)
    _, pull_back = jax.vjp(lambda objective: jax.grad(objective)(x), objective)
    (objective_bar,) = pull_back(u)
    return objective_bar, jnp.zeros_like(x)


minimize.defvjp(minimize_forward, minimize_backward)

# --- The job --------------------------------------------------------------------------------------


def load() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(train, validation), each (standardised features [n, 30], label -1 or +1 [n])."""
    features, labels = load_breast_cancer(return_X_y=True)
    train_x, valid_x, train_y, valid_y = train_test_split(
        features, 2 * labels - 1, test_size=0.4, stratify=labels, random_state=0
    )
    scaler = StandardScaler().fit(train_x)
    train = jnp.asarray(scaler.transform(train_x)), jnp.asarray(train_y)
    valid = jnp.asarray(scaler.transform(valid_x)), jnp.asarray(valid_y)
    return train, valid


def logistic_loss(weights: Array, data: tuple[Array, Array]) -> Array:
    """Mean of log(1 + exp(-y (x.w + b))); the last entry of ``weights`` is the bias b."""
    x, y = data
    return jnp.mean(jax.nn.softplus(-y * (x @ weights[:-1] + weights[-1])))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="outer gradient steps")
    parser.add_argument("--rate", type=float, default=100.0, help="outer step size")
    parser.add_argument("--plot", type=Path, default=Path("out/custom_rule.png"))
    options = parser.parse_args()

    train, valid = load()
    n_train, n_features = train[0].shape
    start = jnp.zeros(n_features + 1)

    def fit(log_reg: Array) -> Array:
        """The weights for these log-regularisers; zeros are scikit-learn's default (C = 1)."""
        ridge = jnp.exp(log_reg) / (2 * n_train)
        objective = lambda w: logistic_loss(w, train) + ridge @ w[:-1] ** 2
        return minimize(fv.Closure(objective, start), start)

    validation_loss = jax.jit(lambda log_reg: logistic_loss(fit(log_reg), valid))
    loss_and_hypergradient = jax.jit(jax.value_and_grad(validation_loss))

    log_reg = jnp.zeros(n_features)
    before, hypergradient = loss_and_hypergradient(log_reg)
    finite = jnp.stack(
        [
            (validation_loss(log_reg + shift) - validation_loss(log_reg - shift)) / 2e-4
            for shift in 1e-4 * jnp.eye(n_features)
        ]
    )
    error = jnp.linalg.norm(hypergradient - finite) / jnp.linalg.norm(finite)

    losses = []
    began = time.perf_counter()
    for _ in trange(options.steps, desc="tuning", unit="step"):
        loss, hypergradient = loss_and_hypergradient(log_reg)
        losses.append(float(loss))
        log_reg -= options.rate * hypergradient
    milliseconds = 1e3 * (time.perf_counter() - began) / options.steps
    after = float(validation_loss(log_reg))

    print(f"hypergradient against central differences: relative error {error:.1e}")
    print(f"validation loss: {before:.4f} before, {after:.4f} after {options.steps} steps")
    print(f"time per step: {milliseconds:.2f} ms")

    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([*losses, after])
    left.set(xlabel="outer step", ylabel="validation loss")
    right.barh(load_breast_cancer().feature_names, log_reg)
    right.set(xlabel="log-regulariser")
    right.tick_params(axis="y", labelsize=7)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot, dpi=150)
    print(f"plot: {options.plot}")
    if not (error < 1e-5 and after < before):
        raise SystemExit("the hypergradient is off by more than 1e-5, or tuning did not help")


if __name__ == "__main__":
    main()
