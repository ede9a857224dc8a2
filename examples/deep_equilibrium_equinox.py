"""A deep-equilibrium layer as an equinox module.

    python examples/deep_equilibrium_equinox.py

The layer of deep_equilibrium.py: its output is a fixed point, and the backward pass solves one
linear system there. In equinox a module is a pytree; a method that captures `self` captures its
arrays, and their gradients arrive in a module of the same structure.
"""

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from jax import Array
from sklearn.datasets import make_moons

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

WIDTH, STEPS, RATE = 12, 150, 0.3


@fv.fixed_point
def iterate(fun, z0):
    """Apply ``fun`` until nothing moves any more."""
    moves = lambda state: (jnp.max(jnp.abs(state[1] - state[0])) > 1e-10) & (state[2] < 500)
    step = lambda state: (state[1], fun(state[1]), state[2] + 1)
    return jax.lax.while_loop(moves, step, (z0, fun(z0), 0))[1]


# %%
class Network(eqx.Module):
    """A deep-equilibrium layer, and a score on top."""

    again: Array
    enter: eqx.nn.Linear
    leave: eqx.nn.Linear

    def __init__(self, key: Array) -> None:
        keys = jax.random.split(key, 3)
        self.again = 0.2 * jax.random.normal(keys[0], (WIDTH, WIDTH))
        self.enter = eqx.nn.Linear(2, WIDTH, key=keys[1])
        self.leave = eqx.nn.Linear(WIDTH, "scalar", key=keys[2])

    def __call__(self, x: Array) -> Array:
        # Scaled to norm 0.9 at most, the map is a contraction and has one fixed point.
        w = self.again * jnp.minimum(1.0, 0.9 / jnp.linalg.norm(self.again))
        return self.leave(iterate(lambda z: jnp.tanh(w @ z + self.enter(x)), jnp.zeros(WIDTH)))


def loss(model: Network, x: Array, labels: Array) -> Array:
    return jnp.mean(jax.nn.softplus(-labels * jax.vmap(model)(x)))


# %%
x, labels = make_moons(200, noise=0.1, random_state=0)
x, labels = jnp.asarray(x), jnp.asarray(2.0 * labels - 1.0)
model = Network(jax.random.key(0))
step = eqx.filter_jit(eqx.filter_value_and_grad(loss))
before, grads = step(model, x, labels)
moved = lambda t: eqx.apply_updates(model, jax.tree.map(lambda g: jnp.full_like(g, t), grads))
slope = sum(jnp.sum(g) for g in jax.tree.leaves(grads))
by_difference = (loss(moved(1e-5), x, labels) - loss(moved(-1e-5), x, labels)) / 2e-5
error = abs(slope - by_difference) / abs(slope)

losses = []
for _ in range(STEPS):
    after, grads = step(model, x, labels)
    losses.append(float(after))
    model = eqx.apply_updates(model, jax.tree.map(lambda g: -RATE * g, grads))
right = jnp.mean(jnp.sign(jax.vmap(model)(x)) == labels)
print(f"loss: {before:.3f} before, {after:.3f} after; accuracy {right:.1%}")
print(f"gradient against a central difference: relative error {error:.1e}")

# %%
plt.figure(figsize=(7, 3.5), layout="constrained")
plt.plot(losses)
plt.gca().set(xlabel="step", ylabel="loss")
plt.show()

# %%
if not (right > 0.8 and error < 1e-6):
    raise SystemExit("the network did not learn, or its gradient is off")
