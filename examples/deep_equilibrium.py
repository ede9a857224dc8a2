"""A layer that is a fixed point: train a deep-equilibrium network on the two moons (flax.nnx).

    python examples/deep_equilibrium.py

The layer's output is the state z that a small network maps to itself, z = tanh(W z + U x + b). The
backward pass solves one linear system at the fixed point and stores none of the iterations. The
parameters are those of a flax.nnx module; the lambda captures the module. With equinox:
deep_equilibrium_equinox.py, in PyTorch: torch_deep_equilibrium.py.
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from flax import nnx
from jax import Array
from sklearn.datasets import make_moons

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

WIDTH, STEPS, RATE = 12, 150, 0.6


@fv.fixed_point
def iterate(fun, z0):
    """Apply ``fun`` until nothing moves any more."""
    moves = lambda state: (jnp.max(jnp.abs(state[1] - state[0])) > 1e-10) & (state[2] < 500)
    step = lambda state: (state[1], fun(state[1]), state[2] + 1)
    return jax.lax.while_loop(moves, step, (z0, fun(z0), 0))[1]


# %%
class Network(nnx.Module):
    """A deep-equilibrium layer, and a score on top."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        double = {"param_dtype": jnp.float64, "rngs": rngs}
        self.again = nnx.Param(0.2 * jax.random.normal(rngs.params(), (WIDTH, WIDTH)))
        self.enter = nnx.Linear(2, WIDTH, **double)
        self.leave = nnx.Linear(WIDTH, 1, **double)

    def __call__(self, x: Array) -> Array:
        # Scaled to norm 0.9 at most, the map is a contraction and has one fixed point.
        w = self.again[...] * jnp.minimum(1.0, 0.9 / jnp.linalg.norm(self.again[...]))
        z = iterate(lambda z: jnp.tanh(w @ z + self.enter(x)), jnp.zeros(WIDTH))
        return self.leave(z)[0]


model = Network(nnx.Rngs(0))
static, parameters = nnx.split(model)


@jax.jit
def loss(parameters: nnx.State, x: Array, labels: Array) -> Array:
    scores = jax.vmap(nnx.merge(static, parameters))(x)
    return jnp.mean(jax.nn.softplus(-labels * scores))


# %%
x, labels = make_moons(200, noise=0.1, random_state=0)
x, labels = jnp.asarray(x), jnp.asarray(2.0 * labels - 1.0)
step = jax.jit(jax.value_and_grad(loss))
before, grads = step(parameters, x, labels)
along = lambda t: loss(jax.tree.map(lambda p: p + t, parameters), x, labels)  # all by the same
slope = sum(jnp.sum(g) for g in jax.tree.leaves(grads))
error = abs(slope - (along(1e-5) - along(-1e-5)) / 2e-5) / abs(slope)
for _ in range(STEPS):
    after, grads = step(parameters, x, labels)
    parameters = jax.tree.map(lambda p, g: p - RATE * g, parameters, grads)

score = jax.jit(jax.vmap(nnx.merge(static, parameters)))
right = jnp.mean(jnp.sign(score(x)) == labels)
print(f"loss: {before:.3f} before, {after:.3f} after; accuracy {right:.1%}")
print(f"gradient against a central difference: relative error {error:.1e}")

# %%
across, up = jnp.meshgrid(jnp.linspace(-1.5, 2.5, 60), jnp.linspace(-1.0, 1.5, 40))
height = score(jnp.stack([across.ravel(), up.ravel()], axis=1)).reshape(across.shape)
plt.figure(figsize=(7, 4), layout="constrained")
plt.contourf(across, up, height, cmap="RdBu", levels=12)
plt.scatter(*x.T, c=labels, cmap="RdBu", edgecolors="black", linewidths=0.5)
plt.show()

# %%
if not (right > 0.9 and error < 1e-6):
    raise SystemExit("the network did not learn, or its gradient is off")
