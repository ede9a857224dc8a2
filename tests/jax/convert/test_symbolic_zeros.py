"""Rules that ask which tangents are zero, and rules that lead to others without end."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_derivatives import SymbolicZero

import freevars.jax as fv
from freevars.errors import CaptureError

X, W = jnp.array([-0.5, 0.7]), jnp.array([2.0, 3.0])


def power(factor=1.0, held=1.0):
    """x**y, also of negative x where no derivative is taken along y."""

    @jax.custom_jvp
    def f(x, y):
        return x**y

    @partial(f.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        (x, y), (dx, dy) = primals, tangents
        terms = []
        if not isinstance(dx, SymbolicZero):
            terms.append(factor * held * y * x ** (y - 1) * dx)
        if not isinstance(dy, SymbolicZero):
            terms.append(jnp.log(x) * x**y * dy)
        return f(x, y), sum(terms)

    return f


def derivatives(fun, x):
    first = jax.grad(lambda x: jnp.sum(fun(x)))
    return [fun(x), first(x), jax.grad(lambda x: jnp.sum(first(x) ** 2))(x)]


def assert_close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_equal_exactly_where_the_rule_is() -> None:
    make = lambda w, factor: fv.Closure(lambda x: power(factor)(x, w), X)
    first = jax.tree.structure(make(W, 1.0))
    assert first == jax.tree.structure(make(W + 1, 1.0))
    assert first != jax.tree.structure(make(W, 2.0))


def test_what_is_known_to_be_zero_is_not_computed() -> None:
    """The derivative along y is no number at a negative x, and is not asked for."""
    closure = fv.Closure(lambda x: power()(x, W), X)
    assert np.isfinite(closure(X)).all()
    assert_close(derivatives(closure, X), derivatives(lambda x: power()(x, W), X))
    _, dot = jax.jvp(lambda x: closure(x), (X,), (X,))
    np.testing.assert_allclose(dot, W * X ** (W - 1) * X, rtol=1e-5)
    by_both = lambda w, x: jnp.sum(fv.Closure(lambda x: power()(x, w), x)(x))
    plain = lambda w, x: jnp.sum(power()(x, w))
    for argnums in (0, 1, (0, 1)):
        got, expected = (jax.jit(jax.grad(f, argnums))(W, -X[:1]) for f in (by_both, plain))
        assert_close(got, expected)


def test_what_is_not_computed_has_no_tangent() -> None:
    """A result that depends on no moving argument stays one whose tangent is known to be zero."""

    @jax.custom_jvp
    def pair(x, y):
        return 2 * x, 3 * y

    @partial(pair.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        dots = zip(tangents, (2.0, 3.0), strict=True)
        return pair(*primals), tuple(t if isinstance(t, SymbolicZero) else c * t for t, c in dots)

    @jax.custom_jvp
    def constant(x):
        return x

    @partial(constant.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        if not isinstance(tangents[0], SymbolicZero):
            raise TypeError
        return primals[0], tangents[0]

    def fun(x):
        first, second = pair(x, W)
        return first * constant(second)

    closure = fv.Closure(fun, X)
    assert_close(derivatives(closure, X), derivatives(fun, X))


def test_what_the_rule_holds_is_replaced_with_the_rest() -> None:
    held = jnp.array([1.5, 2.5])
    fun = lambda held: lambda x: power(held=held)(x, W) + held
    closure = fv.Closure(fun(held), X)
    assert not closure.constants
    doubled = jax.tree.map(lambda v: 2 * v if v is held else v, closure)
    assert_close(derivatives(doubled, X), derivatives(fun(2 * held), X))


def test_in_reverse() -> None:
    @jax.custom_vjp
    def f(x, y):
        return x * y, y

    def forward(x, y):
        return (x.value * y.value, y.value), (x.value if y.perturbed else None, y.value)

    def backward(kept, cotangents):
        (x, y), (first, second) = kept, cotangents
        along_y = 0.0 if x is None else x * first
        return 5 * y * first, along_y if isinstance(second, SymbolicZero) else along_y + second

    f.defvjp(forward, backward, symbolic_zeros=True)
    fun = lambda w: lambda x: f(x, w)[0]
    one, other = fv.Closure(fun(W), X), fv.Closure(fun(W + 1), X)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    by_both = lambda make: jax.grad(lambda w, x: jnp.sum(make(w, x)(x)), (0, 1))(W, X)
    got = by_both(lambda w, x: fv.Closure(fun(w), x))
    assert_close(got, by_both(lambda w, _: fun(w)))


def derivative(order, c):
    """The nth derivative of sin(cx), whose rule leads to the next: one function for each order."""

    @partial(jax.custom_jvp, nondiff_argnums=(1,))
    def f(x, order):
        return c**order * jnp.sin(c * x + order * jnp.pi / 2)

    f.defjvp(lambda order, p, t: (f(p[0], order), f(p[0], order + 1) * t[0]))
    return lambda x: f(x, order)


def test_a_tower_of_rules_is_held_up_to_an_order() -> None:
    closure = fv.Closure(derivative(0, 1.0), 0.3)
    assert jax.tree.structure(closure) == jax.tree.structure(fv.Closure(derivative(0, 1.0), 0.3))
    fun, plain = closure, jnp.sin
    for _ in range(3):
        fun, plain = jax.grad(fun), jax.grad(plain)
        np.testing.assert_allclose(fun(0.3), plain(0.3), rtol=1e-5)
    with pytest.raises(CaptureError, match="leads to itself with other static arguments"):
        jax.grad(fun)(0.3)
