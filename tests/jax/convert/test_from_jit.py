"""A jitted function, and a partial of one, is converted without another trace; what comes out is
what the ordinary conversion gives."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import freevars.jax as fv
from freevars.jax._convert import from_jit

X = jnp.array([0.5, -0.25, 2.0])
W = jnp.array([1.0, 2.0, -1.0])
V = jnp.array([0.3, 0.1, 0.7])
C = jnp.array([2.0, 1.0, 0.0])


class Counted:
    """A jitted loss that counts its traces: parameters, data and argument."""

    def __init__(self):
        self.traces = 0

        @jax.jit
        def loss(params, v, x):
            self.traces += 1
            return jnp.sum(jnp.sin(params["w"] * x) * v + C)

        self.loss = loss


def ordinary(fun, *args):
    """The conversion of the same calls, which no cache knows: the jitted function is inside."""
    return fv.Closure(lambda *args: fun(*args), *args)


BINDINGS = {
    "partial": lambda f, w, v: functools.partial(f, {"w": w}, v),
    "Partial": lambda f, w, v: Partial(f, {"w": w}, v),
    "partial of a partial": lambda f, w, v: functools.partial(functools.partial(f, {"w": w}), v),
    "by keyword": lambda _, w, v: functools.partial(by_keyword, w=w, v=v),
    "method": lambda f, w, v: Bound(w, v).loss,
}


@jax.jit
def by_keyword(x, *, w, v):
    return jnp.sum(jnp.sin(w * x) * v + C)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Bound:
    w: jax.Array
    v: jax.Array

    @jax.jit
    def loss(self, x):
        return jnp.sum(jnp.sin(self.w * x) * self.v + C)


@pytest.mark.parametrize("binding", BINDINGS)
def test_a_partial_is_what_the_ordinary_conversion_gives(binding) -> None:
    f = Counted().loss
    for k in range(3):
        w, v = W + k, V - k
        partial = BINDINGS[binding](f, w, v)
        got, expected = fv.Closure(partial, X), ordinary(partial, X)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        assert all(a is b for a, b in zip(got.values, expected.values, strict=True))
        np.testing.assert_allclose(got(X), jnp.sum(jnp.sin(w * X) * v + C), rtol=1e-6)
        gradient = jax.grad(lambda f: f(X))(got)
        by_w = next(g for g, value in zip(gradient.values, got.values, strict=True) if value is w)
        np.testing.assert_allclose(by_w, X * v * jnp.cos(w * X), rtol=1e-5)


def test_it_is_traced_once_and_solvers_compile_once() -> None:
    counted, solves = Counted(), []
    solver = jax.jit(lambda f, x: solves.append(1) or x - jax.grad(f)(x))
    for k in range(4):
        f = fv.Closure(functools.partial(counted.loss, {"w": W + k}, V), X)
        slope = jax.grad(lambda x, k=k: jnp.sum(jnp.sin((W + k) * x) * V))(X)
        np.testing.assert_allclose(solver(f, X), X - slope, rtol=1e-5)
    assert counted.traces == 1
    assert len(solves) == 1


def test_an_array_bound_twice_is_one_captured_value() -> None:
    f = Counted().loss
    once = fv.Closure(functools.partial(f, {"w": W}, W), X)
    twice = fv.Closure(functools.partial(f, {"w": W}, V), X)
    once_more = fv.Closure(functools.partial(f, {"w": V}, V), X)
    with_constant = fv.Closure(functools.partial(f, {"w": C}, V), X)
    assert len(once.values) == len(once_more.values) == len(with_constant.values) == 2
    assert len(twice.values) == 3
    assert jax.tree.structure(once) == jax.tree.structure(once_more)
    for closure, w, v in ((once, W, W), (twice, W, V), (once_more, V, V), (with_constant, C, V)):
        np.testing.assert_allclose(closure(X), jnp.sum(jnp.sin(w * X) * v + C), rtol=1e-6)
    assert len(fv.Closure(functools.partial(f, {"w": W}, C), X).values) == 2


def test_traced_values_are_bound_like_any() -> None:
    f = Counted().loss

    def through(w):
        return fv.Closure(functools.partial(f, {"w": w}, V), X)(X)

    expected = X * V * jnp.cos(W * X)
    for _ in range(2):  # known from the second time on
        np.testing.assert_allclose(jax.grad(through)(W), expected, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(jax.grad(through))(W), expected, rtol=1e-5)
        hessian = jax.hessian(through)(W)
        np.testing.assert_allclose(hessian, jnp.diag(-(X**2) * V * jnp.sin(W * X)), rtol=1e-5)
        np.testing.assert_allclose(
            jax.vmap(through)(jnp.stack([W, 2 * W])), [through(W), through(2 * W)], rtol=1e-6
        )


def test_a_jitted_function_that_captures_a_traced_value() -> None:
    def through(w):
        f = jax.jit(lambda v, x: jnp.sum(w * v * x))
        return fv.Closure(functools.partial(f, V), X)(X)

    for _ in range(2):
        np.testing.assert_allclose(jax.grad(through)(W), V * X, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(jax.grad(through))(W), V * X, rtol=1e-6)


def test_other_types_options_and_arguments_are_other_conversions() -> None:
    f = Counted().loss
    make = lambda f, *args: fv.Closure(functools.partial(f, *args), X)
    base = make(f, {"w": W}, V)
    assert jax.tree.structure(make(f, {"w": W[:1]}, V)) != jax.tree.structure(base)
    assert jax.tree.structure(make(f, {"w": W.astype(jnp.bfloat16)}, V)) != jax.tree.structure(base)
    assert len(fv.Closure(f, {"w": W}, V, X).values) == 1
    assert len(fv.Closure(functools.partial(f, {"w": W}), V, X).values) == 2
    donating = jax.jit(f.__wrapped__, donate_argnums=0)
    assert jax.tree.structure(make(donating, {"w": W}, V)) != jax.tree.structure(base)
    assert jax.tree.structure(make(f, {"w": W}, V)) == jax.tree.structure(base)
    with jax.default_matmul_precision("float32"):
        assert jax.tree.structure(make(f, {"w": W}, V)) != jax.tree.structure(base)


def test_what_is_no_array_is_part_of_the_program() -> None:
    f = jax.jit(lambda n, w, x: n * jnp.sum(w * x))
    for n in (2.0, 3.0, np.float32(2)):
        closure = fv.Closure(functools.partial(f, n, W), X)
        assert len(closure.values) == 1
        np.testing.assert_allclose(closure(X), n * jnp.sum(W * X), rtol=1e-6)
    power = jax.jit(lambda w, x, n: jnp.sum(w * x**n), static_argnames="n")
    for n in (2, 3):
        closure = fv.Closure(functools.partial(power, W, n=n), X)
        np.testing.assert_allclose(closure(X), jnp.sum(W * X**n), rtol=1e-6)
    array = fv.Closure(functools.partial(f, np.ones(3, np.float32), W), X)
    assert [type(v).__name__ for v in array.values].count("ndarray") <= 1
    assert len(array.values) == 2


def test_a_function_that_is_no_solution_fails_as_it_does_otherwise() -> None:
    @jax.jit
    def fails(w, x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fv.Closure(functools.partial(fails, W), X)
    with jax.disable_jit():
        f = fv.Closure(functools.partial(Counted().loss, {"w": W}, V), X)
        np.testing.assert_allclose(f(X), jnp.sum(jnp.sin(W * X) * V + C), rtol=1e-6)


def test_nothing_is_kept_beyond_what_jax_keeps() -> None:
    def one():
        constant = jnp.full(3, 7.0)
        f = jax.jit(lambda w, x: jnp.sum(w * x * constant))
        w = W + 1
        fv.Closure(functools.partial(f, w), X)(X)
        return weakref.ref(f), weakref.ref(w), weakref.ref(constant)

    before = len(from_jit._KEPT)
    refs = one()
    gc.collect()
    assert [ref() for ref in refs] == [None, None, None]
    assert len(from_jit._KEPT) <= before
