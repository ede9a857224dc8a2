"""The behaviour table: each way to capture x each transformation x each way to convert.

The oracle of every cell is the same transformation of the function with its values handed down
explicitly. A program takes `diff`, the argument and the captured floats, and `rest`, the captured
integers, booleans and keys; all of them are traced by the transformation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freevars.jax as fv
from tests.behaviour import CASES, Case, Host, X

HOST = Host(jnp, jax.vmap)


def _key(host: Host, via: Any, x: Any, key: Any, old: Any) -> Any:
    def fun(x: Any) -> Any:
        noise = jax.random.normal(key, x.shape) + jax.random.uniform(old, x.shape)
        return jnp.sum(jnp.sin(noise * x))

    return via(fun, x)


def _key_explicit(host: Host, x: Any, key: Any, old: Any) -> Any:
    noise = jax.random.normal(key, x.shape) + jax.random.uniform(old, x.shape)
    return jnp.sum(jnp.sin(noise * x))


CASES = [*CASES, Case("key", (jax.random.key(3), jax.random.PRNGKey(4)), _key, _key_explicit)]


# The ways to convert: each gives `fun(*args)` by another road.


def traced(fun, *args):
    converted, hoisted = fv.closure_convert(fun, *args)
    return converted(*args, *hoisted)


def everything(fun, *args):
    converted, hoisted = fv.closure_convert(fun, *args, hoist="all")
    return converted(*args, *hoisted)


def closure(fun, *args):
    return fv.Closure(fun, *args)(*args)


def nested(fun, *args):
    """A closure inside the other conversion, inside itself."""
    return closure(
        lambda *inner: traced(lambda *innermost: closure(fun, *innermost), *inner), *args
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _evaluate(fun, x, *hoisted):
    return fun(x, *hoisted)


def _evaluate_fwd(fun, x, *hoisted):
    return fun(x, *hoisted), (x, hoisted)


def _evaluate_bwd(fun, residuals, cotangent):
    x, hoisted = residuals
    return jax.vjp(fun, x, *hoisted)[1](cotangent)


_evaluate.defvjp(_evaluate_fwd, _evaluate_bwd)


def custom_vjp_trailing(fun, x):
    """The function argument of a custom rule, its hoisted values as trailing arguments."""
    converted, hoisted = fv.closure_convert(fun, x)
    return _evaluate(converted, x, *hoisted)


@jax.custom_vjp
def _apply(f, x):
    return f(x)


_apply.defvjp(
    lambda f, x: (f(x), (f, x)),
    lambda residuals, ct: jax.vjp(lambda f, x: f(x), *residuals)[1](ct),
)


def custom_vjp_closure(fun, x):
    return _apply(fv.Closure(fun, x), x)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _evaluate_jvp(fun, x, *hoisted):
    return fun(x, *hoisted)


@_evaluate_jvp.defjvp
def _evaluate_jvp_rule(fun, primals, tangents):
    return jax.jvp(fun, primals, tangents)


def custom_jvp_trailing(fun, x):
    converted, hoisted = fv.closure_convert(fun, x)
    return _evaluate_jvp(converted, x, *hoisted)


@jax.custom_jvp
def _apply_jvp(f, x):
    return f(x)


_apply_jvp.defjvp(lambda primals, tangents: jax.jvp(lambda f, x: f(x), primals, tangents))


def custom_jvp_closure(fun, x):
    return _apply_jvp(fv.Closure(fun, x), x)


def cond(fun, x):
    converted, hoisted = fv.closure_convert(fun, x)
    return jax.lax.cond(x[0] > -100, converted, lambda x, *_: x[0], x, *hoisted)


def cond_closures(fun, x):
    f = fv.Closure(fun, x)
    other = jax.tree.map(jnp.zeros_like, f)
    return jax.lax.cond(x[0] > -100, lambda f, _: f(x), lambda _, g: g(x), f, other)


def checkpoint(fun, x):
    converted, hoisted = fv.closure_convert(fun, x)
    return jax.checkpoint(converted)(x, *hoisted)


def checkpoint_closure(fun, x):
    return jax.checkpoint(lambda f, x: f(x))(fv.Closure(fun, x), x)


def scan_xs(fun, x):
    """Two closures, stacked, as what a loop runs over; the first as what it carries."""
    f = fv.Closure(fun, x)
    stacked = jax.tree.map(lambda v: jnp.stack([v, v]), f)
    _, results = jax.lax.scan(lambda carried, g: (carried, (g(x) + carried(x)) / 2), f, stacked)
    return results[1]


def while_loop(fun, x):
    f = fv.Closure(fun, x)
    start = (0, f, jnp.zeros_like(x[0]))
    return jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1], s[1](x)), start)[2]


# The transformations: each takes `program(diff, rest)` and the values of both.


def value(p, diff, rest):
    return p(diff, rest)


def jit(p, diff, rest):
    return jax.jit(p)(diff, rest)


def grad(p, diff, rest):
    return jax.grad(p)(diff, rest)


def jit_grad(p, diff, rest):
    return jax.jit(jax.grad(p))(diff, rest)


def grad_jit(p, diff, rest):
    return jax.grad(jax.jit(p))(diff, rest)


def _pairs(diff, rest):
    """A batch of two: the values, and others of the same types."""
    a = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x + 0.1]), diff)
    b = tuple(jnp.stack([x, _other(x)]) for x in rest)
    return a, b


def _other(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.split(x)[0]
    return ~x if x.dtype == bool else x[::-1] if x.ndim else x - 1


def vmap(p, diff, rest):
    return jax.vmap(p)(*_pairs(diff, rest))


def vmap_some(p, diff, rest):
    """Over the captured values alone: the argument is not batched."""
    (_, *values), others = _pairs(diff, rest)
    axes = ((None, *(0 for _ in values)), tuple(0 for _ in others))
    return jax.vmap(p, in_axes=axes)((diff[0], *values), others)


def vmap_grad(p, diff, rest):
    return jax.vmap(jax.grad(p))(*_pairs(diff, rest))


def grad_vmap(p, diff, rest):
    diffs, rests = _pairs(diff, rest)
    return jax.grad(lambda d: jnp.sum(jnp.sin(jax.vmap(p)(d, rests))))(diffs)


def _scanned(p, diff, rest):
    """The captured values change from step to step, as tracers of the loop."""

    def step(carry, scale):
        (x, *values), total = carry
        y = p((x * scale, *values), rest)
        return ((x + 0.1 * y, *(v + 0.01 * y for v in values)), total + y), y

    (_, total), ys = jax.lax.scan(step, (diff, 0.0), jnp.array([0.5, 1.0, 0.8]))
    return total + jnp.sum(ys**2)


def scan(p, diff, rest):
    return jax.jit(partial(_scanned, p))(diff, rest)


def grad_scan(p, diff, rest):
    return jax.jit(jax.grad(partial(_scanned, p)))(diff, rest)


def remat(p, diff, rest):
    return jax.grad(jax.checkpoint(p))(diff, rest)


def _tangent(diff):
    return jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), diff)


def jvp(p, diff, rest):
    return jax.jvp(lambda d: p(d, rest), (diff,), (_tangent(diff),))


def hessian(p, diff, rest):
    return jax.jit(jax.hessian(p))(diff, rest)


def hessian_reversed(p, diff, rest):
    return jax.jit(jax.jacrev(jax.jacfwd(p)))(diff, rest)


TRANSFORMATIONS = [
    value,
    jit,
    grad,
    jit_grad,
    grad_jit,
    vmap,
    vmap_some,
    vmap_grad,
    grad_vmap,
    scan,
    grad_scan,
    remat,
    jvp,
    hessian,
    hessian_reversed,
]

# The whole table for the conversions themselves. What takes a converted function meets each case
# under the transformations that meet it in another way.
FULL = [traced, closure]
THROUGH = [
    everything,
    nested,
    custom_vjp_trailing,
    custom_vjp_closure,
    custom_jvp_trailing,
    custom_jvp_closure,
    cond,
    cond_closures,
    checkpoint,
    checkpoint_closure,
    scan_xs,
]
SOME = [jit_grad, vmap_grad, jvp]
# JAX has no forward rule for a `custom_vjp` and no reverse rule for a `while_loop`.
NO_FORWARD = {custom_vjp_trailing, custom_vjp_closure}

TABLE = [
    *((way, t) for way in FULL for t in TRANSFORMATIONS),
    *((way, t) for way in THROUGH for t in SOME if not (way in NO_FORWARD and t is jvp)),
    *((while_loop, t) for t in (value, vmap, jvp)),
]


def _floating(x):
    return jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)


@pytest.fixture(scope="module")
def oracle():
    """What the explicit function gives under a transformation, computed once."""
    known = {}

    def get(case, transformation):
        if (case.name, transformation) not in known:
            known[case.name, transformation] = _transformed(case, transformation, None)
        return known[case.name, transformation]

    return get


def _transformed(case: Case, transformation: Any, way: Any) -> Any:
    values = [v if isinstance(v, jax.Array) else jnp.asarray(v) for v in case.values]
    where = [_floating(v) for v in values]
    diff = (jnp.asarray(X), *(v for v, floats in zip(values, where, strict=True) if floats))
    rest = tuple(v for v, floats in zip(values, where, strict=True) if not floats)

    def program(diff, rest):
        (x, *floating), others = diff, iter(rest)
        floating = iter(floating)
        merged = [next(floating if floats else others) for floats in where]
        if way is None:
            return case.explicit(HOST, x, *merged)
        return case.program(HOST, way, x, *merged)

    return transformation(program, diff, rest)


def _cells():
    """Every seventh cell is quick, in diagonals: each way meets a seventh of the cases under each
    transformation, and other ways others."""
    for i, (way, transformation) in enumerate(TABLE):
        for j, case in enumerate(CASES):
            name = f"{way.__name__}-{transformation.__name__}-{case.name}"
            marks = pytest.mark.slow if (i + j) % 7 else ()
            yield pytest.param(case, way, transformation, id=name, marks=marks)


@pytest.mark.parametrize(("case", "way", "transformation"), [*_cells()])
def test_equals_the_explicit_function(oracle, case, way, transformation) -> None:
    expected = oracle(case, transformation)
    got = _transformed(case, transformation, way)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
