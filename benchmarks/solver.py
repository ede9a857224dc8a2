"""Fresh lambdas, fifty in a row, through one jitted Newton solver, against the same solver with the
captured values threaded by hand; the same with fresh partials of a jitted objective, which are not
traced again. Also: how often the solver was traced.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import freevars.jax as fv
from benchmarks._peers import CONVERTERS
from benchmarks._table import Row, seconds
from benchmarks._timing import alternate

TITLE = "solver: 50 fresh lambdas through one jitted Newton solver against hand-threaded values"
TARGET = 5.0
TARGET_PARTIALS = 1.3
LAMBDAS = 50
STEPS = 25
SAMPLES, FEATURES = 341, 30  # the size of the training problem in examples/hyperparameters.py

DATA = jax.random.normal(jax.random.key(0), (SAMPLES, FEATURES))
LABELS = jnp.sign(DATA @ jnp.ones(FEATURES) + 0.5)
PENALTIES = [jnp.float32(0.01 * (1 + k)) for k in range(LAMBDAS)]
X0 = jnp.zeros(FEATURES)


def objective(x: Array, data: Array, labels: Array, penalty: Array) -> Array:
    """Logistic regression with a ridge penalty."""
    return jnp.mean(jax.nn.softplus(-labels * (data @ x))) + penalty * (x @ x)


def fresh(penalty: Array) -> Callable[[Array], Array]:
    return lambda x: objective(x, DATA, LABELS, penalty)


@jax.jit
def jitted_objective(data: Array, labels: Array, penalty: Array, x: Array) -> Array:
    return objective(x, data, labels, penalty)


def newton(fun: Callable[[Array], Array], x: Array) -> Array:
    def step(_: int, x: Array) -> Array:
        return x - jnp.linalg.solve(jax.hessian(fun)(x), jax.grad(fun)(x))

    return jax.lax.fori_loop(0, STEPS, step, x)


@jax.jit
def by_hand(x0: Array, *values: Array) -> Array:
    return newton(lambda x: objective(x, *values), x0)


def peers() -> dict[str, Callable[[], Any]]:
    """One fresh lambda through a solver that takes it in another way. Each compiles every time."""
    static = partial(jax.jit, static_argnums=0)(newton)
    found = {"jit, static function": lambda: static(fresh(PENALTIES[0]), X0).block_until_ready()}
    if "equinox" in CONVERTERS:
        import equinox

        jitted = equinox.filter_jit(newton)
        convert = CONVERTERS["equinox"]
        found["equinox"] = lambda: jitted(convert(fresh(PENALTIES[0]), X0), X0).block_until_ready()
    return found


def rows() -> Iterator[Row]:
    traces = 0

    @jax.jit
    def by_closure(fun: fv.Closure, x0: Array) -> Array:
        nonlocal traces
        traces += 1
        return newton(fun, x0)

    def all_by_hand() -> None:
        for penalty in PENALTIES:
            by_hand(X0, DATA, LABELS, penalty).block_until_ready()

    def all_by_closure() -> None:
        for penalty in PENALTIES:
            by_closure(fv.Closure(fresh(penalty), X0), X0).block_until_ready()

    def all_by_partial() -> None:
        for penalty in PENALTIES:
            fun = partial(jitted_objective, DATA, LABELS, penalty)
            by_closure(fv.Closure(fun, X0), X0).block_until_ready()

    ours = alternate(all_by_hand, all_by_closure)
    traces_of_lambdas = traces
    partials = alternate(all_by_hand, all_by_partial)
    # One lambda shows what a peer costs; fifty would take minutes.
    one_by_hand = lambda: by_hand(X0, DATA, LABELS, PENALTIES[0]).block_until_ready()  # noqa: E731
    others = peers()
    theirs = alternate(one_by_hand, *others.values())
    yield Row(
        case=f"{LAMBDAS} fresh lambdas",
        baseline=seconds(ours.seconds[0]),
        ours=seconds(ours.seconds[1]),
        figure=ours.ratios[1],
        target=TARGET,
        peers=tuple(zip(others, theirs.ratios[1:], strict=True)),
    )
    yield Row(
        case=f"{LAMBDAS} fresh partials of a jitted objective",
        baseline=seconds(partials.seconds[0]),
        ours=seconds(partials.seconds[1]),
        figure=partials.ratios[1],
        target=TARGET_PARTIALS,
    )
    for name, count in (("lambdas", traces_of_lambdas), ("partials", traces - traces_of_lambdas)):
        yield Row(f"traces of the solver for the {name}", count, 1, baseline="1", ours=str(count))
