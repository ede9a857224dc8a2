"""A portfolio by a quadratic-programming library, and how it answers to its data.

    python examples/portfolio.py

Clarabel, an interior-point solver in Rust, is the solver of a decorated function. It is handed the
matrices of a quadratic program, read off an objective and constraints that are plain functions.
Derivatives flow into everything that these capture: returns, covariance, the cap.
"""

# %%
import clarabel
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse
from jax import Array

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# The solver, for any convex quadratic objective and affine constraints.


# %%
@fv.argmin
@fv.on_host
def quadratic_program(objective, x0, *, bounds, equality):
    curvature = objective.hessian(x0)
    slope = objective.grad(x0) - curvature @ x0
    rows, lower, upper = equality.jacobian(x0), *bounds
    here = np.eye(len(x0))
    a = scipy.sparse.csc_matrix(np.concatenate([rows, -here, here]))
    b = np.concatenate([rows @ x0 - equality(x0), -lower, upper])
    cones = [clarabel.ZeroConeT(len(rows)), clarabel.NonnegativeConeT(2 * len(x0))]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    p = scipy.sparse.csc_matrix(np.triu(curvature))
    return np.array(clarabel.DefaultSolver(p, slope, a, b, cones, settings).solve().x)


# %%
ASSETS = 8
factors = jax.random.normal(jax.random.key(3), (ASSETS, ASSETS))
COVARIANCE = factors @ factors.T / ASSETS + 0.1 * jnp.eye(ASSETS)
RETURNS = jnp.linspace(0.02, 0.3, ASSETS)


@jax.jit
def portfolio(returns: Array, caution: Array, cap: Array) -> Array:
    return quadratic_program(
        lambda w: caution * w @ COVARIANCE @ w / 2 - returns @ w,
        jnp.full(ASSETS, 1 / ASSETS),
        bounds=(0.0, cap),
        equality=lambda w: jnp.sum(w)[None] - 1.0,
    )


# %%
at = (RETURNS, jnp.array(0.5), jnp.array(0.35))
weights = portfolio(*at)
by_returns, by_caution, by_cap = jax.jit(jax.jacrev(portfolio, argnums=(0, 1, 2)))(*at)
print("weights", weights.round(3))
print("by the cap", by_cap.round(3) + 0.0)

h = 1e-4
moved = lambda i, d: portfolio(*(a + d if k == i else a for k, a in enumerate(at)))
differences = [(moved(i, h) - moved(i, -h)) / (2 * h) for i in (1, 2)]
error = max(
    jnp.max(jnp.abs(by_caution - differences[0])), jnp.max(jnp.abs(by_cap - differences[1]))
)
kept = jnp.max(jnp.abs(jnp.sum(by_returns, axis=0)))
print(f"against central differences: {error:.1e}; the budget is kept to {kept:.1e}")

# %%
scale = jnp.geomspace(0.1, 10.0, 12)
path = jnp.stack([portfolio(RETURNS, c, at[2]) for c in scale])
plt.figure(figsize=(7, 4), layout="constrained")
plt.stackplot(scale, path.T, alpha=0.8)
plt.xscale("log")
plt.gca().set(xlabel="caution", ylabel="weights", ylim=(0, 1))
plt.show()

# %%
if not (error < 1e-6 and kept < 1e-9):
    raise SystemExit("a derivative is off")
