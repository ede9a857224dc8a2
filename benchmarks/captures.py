"""What names cost: nothing for a conversion that nobody inspects, and how long a report takes.

The first rows put a conversion beside the same steps without anything that is there for the sake of
names: the types of the result kept apart from the rest, the check whose error would name a value.
The others time a report of many values in a nested pytree beyond the tracing that it is made from.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import freevars.jax as fv
from benchmarks._table import Row, seconds
from benchmarks._timing import alternate
from benchmarks.convert import X, chain
from freevars.jax import _compat, _convert
from freevars.jax._arguments import Spec, join, split
from freevars.jax._fingerprint import Fingerprint
from freevars.jax._lift import lift_constants
from freevars.jax._program import Program

TITLE = "captures: what names cost a conversion, and the time of a report"
UNINSPECTED = 1.02
REPORT = 1.0  # seconds
EQUATIONS = (300, 3000)
CAPTURED = (100, 1000)


def without_names(fun: Callable[..., Any], *example_args: Any) -> Any:
    """The steps of a conversion and nothing else."""
    arrays, tree, statics = split(tuple(example_args))
    inputs = Spec(tree, tuple([_compat.example_type(x) for x in arrays]), statics)
    result: list[Any] = []

    def on_leaves(*leaves: Any) -> list[Any]:
        outs, out_tree, out_statics = split(fun(*join(inputs, leaves)))
        result[:] = out_tree, out_statics
        return outs

    closed = jax.make_jaxpr(on_leaves)(*arrays)
    outputs = Spec(result[0], tuple(closed.out_avals), result[1])
    jaxpr, values = _convert._in_order_of_use(*lift_constants(closed), len(arrays))  # noqa: SLF001
    fingerprint = Fingerprint(jaxpr)
    jaxpr, values, fixed = _convert._keep_what_rules_hold(  # noqa: SLF001
        fun, jaxpr, values, fingerprint.held
    )
    specs = [_convert._spec_key(fingerprint, spec) for spec in (inputs, outputs)]  # noqa: SLF001
    key = (fingerprint.key, tuple(map(id, fixed)), _compat.trace_context(), *specs)
    types = tuple([v.aval for v in jaxpr.invars[len(fixed) : len(fixed) + len(values)]])
    name = fun.__name__
    return Program.intern(key, lambda: Program(jaxpr, fixed, types, inputs, outputs, name)), values


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
            lambda: without_names(chain(equations, values), X),
            lambda: _convert.convert(chain(equations, values), (X,)),
            budget=6.0,
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
