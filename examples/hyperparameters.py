"""Tune one regulariser per feature of a logistic regression by gradient descent.

    python examples/hyperparameters.py

Two problems are nested. The inner one fits the weights to training data for given regularisers,
with scipy's L-BFGS-B; the outer one moves the regularisers so that the fitted weights do well on
validation data. The gradient of the outer problem passes through the inner solver by the implicit
function theorem: ``fv.scipy.minimize`` is scipy's, with derivatives by whatever the objective
captured.
"""

import argparse
import time
from collections.abc import Callable
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


METHOD = "L-BFGS-B"
OPTIONS = {"gtol": 1e-12, "ftol": 0.0, "maxcor": 30}  # as far as it goes


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


def difference(f: Callable[[Array], Array], x: Array, h: Array) -> Array:
    """The derivative of ``f`` at ``x`` per step ``h``, from four values."""
    near, far = f(x + h) - f(x - h), f(x + 2 * h) - f(x - 2 * h)
    return (8 * near - far) / (12 * jnp.sum(h))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="outer gradient steps")
    parser.add_argument("--rate", type=float, default=100.0, help="outer step size")
    parser.add_argument("--plot", type=Path, default=Path("out/hyperparameters.png"))
    options = parser.parse_args()

    train, valid = load()
    n_train, n_features = train[0].shape
    start = jnp.zeros(n_features + 1)

    def fit(log_reg: Array) -> Array:
        """The weights for these log-regularisers; zeros are scikit-learn's default (C = 1)."""
        ridge = jnp.exp(log_reg) / (2 * n_train)
        objective = lambda w: logistic_loss(w, train) + ridge @ w[:-1] ** 2
        return fv.scipy.minimize(objective, start, method=METHOD, options=OPTIONS).x

    def validation_loss(log_reg: Array) -> Array:
        return logistic_loss(fit(log_reg), valid)

    loss_and_hypergradient = jax.value_and_grad(validation_loss)  # no jit: scipy is called directly
    log_reg = jnp.zeros(n_features)
    before, hypergradient = loss_and_hypergradient(log_reg)
    # Of fourth order, with wide steps: L-BFGS-B leaves an error of about 1e-8 in the weights.
    finite = jnp.stack(
        [difference(validation_loss, log_reg, h) for h in 0.05 * jnp.eye(n_features)]
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
