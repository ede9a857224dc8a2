"""Learning to learn: a prior from which a few examples suffice (implicit MAML).

    python examples/implicit_maml.py

Each task is a sine of its own, seen at six points. A task is learned by pulling the weights of a
model from the prior towards its data until they rest, and the prior is judged by what the learned
weights predict elsewhere. `argmin` gives the gradient of that by the prior, however many inner
steps were taken. The method: Rajeswaran et al. 2019, "Meta-Learning with Implicit Gradients".
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from jax import Array

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

FEATURES, TASKS, SHOTS, RATE = 20, 16, 6, 0.5
FREQUENCIES = jnp.linspace(0.2, 2.0, FEATURES // 2)


def model(weights: Array, x: Array) -> Array:
    angle = x[:, None] * FREQUENCIES
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1) @ weights


def tasks(key: Array, shots: int) -> tuple[Array, Array]:
    """Sines of one family: (points, values), each (TASKS, shots)."""
    keys = jax.random.split(key, 3)
    x = jax.random.uniform(keys[0], (TASKS, shots), minval=-4.0, maxval=4.0)
    height = jax.random.uniform(keys[1], (TASKS, 1), minval=0.3, maxval=0.9)
    phase = jax.random.uniform(keys[2], (TASKS, 1), maxval=1.0)
    return x, height * jnp.sin(x + phase)


# %%
@fv.argmin
def learn(fun, weights):
    newton = lambda w: w - jnp.linalg.solve(jax.hessian(fun)(w), jax.grad(fun)(w))
    return newton(newton(weights))  # the second step is for rounding


Prior = dict[str, Array]  # where the weights begin, and how strongly each is held there


def adapt(prior: Prior, x: Array, y: Array) -> Array:
    def loss(w: Array) -> Array:
        pull = jnp.exp(prior["log strength"]) @ (w - prior["mean"]) ** 2
        return jnp.sum((model(w, x) - y) ** 2) + pull

    return learn(loss, jax.lax.stop_gradient(prior["mean"]))


def mistakes(prior: Prior, seen: tuple[Array, Array], asked: tuple[Array, Array]) -> Array:
    weights = jax.vmap(adapt, (None, 0, 0))(prior, *seen)
    return jnp.mean((jax.vmap(model)(weights, asked[0]) - asked[1]) ** 2)


# %%
def sample(key: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    x, y = tasks(key, SHOTS + 20)
    return (x[:, :SHOTS], y[:, :SHOTS]), (x[:, SHOTS:], y[:, SHOTS:])


step = jax.jit(jax.value_and_grad(mistakes))
prior = {"mean": jnp.zeros(FEATURES), "log strength": jnp.zeros(FEATURES)}
unseen = sample(jax.random.key(100))
before, grads = step(prior, *unseen)
along = lambda t: step(jax.tree.map(lambda p: p + t, prior), *unseen)[0]  # all by the same
slope = sum(jnp.sum(g) for g in jax.tree.leaves(grads))
error = abs(slope - (along(1e-5) - along(-1e-5)) / 2e-5) / abs(slope)
for key in jax.random.split(jax.random.key(0), 100):
    _, grads = step(prior, *sample(key))
    prior = jax.tree.map(lambda p, g: p - RATE * g, prior, grads)
after = step(prior, *unseen)[0]
print(f"squared error on unseen tasks: {before:.4f} before, {after:.4f} after")
print(f"meta-gradient against a central difference: relative error {error:.1e}")

# %%
grid, (seen, asked) = jnp.linspace(-4.0, 4.0, 100), unseen
figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
for i, axis in enumerate(axes):
    axis.plot(*(a[i] for a in asked), ".", color="lightgrey")
    axis.plot(*(a[i] for a in seen), "ko")
    axis.plot(grid, model(adapt(prior, seen[0][i], seen[1][i]), grid))
plt.show()

# %%
if not (after < 0.7 * before and error < 1e-6):
    raise SystemExit("the prior did not improve, or its gradient is off")
