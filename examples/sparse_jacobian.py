"""A sparse Jacobian: 100,000 unknowns on a line, each coupled to its neighbours.

    python examples/sparse_jacobian.py

The default would apply the system some hundred times. Its matrix is tridiagonal, so three
applications show all of it: to sums of unit vectors whose columns share no row. It is then solved
in O(n), here by LAPACK from JAX and on the host by scipy's sparse LU. A backward pass asks for the
transposed system in the same way.
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from jax import Array

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

N = 100_000
SOURCE = jnp.sin(jnp.linspace(0.0, 20.0, N))


# %%
def residual(x: Array, stiffness: Array) -> Array:
    left, right = jnp.pad(x[:-1], (1, 0)), jnp.pad(x[1:], (0, 1))
    return 2.5 * x - 0.8 * left - 1.2 * right + stiffness * x**3 - SOURCE


def bands(operator: fv.LinearOperator) -> tuple[Array, Array, Array]:
    """The lower, middle and upper diagonal of a tridiagonal matrix, each of shape (n,)."""
    place = jnp.arange(N)
    images = jnp.stack([operator((place % 3 == k).astype("float64")) for k in range(3)])
    entry = lambda offset: images[(place + offset) % 3, place]
    return entry(-1).at[0].set(0.0), entry(0), entry(1).at[-1].set(0.0)


def by_lapack(operator: fv.LinearOperator, b: Array) -> Array:
    return jax.lax.linalg.tridiagonal_solve(*bands(operator), b[:, None])[:, 0]


def by_scipy(operator: fv.LinearOperator, b: Array) -> Array:
    def on_host(lower: Array, middle: Array, upper: Array, b: Array) -> np.ndarray:
        lower, middle, upper, b = map(np.asarray, (lower, middle, upper, b))
        matrix = scipy.sparse.diags_array([lower[1:], middle, upper[:-1]], offsets=[-1, 0, 1])
        return scipy.sparse.linalg.splu(matrix.tocsc()).solve(b)

    return jax.pure_callback(on_host, jax.ShapeDtypeStruct(b.shape, b.dtype), *bands(operator), b)


def newton(fun, x0: Array, stiffness: Array) -> Array:
    def step(_: int, x: Array) -> Array:
        system = fv.LinearOperator(lambda v: jax.jvp(fun, (x,), (v,))[1], x)
        return x - by_lapack(system, fun(x))

    del stiffness
    return jax.lax.fori_loop(0, 8, step, x0)


# %%
slopes = {}
for name, linear_solve in {"LAPACK": by_lapack, "scipy": by_scipy, "default": None}.items():
    solve = fv.root(newton, linear_solve=linear_solve)

    def energy(stiffness: Array, solve=solve) -> Array:
        x = solve(lambda x: residual(x, stiffness), jnp.zeros(N), stiffness)
        return jnp.mean(x**2)

    slopes[name] = float(jax.jit(jax.grad(energy))(0.7))
    print(f"{name:8} d energy / d stiffness = {slopes[name]:.12f}")
difference = float((energy(0.7 + 1e-5) - energy(0.7 - 1e-5)) / 2e-5)
print(f"a central difference            {difference:.12f}")

# %%
x = solve(lambda x: residual(x, 0.7), jnp.zeros(N), 0.7)
plt.figure(figsize=(7, 3.5), layout="constrained")
plt.plot(x, linewidth=0.5, label="solution")
plt.plot(SOURCE, linewidth=0.5, label="source")
plt.legend()
plt.show()

# %%
if not all(abs(s - difference) < 1e-8 for s in slopes.values()):
    raise SystemExit("the derivatives differ")
