"""How Robertson's kinetics answer to their rate constants: a stiff equation by scipy's `solve_ivp`.

    python examples/robertson.py

Three rate constants lie nine orders of magnitude apart, and so do the times: the equation on which
stiff solvers are tried. The rates of the field are captured, and the solver, BDF, is given its
exact Jacobian. Backwards the equation is unstable, so the backward pass solves for sensitivities,
forwards. Checks: conserved mass, another method, finite differences, and both modes.

Source: Robertson 1966, "The solution of a set of reaction rate equations".
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import Array

from freevars.jax.scipy import solve_ivp

jax.config.update("jax_enable_x64", True)

RATES = jnp.array([0.04, 1e4, 3e7])
TIMES = jnp.geomspace(0.4, 4000.0, 9)


# %%
def amounts(rates: Array, method: str = "BDF") -> Array:
    """Float[species times]."""

    def field(_: Array, y: Array) -> Array:
        slow, back, fast = rates[0] * y[0], rates[1] * y[1] * y[2], rates[2] * y[1] ** 2
        return jnp.stack([back - slow, slow - back - fast, fast])

    return solve_ivp(
        field,
        (0.0, 4000.0),
        jnp.array([1.0, 0.0, 0.0]),
        method,
        TIMES,
        rtol=1e-8,
        atol=np.array([1e-10, 1e-14, 1e-10]),
        reverse="sensitivities",
    ).y


def yield_by(logarithms: Array) -> Array:
    """How much of the third species there is at the end."""
    return amounts(jnp.exp(logarithms))[2, -1]


# %%
y = amounts(RATES)
print("first species", y[0].round(6))
logarithms = jnp.log(RATES)
by_reverse = jax.jit(jax.grad(yield_by))(logarithms)
by_forward = jax.jvp(yield_by, (logarithms,), (jnp.ones(3),))[1]
print("the yield by the logarithm of each rate", by_reverse.round(6))

h = 1e-3
moved = [yield_by(logarithms + s * h * jnp.array([0.0, 0.0, 1.0])) for s in (1, -1)]
by_difference = (moved[0] - moved[1]) / (2 * h)
checks = {
    "mass is conserved": jnp.allclose(y.sum(0), 1.0, atol=1e-9),
    "Radau's method agrees": jnp.allclose(y, amounts(RATES, "Radau"), rtol=1e-5),
    "the derivative is that by differences": jnp.allclose(by_reverse[2], by_difference, rtol=1e-4),
    "forward and reverse mode agree": jnp.allclose(by_reverse.sum(), by_forward, rtol=1e-5),
    # Scaling all rates is scaling time.
    "faster rates are a later time": jnp.allclose(
        by_forward,
        TIMES[-1] * 0.04 * y[0, -1] - TIMES[-1] * 1e4 * y[1, -1] * y[2, -1],
        rtol=1e-3,
    ),
}

# %%
plt.figure(figsize=(7, 4), layout="constrained")
plt.plot(TIMES, y[0], "o-", label="first species")
plt.plot(TIMES, 1e4 * y[1], "o-", label="second species, times 10,000")
plt.plot(TIMES, y[2], "o-", label="third species")
plt.xscale("log")
plt.xlabel("time")
plt.legend()
plt.show()

# %%
for what, holds in checks.items():
    print(f"{what}: {bool(holds)}")
if not all(checks.values()):
    raise SystemExit("a check failed")
