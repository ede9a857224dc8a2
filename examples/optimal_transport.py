"""The Hessian of optimal transport, by Sinkhorn's algorithm.

    python examples/optimal_transport.py

The cost of moving one cloud of points onto another, smoothed by entropy, has a gradient that needs
no derivative of the plan: the envelope theorem. Its Hessian needs one. `fixed_point` gives it from
the iteration that Sinkhorn's algorithm repeats, without differentiating the repetitions.
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from jax import Array
from jax.scipy.special import logsumexp

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

N, EPSILON = 12, 0.1
keys = jax.random.split(jax.random.key(0))
x = jax.random.uniform(keys[0], (N, 2))
y = jax.random.uniform(keys[1], (N, 2)) + jnp.array([0.5, 0.0])


@fv.fixed_point
def iterate(fun, f0):
    return jax.lax.fori_loop(0, 500, lambda _, f: fun(f), f0)


# %% [markdown]
# A potential plus a constant is a potential too. Keeping its mean at zero makes it unique.


# %%
def transport(x: Array) -> tuple[Array, Array]:
    """(cost, plan) from the points x to the points y, each of weight 1 / N."""
    cost = jnp.sum((x[:, None] - y) ** 2, axis=-1)
    other = lambda f: -EPSILON * logsumexp((f[:, None] - cost) / EPSILON, axis=0, b=1 / N)

    def sinkhorn(f: Array) -> Array:
        f = -EPSILON * logsumexp((other(f) - cost) / EPSILON, axis=1, b=1 / N)
        return f - jnp.mean(f)

    f = iterate(sinkhorn, jnp.zeros(N))
    g = other(f)
    plan = jnp.exp((f[:, None] + g - cost) / EPSILON) / N**2
    return jnp.mean(f) + jnp.mean(g), plan


# %%
cost, plan = jax.jit(transport)(x)
slope = jax.jit(jax.grad(lambda x: transport(x)[0]))
by_envelope = jax.jit(lambda x: 2 * jnp.einsum("ij,ijk->ik", transport(x)[1], x[:, None] - y))
hessian = jax.jit(jax.jacfwd(by_envelope))(x).reshape(2 * N, 2 * N)
print(f"cost {cost:.4f}; the plan's rows sum to 1 / N to {jnp.max(abs(plan.sum(1) - 1 / N)):.1e}")

direction = jax.random.normal(jax.random.key(2), x.shape)
h = 1e-5
moved = (by_envelope(x + h * direction) - by_envelope(x - h * direction)) / (2 * h)
error = jnp.max(jnp.abs(hessian @ direction.ravel() - moved.ravel()))
skew = jnp.max(jnp.abs(hessian - hessian.T))
first = jnp.max(jnp.abs(slope(x) - by_envelope(x)))
print(f"gradient against the envelope theorem {first:.1e}")
print(f"Hessian along a direction against differences {error:.1e}, and symmetric to {skew:.1e}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for i, j in zip(*jnp.where(plan > 0.1 / N), strict=True):
    left.plot(*jnp.stack([x[i], y[j]], axis=1), color="grey", alpha=float(N * plan[i, j]))
left.plot(*x.T, "o", *y.T, "s")
left.set(title="plan", aspect="equal")
right.imshow(hessian, cmap="RdBu", vmin=-0.2, vmax=0.2)
right.set(title="Hessian by the points")
plt.show()

# %%
if not (first < 1e-8 and error < 1e-6 and skew < 1e-8):
    raise SystemExit("a derivative is off")
