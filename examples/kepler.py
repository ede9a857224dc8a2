"""Kepler's equation for 100,000 orbits at once, and how each position answers to its orbit.

    python examples/kepler.py

Where a planet is at a given time follows from M = E - e sin E, which has no closed solution for the
eccentric anomaly E. `root` differentiates Newton's method for one orbit; `vmap` makes it a hundred
thousand. The derivatives of E have closed forms, against which they are checked.
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from jax import Array

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# Newton's method, from E = pi, converges for every orbit. It is told nothing of e and M: the lambda
# captures them.


# %%
@fv.root
def newton(fun, angle):
    step = lambda _, a: a - fun(a) / jax.grad(fun)(a)
    return jax.lax.fori_loop(0, 15, step, angle)


def anomaly(eccentricity: Array, mean: Array) -> Array:
    return newton(lambda a: a - eccentricity * jnp.sin(a) - mean, jnp.pi)


# %% [markdown]
# Both derivatives of every orbit, in one jitted call.

# %%
keys = jax.random.split(jax.random.key(0))
e = jax.random.uniform(keys[0], 100_000, maxval=0.9)
m = jax.random.uniform(keys[1], 100_000, minval=0.1, maxval=6.2)

all_at_once = jax.jit(jax.vmap(jax.value_and_grad(anomaly, argnums=(0, 1))))
angle, (by_e, by_m) = all_at_once(e, m)
left = jnp.abs(angle - e * jnp.sin(angle) - m)
exact_e = jnp.sin(angle) / (1 - e * jnp.cos(angle))
exact_m = 1 / (1 - e * jnp.cos(angle))
error = max(jnp.max(jnp.abs(by_e - exact_e)), jnp.max(jnp.abs(by_m - exact_m)))
print(f"{len(angle):,} orbits; Kepler's equation holds to {jnp.max(left):.1e}")
print(f"derivatives by e and by M against their closed forms: largest error {error:.1e}")

# %%
some = slice(0, 4000)
x, y = jnp.cos(angle) - e, jnp.sqrt(1 - e**2) * jnp.sin(angle)
plt.figure(figsize=(7, 4.5), layout="constrained")
plt.scatter(x[some], y[some], c=by_m[some], s=3, cmap="viridis", vmin=0.5, vmax=4)
plt.colorbar(label="dE/dM")
plt.plot(0, 0, "o", color="orange", markersize=12)
plt.gca().set(xlabel="x, in semi-major axes", ylabel="y", aspect="equal")
plt.show()

# %%
if not (error < 1e-10 and jnp.max(left) < 1e-12):
    raise SystemExit("a derivative is off")
