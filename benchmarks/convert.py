"""Cold conversion against ``jax.make_jaxpr`` of the same function.

Tracing the function once is the floor: no conversion can find the captured values without it. Every
call converts a function object that was never seen, with a literal of its own in it, so that no
cache of anybody's can answer. The last row is the opposite: partials of one jitted function, made
afresh, which JAX has traced before.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import freevars.jax as fv
from benchmarks._peers import CONVERTERS
from benchmarks._table import Row, seconds
from benchmarks._timing import Timing, alternate

TITLE = "convert: cold conversion against jax.make_jaxpr of the same function"
TARGET = 1.25
TARGET_JITTED = 0.15
TARGET_RULES, TARGET_OWN_RULES = 1.15, 2.0
MANY_CAPTURED, MANY_EQUATIONS = 5_000, 20_000
EQUATIONS = (30, 300, 3000)
CAPTURED = (10, 100, 1000)

_literals = itertools.count(1)
X = jnp.ones(8)


def chain(equations: int, values: list[Array]) -> Callable[[Array], Array]:
    """A fresh function of about ``equations`` equations that reads all of ``values``."""
    literal = next(_literals) / 1024

    def fun(x: Array) -> Array:
        x = x * literal
        for _, value in zip(range(equations // 3), itertools.cycle(values), strict=False):
            x = jnp.tanh(x * value + literal)
        return jnp.sum(x)

    return fun


def captured(count: int, values: list[Array]) -> Callable[[Array], Array]:
    """A fresh function that captures ``count`` arrays, two equations each."""
    del count
    literal = next(_literals) / 1024

    def fun(x: Array) -> Array:
        for value in values:
            x = jnp.tanh(x * value)
        return jnp.sum(x * literal)

    return fun


def measure(
    build: Callable[[], Callable[[Array], Array]], ours: dict[str, Callable[..., Any]]
) -> tuple[Timing, dict[str, int]]:
    """Times make_jaxpr, ``ours`` and the peers; also says at which index each name stands."""
    names = [*ours, *CONVERTERS]
    sides = [
        lambda: jax.make_jaxpr(build())(X),
        *(partial(lambda way: way(build(), X), way) for way in (ours | CONVERTERS).values()),
    ]
    return alternate(*sides), {name: i + 1 for i, name in enumerate(names)}


def in_a_trace(values: list[Array], run: Callable[[list[Array]], Any]) -> Any:
    """``run(values)`` while ``values`` are tracers of a transformation that is under way."""
    results = []

    def traced(values: list[Array]) -> None:
        results.append(run(values))

    jax.eval_shape(traced, values)
    return results[0]


def jitted(equations: int) -> Row:
    values = [jnp.full(8, 0.5), jnp.full(8, 1.0)]
    layers = equations // 3

    @jax.jit
    def fun(values: list[Array], x: Array) -> Array:
        for _, value in zip(range(layers), itertools.cycle(values), strict=False):
            x = jnp.tanh(x * value + 0.5)
        return jnp.sum(x)

    timing = alternate(
        lambda: jax.make_jaxpr(partial(fun, values))(X), lambda: fv.Closure(partial(fun, values), X)
    )
    return Row(
        case=f"Closure, a fresh partial of a jitted function of {equations} equations",
        baseline=seconds(timing.seconds[0]),
        ours=seconds(timing.seconds[1]),
        figure=timing.ratios[1],
        target=TARGET_JITTED,
    )


def with_rules(count: int, rule: Callable[[int], Callable[[Array], Array]]) -> Row:
    """A fresh function that calls ``count`` functions with custom rules, made before."""
    functions = [rule(i) for i in range(count)]

    def build() -> Callable[[Array], Array]:
        def fun(x: Array) -> Array:
            for function in functions:
                x = function(2.0 * x)
            return x

        return fun

    def with_each_rule() -> None:
        jax.make_jaxpr(build())(X)
        for function in functions:
            jax.make_jaxpr(lambda x, t, function=function: function.jvp((x,), (t,)))(X, X)

    if functions[0] is functions[1]:
        return against_a_trace(f"{count} custom rules of JAX's (relu)", build, TARGET_RULES)
    floor = {"a trace, and one of each rule": with_each_rule}
    return against_a_trace(f"{count} custom rules of the user's", build, TARGET_OWN_RULES, floor)


def own_rule(i: int) -> Callable[[Array], Array]:
    @jax.custom_jvp
    def sine(x: Array) -> Array:
        return jnp.sin(x) * float(i)

    @sine.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (x,), (dot,) = primals, tangents
        return sine(x), jnp.cos(x) * dot * float(i)

    return sine


def against_a_trace(
    what: str,
    build: Callable[[], Callable[[Array], Array]],
    target: float = TARGET,
    floor: dict[str, Callable[[], None]] | None = None,
) -> Row:
    """``floor``: what has to be done in any case."""
    least = floor or {}
    timing = alternate(
        lambda: jax.make_jaxpr(build())(X),
        lambda: fv.Closure(build(), X),
        *least.values(),
        budget=1.0,
    )
    return Row(
        case=f"Closure, {what}",
        baseline=seconds(timing.seconds[0]),
        ours=seconds(timing.seconds[1]),
        figure=timing.ratios[1],
        target=target,
        peers=tuple(zip(least, timing.ratios[2:], strict=True)),
    )


def rows() -> Iterator[Row]:
    per_unit: dict[tuple[str, str], list[float]] = {}
    cases = [("equations", n, 2, chain) for n in EQUATIONS]
    cases += [("captured arrays", n, n, captured) for n in CAPTURED]
    for what, size, width, family in cases:
        values = [jnp.full(8, 0.5 + i / width) for i in range(width)]
        eager = {
            'closure_convert(hoist="all")': partial(fv.closure_convert, hoist="all"),
            "Closure": fv.Closure,
        }
        traced = {"closure_convert": fv.closure_convert}
        runs = [
            (traced, in_a_trace(values, lambda v: measure(lambda: family(size, v), traced))),
            (eager, measure(lambda: family(size, values), eager)),
        ]
        for ours, (timing, index) in runs:
            peers = tuple((name, timing.ratios[index[name]]) for name in CONVERTERS)
            for name in ours:
                spent = timing.seconds[index[name]]
                per_unit.setdefault((name, what), []).append(spent / size)
                yield Row(
                    case=f"{name}, {size:,} {what}",
                    baseline=seconds(timing.seconds[0]),
                    ours=seconds(spent),
                    figure=timing.ratios[index[name]],
                    target=TARGET,
                    peers=peers,
                )
            base = "make_jaxpr in a trace" if ours is traced else "make_jaxpr"
            per_unit.setdefault((base, what), []).append(timing.seconds[0] / size)
    for (name, what), (_, middle, largest) in per_unit.items():
        if name.startswith("make_jaxpr"):
            continue
        base = "make_jaxpr in a trace" if name == "closure_convert" else "make_jaxpr"
        _, base_middle, base_largest = per_unit[base, what]
        sizes = EQUATIONS if what == "equations" else CAPTURED
        yield Row(
            case=f"{name}, time per one: {sizes[2]:,} {what} against {sizes[1]:,}",
            baseline=f"{base_largest / base_middle:.2f}",
            figure=largest / middle,
            target=TARGET,
        )
    yield jitted(EQUATIONS[1])
    yield with_rules(50, lambda _: jax.nn.relu)
    yield with_rules(50, own_rule)
    many = [jnp.full(8, 0.5 + i / MANY_CAPTURED) for i in range(MANY_CAPTURED)]
    for what, build in (
        (f"{MANY_CAPTURED:,} captured arrays", partial(captured, MANY_CAPTURED, many)),
        (f"{MANY_EQUATIONS:,} equations", partial(chain, MANY_EQUATIONS, many[:2])),
    ):
        yield against_a_trace(what, build)
