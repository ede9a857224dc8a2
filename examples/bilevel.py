"""A bilevel problem inside a bilevel problem: who sets the toll, who picks the road, who queues.

    python examples/bilevel.py

Drivers split over two roads so that no one gains by switching (a root). A company chooses the toll
of one road to earn the most, knowing how drivers react (a minimum over a root). A city chooses how
wide to build the other road, knowing what the company will charge (a gradient through both).
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from jax import Array

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)


# %%
@fv.root
def newton(fun, x0, steps=12):
    return jax.lax.fori_loop(0, steps, lambda _, x: x - fun(x) / jax.grad(fun)(x), x0)


@fv.argmin
def newton_minimum(fun, x0, steps=12):
    slope = jax.grad(fun)
    return jax.lax.fori_loop(0, steps, lambda _, x: x - slope(x) / jax.grad(slope)(x), x0)


def share(toll: Array, width: Array) -> Array:
    """The share s of drivers on the toll road: 1 + s^2 hours there, 2 (1 - s) / width elsewhere."""
    return newton(lambda s: 1.0 + s**2 + toll - 2.0 * (1.0 - s) / width, 0.3)


def best_toll(width: Array) -> Array:
    return newton_minimum(lambda toll: -toll * share(toll, width), 0.1)


def total_cost(width: Array) -> Array:
    """Hours on the road, and what building it costs."""
    s = share(best_toll(width), width)
    return s * (1.0 + s**2) + (1.0 - s) * 2.0 * (1.0 - s) / width + 0.8 * width


# %%
slope = jax.jit(jax.value_and_grad(total_cost))
width = 0.5
for _ in range(60):
    cost, gradient = slope(width)
    width -= 0.4 * gradient
toll = best_toll(width)
print(f"width {width:.4f}, toll {toll:.4f}, share {share(toll, width):.4f}, cost {cost:.4f}")
checks = {
    "the city's slope is zero": abs(gradient) < 1e-6,
    "its second derivative is positive": jax.hessian(total_cost)(width) > 0,
    "the company's slope is zero": abs(jax.grad(lambda t: t * share(t, width))(toll)) < 1e-10,
}
difference = (total_cost(0.5 + 1e-5) - total_cost(0.5 - 1e-5)) / 2e-5
checks["the gradient is that of a difference"] = abs(slope(0.5)[1] - difference) < 1e-8

# %%
widths = jnp.linspace(0.25, 1.5, 30)
both = jax.jit(lambda width: (total_cost(width), best_toll(width)))
costs, tolls = map(jnp.stack, zip(*map(both, widths), strict=True))
plt.figure(figsize=(7, 4), layout="constrained")
plt.plot(widths, costs, label="cost to the city")
plt.plot(widths, tolls, label="toll that the company charges")
plt.plot(width, cost, "o")
plt.xlabel("width of the other road")
plt.legend()
plt.show()

# %%
for what, holds in checks.items():
    print(f"{what}: {bool(holds)}")
if not all(checks.values()):
    raise SystemExit("a check failed")
