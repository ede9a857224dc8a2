"""The path of a lasso regression, with its slope at every point, and the best point on it.

    python examples/lasso_path.py

min |X w - y|^2 / (2 n) + penalty * sum |w| has a kink where a weight is zero. With w = p - q and
p, q >= 0 it is smooth with bounds. `argmin` takes these from the parameter `bounds` of the solver,
an accelerated projected gradient: a weight at zero stays there, and the others move along a line
that is known in closed form.
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from jax import Array
from sklearn.datasets import load_diabetes

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

data, target = load_diabetes(return_X_y=True, scaled=False)
data = (data - data.mean(0)) / data.std(0)
target = (target - target.mean()) / target.std()
x, y, valid_x, valid_y = data[:300], target[:300], data[300:], target[300:]

# %% [markdown]
# The objective captures the penalty. A last Newton step (`polish`) takes away what the iteration
# leaves.


# %%
@fv.argmin(polish=True)
def project(fun, x0, *, bounds):
    def step(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        x, ahead = state
        new = jnp.clip(ahead - 0.1 * jax.grad(fun)(ahead), *bounds)
        return new, new + 0.9 * (new - x)

    return jax.lax.fori_loop(0, 1500, step, (x0, x0))[0]


def lasso(penalty: Array) -> Array:
    def loss(parts: Array) -> Array:
        fit = jnp.mean((x @ (parts[0] - parts[1]) - y) ** 2) / 2
        return fit + penalty * jnp.sum(parts)

    p, q = project(loss, jnp.zeros((2, 10)), bounds=(0.0, None))
    return p - q


# %% [markdown]
# In closed form, the weights A that are not zero move by -n (X_A^T X_A)^-1 sign(w_A).


# %%
def exact(w: Array) -> Array:
    kept = jnp.abs(w) > 1e-9
    inner = x[:, kept].T @ x[:, kept] / len(x)
    return jnp.zeros(10).at[kept].set(-jnp.linalg.solve(inner, jnp.sign(w[kept])))


with_slope = jax.jit(lambda penalty: jax.jvp(lasso, (penalty,), (1.0,)))
penalties = jnp.geomspace(0.5, 0.005, 12)
weights, slopes = map(jnp.stack, zip(*map(with_slope, penalties), strict=True))
error = max(float(jnp.max(jnp.abs(s - exact(w)))) for s, w in zip(slopes, weights, strict=True))
print("kept", jnp.sum(jnp.abs(weights) > 1e-9, axis=1).tolist())
print(f"slopes against the closed form: largest error {error:.1e}")

# %% [markdown]
# The penalty that predicts best, by gradient descent on its logarithm.

# %%
held_out = lambda w: jnp.mean((valid_x @ w - valid_y) ** 2)
log, errors = jnp.log(0.2), []
for _ in range(10):
    w, slope = with_slope(jnp.exp(log))
    errors.append(held_out(w))
    log -= 3.0 * jax.grad(held_out)(w) @ slope * jnp.exp(log)
print(f"validation error {errors[0]:.4f} before, {errors[-1]:.4f} at penalty {jnp.exp(log):.4f}")

# %%
plt.figure(figsize=(7, 4), layout="constrained")
lines = plt.plot(penalties, weights)
for i, line in enumerate(lines):
    ends = penalties[:, None] + 0.1 * penalties[:, None] * jnp.array([-1.0, 1.0])
    heights = weights[:, i, None] + slopes[:, i, None] * (ends - penalties[:, None])
    plt.plot(ends.T, heights.T, color=line.get_color(), linewidth=3)
plt.xscale("log")
plt.gca().set(xlabel="penalty", ylabel="weights, and their slopes")
plt.show()

# %%
if not (error < 1e-6 and errors[-1] < errors[0]):
    raise SystemExit("a slope is off, or tuning did not help")
