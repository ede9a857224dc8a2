"""What names cost: nothing for a conversion that nobody inspects, and how long a report takes.

The first rows put a conversion beside one in which everything that serves names is taken out. The
others time a report of many values in a nested pytree beyond the tracing that it is made from.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import freevars.jax as fv
from benchmarks._table import Row, seconds
from benchmarks._timing import alternate
from benchmarks.convert import X, chain
from freevars.jax._convert import convert as _convert

TITLE = "captures: what names cost a conversion, and the time of a report"
UNINSPECTED = 1.02
REPORT = 1.0  # seconds
EQUATIONS = (300,)  # a larger one says more about the machine's other work
CAPTURED = (100, 1000)


@contextlib.contextmanager
def without_names() -> Iterator[None]:
    """Conversions that leave out the check whose error would name a value, and cannot name one."""
    hooks = {"_refuse_refs": _nothing, "described": None}
    kept = {name: getattr(_convert, name) for name in hooks}
    try:
        for name, hook in hooks.items():
            setattr(_convert, name, hook)
        yield
    finally:
        for name, hook in kept.items():
            setattr(_convert, name, hook)


def _nothing(*_: Any) -> None:
    pass


def bare(fun: Callable[[Array], Array]) -> None:
    with without_names():
        fv.Closure(fun, X)


def nested(count: int) -> tuple[Callable[[Array], Array], dict[str, Any]]:
    """A function that reads ``count`` arrays of a nested pytree, two equations each."""
    tree = {f"layer{i}": [jnp.full(8, i + j / 10) for j in range(10)] for i in range(count // 10)}

    def objective(x: Array) -> Array:
        for layer in tree.values():
            for w in layer:
                x = jnp.tanh(x * w)
        return jnp.sum(x)

    return objective, tree


def rows() -> Iterator[Row]:
    for equations in EQUATIONS:
        values = [jnp.full(8, 0.5), jnp.full(8, 1.5)]
        timing = alternate(
            lambda: bare(chain(equations, values)),
            lambda: fv.Closure(chain(equations, values), X),
            budget=15.0,  # two percent take long to see
        )
        yield Row(
            case=f"a conversion nobody inspects, {equations:,} equations",
            baseline=seconds(timing.seconds[0]),
            ours=seconds(timing.seconds[1]),
            figure=timing.ratios[1],
            target=UNINSPECTED,
        )
    for count in CAPTURED:
        objective, _ = nested(count)
        jaxpr, values, *_ = _convert.trace(objective, (X,))
        timing = alternate(
            lambda: fv.Closure(lambda x: objective(x), X),  # noqa: PLW0108 (traced afresh)
            lambda: _convert._refuse_refs(objective, jaxpr, values),  # noqa: SLF001
        )
        yield Row(
            case=f"share of the check that may name a value, {count:,} values",
            baseline=seconds(timing.seconds[0]),
            ours=seconds(timing.seconds[1]),
            figure=timing.ratios[1],
            target=UNINSPECTED - 1,
        )
        timing = alternate(
            lambda: jax.make_jaxpr(lambda x: objective(x))(X),  # noqa: PLW0108 (traced afresh)
            lambda: fv.captures(objective, X),
            lambda: str(fv.captures(objective, X)),
        )
        for what, spent in zip(("fv.captures", "and as text"), timing.seconds[1:], strict=True):
            yield Row(
                case=f"{what}, {count:,} values, beyond tracing",
                baseline=seconds(timing.seconds[0]),
                ours=seconds(spent),
                figure=spent - timing.seconds[0],
                target=REPORT,
                unit=" s",
            )
