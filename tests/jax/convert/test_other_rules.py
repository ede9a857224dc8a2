"""Rules that stay functions: of `custom_vmap` and `linear_call`.

They count by identity, and what they may read beside the program is a constant, so that no other
value stands for it in one of the two alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import linear_call

import freevars.jax as fv
from freevars.errors import CaptureError

X = jnp.array([0.5, -0.25, 2.0])
V = jnp.array([1.0, 2.0, -1.0])


@custom_vmap
def batched(x):
    return jnp.sin(x)


@batched.def_vmap
def _(size, is_batched, x):
    return 2.0 * jnp.sin(x), is_batched[0]  # other numbers, to see that it ran


def fresh(w):
    @custom_vmap
    def scaled(x):
        return x * w

    @scaled.def_vmap
    def _(size, is_batched, x):
        return 3.0 * x * w, is_batched[0]

    return lambda x: scaled(x)


def linear(w):
    forward, transposed = (lambda r, y: r * w * y), (lambda r, g: r * w * g)
    return lambda x: linear_call(forward, transposed, X, x)


def structure(fun):
    return jax.tree.structure(fv.Closure(fun, X))


def test_a_rule_counts_by_identity() -> None:
    make = lambda w: lambda x: batched(x) * w
    assert structure(make(V)) == structure(make(V + 1))
    assert structure(fresh(V)) != structure(fresh(V))
    assert structure(linear(V)) != structure(linear(V))


def test_a_rule_runs_and_what_is_outside_can_be_replaced() -> None:
    f = fv.Closure(lambda x: batched(x) * V, X)
    other = jax.tree.map(lambda v: 2 * v, f)
    np.testing.assert_allclose(jax.vmap(other)(X[None])[0], 4 * jnp.sin(X) * V, rtol=1e-6)
    np.testing.assert_allclose(other(X), 2 * jnp.sin(X) * V, rtol=1e-6)


@pytest.mark.parametrize("make", [fresh, linear])
def test_what_a_rule_may_read_is_a_constant(make) -> None:
    f = fv.Closure(make(V), X)
    assert any(c is V for c in f.constants)
    np.testing.assert_allclose(f(X), make(V)(X), rtol=1e-6)
    doubled = jax.tree.map(lambda v: 2 * v, f)  # nothing that both read changes in one of them
    if make is fresh:
        np.testing.assert_allclose(jax.vmap(doubled)(X[None])[0], 3 * X * V, rtol=1e-6)
    else:
        got, expected = (jax.vjp(g, X)[1](X)[0] for g in (f, make(V)))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    with pytest.raises(CaptureError, match=r"captures the traced value w \("):
        jax.jit(lambda w: fv.Closure(make(w), X)(X))(V)
