"""A stiff reaction at its steady state: what decides where it comes to rest.

    python examples/stiff_reactor.py

An enzyme E turns S into P by way of a complex C, with rate constants from 1e2 to 1e6. At
rest all rates vanish, which alone says little: two totals, of enzyme and of substrate, stay what
they were at the start. Declared with `conserved`, they complete the equations, and derivatives flow
into the start as well as into the rate constants. scipy's BDF method is the solver.
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import scipy.integrate
from jax import Array

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

RATES = jnp.array([1e6, 1e3, 1e2, 1e3])  # S + E -> C, C -> S + E, C -> P + E, P + E -> C
START = jnp.array([1.0, 1e-2, 0.0, 0.0])  # S, E, C, P in moles per litre


def totals(x: Array) -> Array:
    s, e, c, p = x
    return jnp.stack([e + c, s + c + p])


# %%
@fv.root(conserved=totals, polish=True)
@fv.on_host
def settle(rates, x0):
    solved = scipy.integrate.solve_ivp(
        lambda _, x: rates(x),
        (0.0, 1e6),
        x0,
        method="BDF",
        jac=lambda _, x: rates.jacobian(x),
        rtol=1e-8,
        atol=1e-14,
    )
    return solved.y[:, -1]


@jax.jit
def at_rest(log_rates: Array, start: Array) -> Array:
    k = jnp.exp(log_rates)

    def rates(x: Array) -> Array:
        s, e, c, p = x
        bind, turn = k[0] * s * e - k[1] * c, k[2] * c - k[3] * p * e
        return jnp.stack([-bind, turn - bind, bind - turn, turn])

    return settle(rates, start)


# %% [markdown]
# At rest S E / C and P E / C are ratios of constants, so that P / S = k0 k2 / (k1 k3): the
# logarithm of P / S changes by 1, -1, 1 and -1 with those of the rates.

# %%
log_rates = jnp.log(RATES)
x = at_rest(log_rates, START)
by_rates, by_start = jax.jit(jax.jacrev(at_rest, argnums=(0, 1)))(log_rates, START)
ratio = by_rates[3] / x[3] - by_rates[0] / x[0]
print("S, E, C, P at rest", x)
print("change of log(P / S) by the logarithms of the rates", ratio.round(9))

h = 1e-5
moved = lambda i, d: at_rest(log_rates, START.at[i].add(d))
by_difference = jnp.stack([(moved(i, h) - moved(i, -h)) / (2 * h) for i in (0, 1)], axis=1)
error = jnp.max(jnp.abs(by_start[:, :2] - by_difference))
kept = jnp.max(jnp.abs(jax.jacobian(totals)(x) @ by_start - jax.jacobian(totals)(x)))
exact = jnp.max(jnp.abs(ratio - jnp.array([1.0, -1.0, 1.0, -1.0])))
print(f"against the closed form {exact:.1e}, by the start against differences {error:.1e}")
print(f"totals are kept to {kept:.1e}")

# %%
plt.figure(figsize=(7, 4), layout="constrained")
for i, name in enumerate("SECP"):
    plt.bar(jnp.arange(4) + 0.2 * i, by_rates[i] / x[i], width=0.2, label=name)
plt.xticks(jnp.arange(4) + 0.3, ["S + E > C", "C > S + E", "C > P + E", "P + E > C"])
plt.gca().set(ylabel="relative change per relative change of a rate")
plt.legend()
plt.show()

# %%
if not (exact < 1e-7 and error < 1e-6 and kept < 1e-9):
    raise SystemExit("a sensitivity is off")
