"""Fresh lambdas, fifty in a row, through one jitted Newton solver, against the same solver with the
captured values threaded by hand. Also: how often the solver was traced.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import Array

import freevars.jax as fv
from benchmarks._peers import CONVERTERS
from benchmarks._table import Row, seconds
from benchmarks._timing import alternate

TITLE = "solver: 50 fresh lambdas through one jitted Newton solver against hand-threaded values"
TARGET = 5.0
LAMBDAS = 50
STEPS = 10


def newton(objective: Callable[[Array], Array], x: Array) -> Array:
    def step(_: int, x: Array) -> Array:
        return x - jnp.linalg.solve(jax.hessian(objective)(x), jax.grad(objective)(x))

    return jax.lax.fori_loop(0, STEPS, step, x)


def objective(x: Array, data: Array, labels: Array, penalty: Array) -> Array:
    """Logistic regression with a ridge penalty."""
    return jnp.mean(jax.nn.softplus(-labels * (data @ x))) + penalty * (x @ x)


def rows() -> Iterator[Row]:
    data = jax.random.normal(jax.random.key(0), (200, 20))
    labels = jnp.sign(data @ jnp.ones(20) + 0.5)
    penalties = [jnp.float32(0.01 * (1 + k)) for k in range(LAMBDAS)]
    x0 = jnp.zeros(20)
    traces = 0

    @jax.jit
    def by_hand(x0: Array, *values: Array) -> Array:
        return newton(lambda x: objective(x, *values), x0)

    @jax.jit
    def by_closure(fun: fv.Closure, x0: Array) -> Array:
        nonlocal traces
        traces += 1
        return newton(fun, x0)

    @functools.partial(jax.jit, static_argnums=0)
    def by_static_function(fun: Callable[[Array], Array], x0: Array) -> Array:
        return newton(fun, x0)

    def all_by_hand() -> None:
        for p in penalties:
            by_hand(x0, data, labels, p).block_until_ready()

    def all_by_closure() -> None:
        for p in penalties:
            fun = fv.Closure(lambda x: objective(x, data, labels, p), x0)  # noqa: B023
            by_closure(fun, x0).block_until_ready()

    def one_by_static_function() -> None:
        p = penalties[0]
        by_static_function(lambda x: objective(x, data, labels, p), x0).block_until_ready()

    ours = alternate(all_by_hand, all_by_closure)

    # The peers compile for each lambda: one lambda shows it, fifty would take minutes.
    peers = {"jit, static function": one_by_static_function}
    if "equinox" in CONVERTERS:
        import equinox

        by_equinox = equinox.filter_jit(newton)

        def one_by_equinox() -> None:
            p = penalties[0]
            fun = CONVERTERS["equinox"](lambda x: objective(x, data, labels, p), x0)
            by_equinox(fun, x0).block_until_ready()

        peers["equinox"] = one_by_equinox
    theirs = alternate(
        lambda: by_hand(x0, data, labels, penalties[0]).block_until_ready(), *peers.values()
    )

    yield Row(
        case=f"{LAMBDAS} fresh lambdas",
        baseline=seconds(ours.seconds[0]),
        ours=seconds(ours.seconds[1]),
        figure=ours.ratios[1],
        target=TARGET,
        peers=tuple(zip(peers, theirs.ratios[1:], strict=True)),
    )
    yield Row(case="traces of the solver", baseline="1", ours=str(traces), figure=traces, target=1)
