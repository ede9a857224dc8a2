"""A converted call outside every transformation, against a hand-jitted function with explicit
arguments.
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

TITLE = "call: a converted call against a hand-jitted function with explicit arguments"
TARGET = 1.25


def layers(x: Array, *weights: Array) -> Array:
    for weight in weights:
        x = jnp.tanh(weight @ x)
    return x


def rows() -> Iterator[Row]:
    for size, depth in ((8, 3), (8, 30), (256, 3)):
        weights = tuple(jnp.full((size, size), 0.1 + i) for i in range(depth))
        x = jnp.linspace(-1.0, 1.0, size)
        by_hand = jax.jit(layers)
        fun = lambda x: layers(x, *weights)  # noqa: E731
        constant, none = fv.closure_convert(fun, x)
        converted, hoisted = fv.closure_convert(fun, x, hoist="all")
        closure = fv.Closure(fun, x)
        jitted = jax.jit(fun)
        ours = {
            "closure_convert": lambda: constant(x, *none).block_until_ready(),
            'closure_convert(hoist="all")': lambda: converted(x, *hoisted).block_until_ready(),
            "Closure": lambda: closure(x).block_until_ready(),
        }
        peers = {"jit, values constant": lambda: jitted(x).block_until_ready()}
        for name, convert in CONVERTERS.items():
            theirs = convert(fun, x)
            call, more = theirs if isinstance(theirs, tuple) else (theirs, ())
            peers[name] = partial(lambda call, more: call(x, *more).block_until_ready(), call, more)
        sides = {"by hand": lambda: by_hand(x, *weights).block_until_ready(), **ours, **peers}
        timing = alternate(*sides.values())
        found = dict(zip(sides, zip(timing.seconds, timing.ratios, strict=True), strict=True))
        for name in ours:
            spent, ratio = found[name]
            yield Row(
                case=f"{name}, {depth} captured {size}x{size}",
                baseline=seconds(timing.seconds[0]),
                ours=seconds(spent),
                figure=ratio,
                target=TARGET,
                peers=tuple((peer, found[peer][1]) for peer in peers),
            )
