"""A constrained minimum through its optimality conditions: how a portfolio answers to its data.

    python examples/constrained.py

    min  risk(w) / 2 - returns . w   subject to  sum(w) = 1  and  w >= 0.

`argmin` takes constraints from parameters of the solver (`bounds`, `equality`, `inequality`). Here
they are written out, for a solver that finds the multipliers too: a constrained minimum is a root
of its Karush-Kuhn-Tucker conditions, in the weights and the multipliers together; the derivatives
are exact where no limit is about to begin or cease to bind.
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from jax import Array
from jax.flatten_util import ravel_pytree

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

ASSETS = 6


# %%
@fv.root
def newton(fun, x0, steps=20):
    """Newton's method for unknowns of any structure; on a `minimum` it changes the active set."""
    start, to_x = ravel_pytree(x0)
    flat = lambda v: ravel_pytree(fun(to_x(v)))[0]
    step = lambda _, v: v - jnp.linalg.solve(jax.jacfwd(flat)(v), flat(v))
    return to_x(jax.lax.fori_loop(0, steps, step, start))


def portfolio(returns: Array, covariance: Array) -> dict[str, Array]:
    def conditions(x: dict[str, Array]) -> dict[str, Array]:
        return {
            "stationary": covariance @ x["w"]
            - returns
            - x["price of budget"]
            - x["price of limit"],
            "budget": jnp.sum(x["w"]) - 1.0,
            "limit": jnp.minimum(x["w"], x["price of limit"]),  # one of the two is zero
        }

    zeros = jnp.zeros(ASSETS)
    start = {"w": zeros + 1 / ASSETS, "price of budget": jnp.zeros(()), "price of limit": zeros}
    return newton(conditions, start)


# %%
factors = jax.random.normal(jax.random.key(2), (ASSETS, ASSETS))
covariance = factors @ factors.T / ASSETS + 0.2 * jnp.eye(ASSETS)
returns = jnp.linspace(-0.3, 0.3, ASSETS)
x = portfolio(returns, covariance)
by_returns = jax.jit(jax.jacrev(lambda r: portfolio(r, covariance)["w"]))(returns)
print("weights        ", x["w"].round(4))
print("price of limits", x["price of limit"].round(4))
print("change of weights by returns:", by_returns.round(3) + 0.0, sep="\n")


# The value changes by -w for each unit of return: the envelope theorem.
def value(r: Array) -> Array:
    w = portfolio(r, covariance)["w"]
    return w @ covariance @ w / 2 - r @ w


bound = x["w"] < 1e-12
checks = {
    "some limit binds, some does not": 0 < jnp.sum(bound) < ASSETS,
    "the conditions hold": jnp.all(x["w"] >= -1e-12) & jnp.all(x["price of limit"] >= -1e-12),
    "a bound weight stays": jnp.all(jnp.abs(by_returns[bound]) < 1e-12),
    "the weights stay a partition": jnp.all(jnp.abs(jnp.sum(by_returns, 0)) < 1e-12),
    "more return never means less weight": jnp.all(jnp.diag(by_returns) >= 0),
    "envelope theorem": jnp.allclose(jax.grad(value)(returns), -x["w"], atol=1e-12),
}

# %%
plt.figure(figsize=(6, 4), layout="constrained")
plt.imshow(by_returns, cmap="RdBu", vmin=-2, vmax=2)
plt.colorbar(label="change of a weight by a return")
plt.gca().set(xlabel="return of asset", ylabel="weight of asset")
plt.show()

# %%
for what, holds in checks.items():
    print(f"{what}: {bool(holds)}")
if not all(checks.values()):
    raise SystemExit("a check failed")
