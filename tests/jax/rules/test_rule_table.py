"""The problems of the rules, the same as for PyTorch, under the transformations of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import freevars.jax as fv
from tests.rule_problems import FAILURES, MISTAKES, PROBLEMS, A, B, RuleHost, check_failure

HOST = RuleHost(
    xp=jnp,
    fv=fv,
    array=lambda values: jnp.asarray(values, dtype="float64"),
    grad=jax.grad,
    jacobian=jax.jacfwd,
    loop=lambda n, step, x: lax.fori_loop(0, n, lambda _, x: step(x), x),
    tree_map=jax.tree.map,
)


pytestmark = pytest.mark.slow  # each test compiles a rule with its system and its check


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _pairs(a, b):
    return jnp.stack([a, a / 2]), jnp.stack([b, b / 2 + 0.1])


TRANSFORMATIONS = {
    "grad": lambda g: jax.grad(g, (0, 1)),
    "jvp": lambda g: lambda a, b: jax.jvp(g, (a, b), (b, a)),
    "hessian": lambda g: jax.hessian(g, (0, 1)),
    "hessian_reversed": lambda g: jax.jacrev(jax.jacfwd(g, (0, 1)), (0, 1)),
    "third": lambda g: jax.jacfwd(jax.hessian(g, (0, 1)), (0, 1)),
    "vmap_grad": lambda g: lambda a, b: jax.vmap(jax.grad(g, (0, 1)))(*_pairs(a, b)),
}
# Compiling takes most of the time, so the last orders meet the problems of one kind each.
DEAR = {"hessian_reversed", "third"}
TABLE = [
    (p, t)
    for t in TRANSFORMATIONS
    for p in PROBLEMS
    if t not in DEAR or p.name in {"root", "argmin"}
]


def _loss(fun):
    return lambda a, b: jnp.sum(jnp.sin(fun(HOST, a, b) * jnp.array([1.0, 2.0])))


@pytest.mark.parametrize(
    ("problem", "transformation"), TABLE, ids=[f"{p.name}-{t}" for p, t in TABLE]
)
def test_equals_the_closed_form(problem, transformation) -> None:
    transform = TRANSFORMATIONS[transformation]
    got = jax.jit(transform(_loss(problem.solve)))(A, B)
    expected = jax.jit(transform(_loss(problem.exact)))(A, B)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda x: x.name)
def test_failures(failure) -> None:
    def by_reverse(**options):
        return float(jax.grad(lambda t: failure.program(HOST, options, t))(1.0))

    def by_forward(**options):
        return float(jax.jvp(lambda t: failure.program(HOST, options, t), (1.0,), (1.0,))[1])

    for derivative in (by_reverse, by_forward):
        check_failure(failure, derivative)


@pytest.mark.parametrize(("wrong", "error", "text"), MISTAKES)
def test_mistakes(wrong, error, text) -> None:
    with pytest.raises(error, match=text):
        wrong(HOST)
