"""How the plan of a linear program answers to its data: derivatives at a vertex.

    python examples/linear_program.py

Two products are made from three supplies. scipy's HiGHS finds the plan with the largest profit; the
plan lies at a vertex, where as many constraints are active as there are products, and moves with
them. The derivative of the profit by the supplies is what HiGHS calls marginals: the check.
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
from jax import Array

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

NEEDS = jnp.array([[1.0, 2.0], [3.0, 1.0], [1.0, 1.0]])  # supply by product
SUPPLY = jnp.array([14.0, 18.0, 8.5])
PROFIT = jnp.array([4.0, 3.0])


# %%
@fv.argmin
@fv.on_host
def linear_program(objective, x0, *, bounds, inequality):
    """The minimum of an objective and under an inequality that are both linear."""
    return scipy.optimize.linprog(
        objective.grad(x0),
        A_ub=-inequality.jacobian(x0),
        b_ub=inequality(np.zeros_like(x0)),
        bounds=np.stack(bounds, axis=1),
    ).x


def plan(profit: Array, needs: Array, supply: Array) -> Array:
    return linear_program(
        lambda x: -profit @ x,
        jnp.zeros(2),
        bounds=(0.0, None),
        inequality=lambda x: supply - needs @ x,
    )


# %%
x = plan(PROFIT, NEEDS, SUPPLY)
by_supply = jax.jacobian(plan, 2)(PROFIT, NEEDS, SUPPLY)
print("plan", x.round(4))
print("by supply", by_supply.round(4) + 0.0, sep="\n")

best = lambda profit, needs, supply: profit @ plan(profit, needs, supply)
by_profit, by_needs, prices = jax.jit(jax.grad(best, (0, 1, 2)))(PROFIT, NEEDS, SUPPLY)
told = scipy.optimize.linprog(-PROFIT, A_ub=NEEDS, b_ub=SUPPLY)
print("prices of the supplies", prices.round(4), "by HiGHS", -told.ineqlin.marginals)

h = 1e-3
moved = (plan(PROFIT, NEEDS, SUPPLY + h) - plan(PROFIT, NEEDS, SUPPLY - h)) / (2 * h)
checks = {
    "the plan is HiGHS's": jnp.allclose(x, told.x),
    "prices are marginals": jnp.allclose(prices, -told.ineqlin.marginals, atol=1e-12),
    "profit by profit is the plan": jnp.allclose(by_profit, x, atol=1e-12),
    "by needs: price times amount": jnp.allclose(by_needs, -jnp.outer(prices, x), atol=1e-12),
    "the plan moves as by differences": jnp.allclose(by_supply.sum(1), moved, atol=1e-8),
}

# %%
supplies = jnp.linspace(8.0, 24.0, 33)
profits = [best(PROFIT, NEEDS, SUPPLY.at[1].set(supply)) for supply in supplies]
plt.figure(figsize=(7, 4), layout="constrained")
plt.plot(supplies, jnp.stack(profits))
plt.axline((SUPPLY[1], best(PROFIT, NEEDS, SUPPLY)), slope=prices[1], linestyle="--")
plt.gca().set(xlabel="supply of the second kind", ylabel="profit, and its price today")
plt.show()

# %%
for what, holds in checks.items():
    print(f"{what}: {bool(holds)}")
if not all(checks.values()):
    raise SystemExit("a check failed")
