"""What JAX promises of its own `closure_convert` holds here too, with one deliberate difference."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freevars.jax as fv


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def minimise(objective, x0, *hoisted):
    """The minimiser of a quadratic: one Newton step."""
    gradient = jax.grad(objective)(x0, *hoisted)
    return x0 - gradient / jax.grad(jax.grad(objective))(x0, *hoisted)


def _fwd(objective, x0, *hoisted):
    x = minimise(objective, x0, *hoisted)
    return x, (x, hoisted)


def _bwd(objective, residuals, ct):
    x, hoisted = residuals
    curvature = jax.grad(jax.grad(objective))(x, *hoisted)
    _, pullback = jax.vjp(lambda *h: jax.grad(objective)(x, *h), *hoisted)
    return (jnp.zeros_like(x), *pullback(-ct / curvature))


minimise.defvjp(_fwd, _bwd)


def solution(theta):
    objective = lambda x: (x - jnp.sin(theta)) ** 2 * jnp.exp(theta)
    converted, hoisted = fv.closure_convert(objective, 1.0)
    return minimise(converted, 1.0, *hoisted)


def test_value_and_gradient_through_a_custom_rule() -> None:
    np.testing.assert_allclose(solution(0.3), np.sin(0.3), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(solution)(0.3), np.cos(0.3), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(solution))(0.3), np.cos(0.3), rtol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(solution))(jnp.array([0.3, 0.6])), np.cos([0.3, 0.6]), rtol=1e-5
    )


def test_constants_of_several_kinds_are_told_apart() -> None:
    """Floats, integers, concrete and traced values mixed. JAX hoists floats only; here traced
    integers are hoisted too: left in the closure they break `grad(jit(f))` and `scan`."""
    concrete = jnp.array([1.0, 2.0])

    def outer(w, n):
        fun = lambda x: x * w * concrete + n * jnp.arange(2) + np.array([1.0, 1.0], np.float32)
        converted, hoisted = fv.closure_convert(fun, concrete)
        assert {str(h.dtype) for h in hoisted} == {"float32", "int32"}
        return jnp.sum(converted(concrete, *hoisted))

    for transformed in (jax.grad(outer), jax.jit(jax.grad(outer)), jax.grad(jax.jit(outer))):
        # only what is traced is hoisted, so trace both
        got = jax.jit(transformed)(2.0, 3)
        np.testing.assert_allclose(got, 5.0)


def test_traced_integers_in_a_scan() -> None:
    def step(total, n):
        converted, hoisted = fv.closure_convert(lambda x: x * n, 1.0)
        assert len(hoisted) == 1
        return total + converted(2.0, *hoisted), None

    total, _ = jax.lax.scan(step, 0.0, jnp.arange(4))
    assert total == 12.0


def test_another_structure_is_refused() -> None:
    converted, hoisted = fv.closure_convert(lambda d: d["x"] + 1, {"x": jnp.ones(2)})
    np.testing.assert_array_equal(converted({"x": jnp.zeros(2)}, *hoisted), 1.0)
    with pytest.raises(TypeError, match=r"args\[0\] .*expected a dict, got a list"):
        converted([jnp.zeros(2)], *hoisted)
    with pytest.raises(TypeError, match="does not match the example"):
        converted(jnp.zeros(2), *hoisted)
