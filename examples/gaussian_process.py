"""A Gaussian process classifier: its hyperparameters by the gradient of the Laplace evidence.

    python examples/gaussian_process.py

The evidence of a classifier is approximated around the most probable latent function, which is the
minimum of an inner problem. `argmin` gives the minimum its derivatives, so that the evidence is an
ordinary function of the hyperparameters, its log-determinant included. The mathematics: Rasmussen
and Williams 2006, "Gaussian Processes for Machine Learning", section 3.4.
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from jax import Array

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

keys = jax.random.split(jax.random.key(1))
x = jnp.sort(jax.random.uniform(keys[0], 40, minval=-3.0, maxval=3.0))
label = jnp.sign(jnp.sin(2.0 * x) + 0.5 * jax.random.normal(keys[1], 40))

# %% [markdown]
# The inner problem, in whitened coordinates: the latent function is f = L v with L L^T = K.


# %%
@fv.argmin
def newton(fun, v0):
    step = lambda _, v: v - jnp.linalg.solve(jax.hessian(fun)(v), jax.grad(fun)(v))
    return jax.lax.fori_loop(0, 12, step, v0)


def kernel(a: Array, b: Array, log: Array) -> Array:
    distance = (a[:, None] - b) / jnp.exp(log[0])
    return jnp.exp(2 * log[1] - distance**2 / 2)


def most_probable(log: Array) -> tuple[Array, Array, Array]:
    """(v, L, the log-determinant of the inner Hessian)."""
    factor = jnp.linalg.cholesky(kernel(x, x, log) + 1e-8 * jnp.eye(len(x)))
    surprise = lambda v: jnp.sum(jax.nn.softplus(-label * (factor @ v))) + v @ v / 2
    v = newton(surprise, jnp.zeros(len(x)))  # the lambda captures the factor
    evidence = -surprise(v) - jnp.linalg.slogdet(jax.hessian(surprise)(v))[1] / 2
    return v, factor, evidence


# %% [markdown]
# The outer problem: climb the evidence in the logarithms of length scale and amplitude.

# %%
evidence = jax.jit(lambda log: most_probable(log)[2])
slope = jax.jit(jax.grad(evidence))
log = jnp.log(jnp.array([2.0, 1.0]))
first, before = slope(log), evidence(log)
h = 1e-5
by_difference = jnp.stack(
    [(evidence(log + d) - evidence(log - d)) / (2 * h) for d in h * jnp.eye(2)]
)
error = jnp.linalg.norm(first - by_difference) / jnp.linalg.norm(by_difference)
for _ in range(40):
    log += 0.05 * slope(log)
print(f"log evidence {before:.2f} before, {evidence(log):.2f} after")
print(f"length scale {jnp.exp(log[0]):.2f}, amplitude {jnp.exp(log[1]):.2f}")
print(f"gradient against central differences: relative error {error:.1e}")

# %%
v, factor, _ = most_probable(log)
grid = jnp.linspace(-3.5, 3.5, 200)
across = kernel(grid, x, log) @ jax.scipy.linalg.solve_triangular(factor.T, v)
plt.figure(figsize=(7, 4), layout="constrained")
plt.plot(grid, jax.nn.sigmoid(across), label="probability, at the most probable f")
plt.plot(x, (label + 1) / 2, "|", color="black", markersize=12, label="data")
plt.xlabel("x")
plt.legend()
plt.show()

# %%
if not (error < 1e-7 and evidence(log) > before + 1):
    raise SystemExit("the gradient is off, or the evidence did not rise")
