"""A layer that is a fixed point: train a deep-equilibrium network on the two moons.

    python examples/deep_equilibrium.py

The layer's output is the state z that a small network maps to itself, z = tanh(W z + U x + b). The
backward pass solves one linear system at the fixed point and stores none of the iterations.
"""

import jax
import jax.numpy as jnp
from jax import Array
from sklearn.datasets import make_moons
from tqdm import trange

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)

WIDTH, STEPS, RATE = 12, 150, 0.3


@fv.fixed_point
def iterate(fun, z0):
    """Apply ``fun`` until nothing moves any more."""
    moves = lambda state: (jnp.max(jnp.abs(state[1] - state[0])) > 1e-10) & (state[2] < 500)
    step = lambda state: (state[1], fun(state[1]), state[2] + 1)
    return jax.lax.while_loop(moves, step, (z0, fun(z0), 0))[1]


def predict(params: dict[str, Array], x: Array) -> Array:
    # Scaled to norm 0.9 at most, the map is a contraction and has one fixed point.
    w = params["w"] * jnp.minimum(1.0, 0.9 / jnp.linalg.norm(params["w"]))
    z = iterate(lambda z: jnp.tanh(w @ z + params["u"] @ x + params["b"]), jnp.zeros(WIDTH))
    return params["out"] @ z


def loss(params: dict[str, Array], x: Array, labels: Array) -> Array:
    scores = jax.vmap(predict, (None, 0))(params, x)
    return jnp.mean(jax.nn.softplus(-labels * scores))


def main() -> None:
    x, labels = make_moons(200, noise=0.1, random_state=0)
    x, labels = jnp.asarray(x), jnp.asarray(2.0 * labels - 1.0)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": 0.2 * jax.random.normal(keys[0], (WIDTH, WIDTH)),
        "u": jax.random.normal(keys[1], (WIDTH, 2)),
        "out": jax.random.normal(keys[2], (WIDTH,)),
        "b": jnp.zeros(WIDTH),
    }
    step = jax.jit(jax.value_and_grad(loss))
    before, grads = step(params, x, labels)
    along = lambda t: loss(jax.tree.map(lambda p: p + t, params), x, labels)  # all by the same
    slope = sum(jnp.sum(g) for g in jax.tree.leaves(grads))
    error = abs(slope - (along(1e-5) - along(-1e-5)) / 2e-5) / abs(slope)
    for _ in trange(STEPS, desc="training", unit="step"):
        _, grads = step(params, x, labels)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)

    right = jnp.mean(jnp.sign(jax.vmap(predict, (None, 0))(params, x)) == labels)
    print(f"loss: {before:.3f} before, {loss(params, x, labels):.3f} after; accuracy {right:.1%}")
    print(f"gradient against a central difference: relative error {error:.1e}")
    if not (right > 0.9 and error < 1e-6):
        raise SystemExit("the network did not learn, or its gradient is off")


if __name__ == "__main__":
    main()
