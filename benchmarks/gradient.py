"""``value_and_grad`` by the captured values of a Closure, jitted once, against the same function
with its parameters threaded by hand.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

import freevars.jax as fv
from benchmarks._peers import CONVERTERS
from benchmarks._table import Row, seconds
from benchmarks._timing import alternate

TITLE = "gradient: jitted value_and_grad by captured values against hand-threaded parameters"
TARGET = 1.1


def loss(weights: tuple[Array, ...], x: Array) -> Array:
    for weight in weights:
        x = jnp.tanh(x @ weight)
    return jnp.mean(x**2)


def rows() -> Iterator[Row]:
    for size, depth, batch in ((8, 3, 1), (64, 3, 64), (64, 30, 64), (256, 3, 256)):
        keys = jax.random.split(jax.random.key(0), depth)
        weights = tuple(jax.random.normal(key, (size, size)) / size**0.5 for key in keys)
        x = jnp.ones((batch, size))
        by_hand = jax.jit(jax.value_and_grad(loss))
        closure = fv.Closure(lambda x: loss(weights, x), x)
        by_captured = jax.jit(jax.value_and_grad(lambda closure, x: closure(x)))

        def hand() -> None:
            value, _ = by_hand(weights, x)
            value.block_until_ready()  # the gradient leaves the executable together with it

        def captured() -> None:
            value, _ = by_captured(closure, x)
            value.block_until_ready()

        peers = {}
        if "equinox" in CONVERTERS:
            import equinox

            theirs = CONVERTERS["equinox"](lambda x: loss(weights, x), x)
            by_equinox = equinox.filter_jit(equinox.filter_value_and_grad(lambda fun, x: fun(x)))
            peers["equinox"] = partial(
                lambda by, f: by(f, x)[0].block_until_ready(), by_equinox, theirs
            )

        timing = alternate(hand, captured, *peers.values())
        yield Row(
            case=f"{depth} weights {size}x{size}, batch {batch}",
            baseline=seconds(timing.seconds[0]),
            ours=seconds(timing.seconds[1]),
            figure=timing.ratios[1],
            target=TARGET,
            peers=tuple(zip(peers, timing.ratios[2:], strict=True)),
        )
