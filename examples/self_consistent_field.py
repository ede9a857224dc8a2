"""Electrons in each other's field: how a self-consistent density answers to the potential.

    python examples/self_consistent_field.py

The density makes the potential in which the electrons move, and their orbitals make the density: a
fixed point. Its derivative by the outer potential is the response of the interacting system, in one
linear solve. The derivative of the energy is known: it is the density (Hellmann and Feynman).
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from jax import Array

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

SITES, PAIRS, REPULSION = 24, 5, 1.0
HOPPING = -(jnp.eye(SITES, k=1) + jnp.eye(SITES, k=-1))


@fv.fixed_point
def mix(fun, density):
    """Half of the old density and half of the new, until they agree."""
    step = lambda _, d: 0.5 * d + 0.5 * fun(d)
    return jax.lax.fori_loop(0, 200, step, density)


# %%
@jax.jit
def ground_state(outer: Array, repulsion: Array) -> tuple[Array, Array]:
    """(density, energy) of pairs of electrons on a chain of sites."""

    def orbitals(density: Array) -> tuple[Array, Array]:
        levels, states = jnp.linalg.eigh(HOPPING + jnp.diag(outer + repulsion * density))
        return levels[:PAIRS], states[:, :PAIRS]

    new_density = lambda density: 2 * jnp.sum(orbitals(density)[1] ** 2, axis=1)
    density = mix(new_density, jnp.full(SITES, 2 * PAIRS / SITES))
    levels, _ = orbitals(density)
    return density, 2 * jnp.sum(levels) - repulsion * jnp.sum(density**2) / 2


# %%
place = jnp.linspace(-1.0, 1.0, SITES)
outer = 2.0 * place**2 + 0.3 * place
density, energy = ground_state(outer, REPULSION)
by_outer = jax.jit(jax.grad(lambda v: ground_state(v, REPULSION)[1]))(outer)
response = jax.jit(jax.jacfwd(lambda v: ground_state(v, REPULSION)[0]))(outer)
alone = jax.jit(jax.jacfwd(lambda v: ground_state(v, 0.0)[0]))(outer)

h = 1e-5
moved = [ground_state(outer.at[8].add(d), REPULSION)[0] for d in (h, -h)]
checks = {
    "slope of the energy: the density": jnp.max(jnp.abs(by_outer - density)),
    "a response keeps the electrons": jnp.max(jnp.abs(jnp.sum(response, axis=0))),
    "and is symmetric": jnp.max(jnp.abs(response - response.T)),
    "and that of a difference": jnp.max(jnp.abs(response[:, 8] - (moved[0] - moved[1]) / (2 * h))),
}
print(f"{2 * PAIRS} electrons, energy {energy:.4f}")
for what, error in checks.items():
    print(f"{what}, to {error:.1e}")

# %%
plt.figure(figsize=(7, 4), layout="constrained")
plt.plot(density, label="density")
plt.plot(response[:, 8], label="response to a push at site 8")
plt.plot(alone[:, 8], "--", label="the same without repulsion")
plt.xlabel("site")
plt.legend()
plt.show()

# %%
if not max(checks.values()) < 1e-7:
    raise SystemExit("a derivative is off")
