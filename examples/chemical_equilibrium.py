"""How an equilibrium of a chemical reaction answers to its conditions: all sensitivities at once.

    python examples/chemical_equilibrium.py

The water-gas shift CO + H2O <-> CO2 + H2 over hot carbon, 2 CO <-> C + CO2. The unknowns are the
extents of both; the equations say that each reaction is balanced. One decorator gives the
derivatives by temperature, by the feed and by the data of the reactions, none of which the solver
knows about.
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from jax import Array

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

# log K = a + b / T for each reaction, around 1000 K.
REACTIONS = {"a": jnp.array([-3.97, -20.9]), "b": jnp.array([4400.0, 20000.0])}
FEED = jnp.array([1.0, 2.0, 0.1, 0.1])  # moles of CO, H2O, CO2, H2
CHANGES = jnp.array([[-1.0, -1.0, 1.0, 1.0], [-2.0, 0.0, 1.0, 0.0]])


# %%
@fv.root
def newton(fun, x0, steps=30):
    """A damped Newton method."""

    def step(_: int, x: Array) -> Array:
        full = jnp.linalg.solve(jax.jacfwd(fun)(x), fun(x))
        return x - full * jnp.minimum(1.0, 0.1 / jnp.max(jnp.abs(full)))

    return jax.lax.fori_loop(0, steps, step, x0)


def moles(temperature: Array, feed: Array, reactions: dict[str, Array]) -> Array:
    def imbalance(extents: Array) -> Array:
        amounts = feed + extents @ CHANGES
        log_fractions = jnp.log(amounts / jnp.sum(amounts))
        return CHANGES @ log_fractions - reactions["a"] - reactions["b"] / temperature

    return feed + newton(imbalance, jnp.array([0.3, 0.05])) @ CHANGES


# %%
at = (jnp.array(1000.0), FEED, REACTIONS)
amounts = moles(*at)
by_all = jax.jit(jax.jacrev(moles, argnums=(0, 1, 2)))(*at)
print("species", ["CO", "H2O", "CO2", "H2"])
print("moles               ", amounts.round(4))
print("change per kelvin   ", by_all[0].round(6))
print("per mole of steam   ", by_all[1][:, 1].round(4))
print("per unit of log K_1 ", by_all[2]["a"][:, 0].round(4))

by_feed = lambda feed: moles(at[0], feed, REACTIONS)
differences = [(by_feed(FEED + h) - by_feed(FEED - h)) / 2e-6 for h in 1e-6 * jnp.eye(4)]
error = jnp.max(jnp.abs(by_all[1] - jnp.stack(differences, axis=1)))
atoms = jnp.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])  # C in gas, H2 in H2O and H2
kept = jnp.abs(atoms[1] @ by_all[1] - atoms[1])  # a mole of H2 fed is a mole of H2 found
print(f"against differences: {error:.1e}; hydrogen kept to {jnp.max(kept):.1e}")

# %%
kelvin = jnp.linspace(850.0, 1200.0, 60)
plt.figure(figsize=(7, 4), layout="constrained")
plt.plot(kelvin, jax.vmap(lambda t: moles(t, FEED, REACTIONS))(kelvin))
plt.gca().set(xlabel="temperature, K", ylabel="moles at equilibrium")
plt.legend(["CO", "H2O", "CO2", "H2"])
plt.show()

# %%
if not (error < 1e-7 and jnp.max(kept) < 1e-10):
    raise SystemExit("a sensitivity is off")
