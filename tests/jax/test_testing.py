"""`fv.testing.check_rule`: passes what is right, and names what is wrong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freevars.jax as fv
from freevars.errors import NotASolutionError

pytestmark = pytest.mark.slow  # each test compiles rules with their systems and checks


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _newton(fun, x0, *args, steps=20):
    step = lambda _, x: x - fun(x, *args) / jax.grad(fun)(x, *args)
    return jax.lax.fori_loop(0, steps, step, x0)


newton = fv.root(_newton)
W, OFFSET, COUNT = jnp.array([1.0, 2.0]), jnp.array(1.5 + 0.5j), jnp.array(3)


def residual(x):
    return x**3 - jnp.sum(W**2) * COUNT / 3 - jnp.abs(OFFSET) ** 2


@pytest.mark.parametrize("order", [1, 2])
def test_a_right_rule_passes(order):
    fv.testing.check_rule(newton, residual, 1.0, order=order)
    fv.testing.check_rule(newton, lambda x, a: x**2 - a * W[0], 1.0, 2.0, steps=30, order=order)


def test_float32_has_a_tolerance_of_its_own():
    with jax.enable_x64(False):
        w = jnp.array(2.0)
        assert w.dtype == jnp.float32
        fv.testing.check_rule(newton, lambda x: x**2 - w, 1.0, order=2)


def test_aux_is_left_out():
    with_aux = fv.root(lambda fun, x0: (_newton(fun, x0), 20), has_aux=True)
    fv.testing.check_rule(with_aux, residual, 1.0)


NUMPYS = (" ACTUAL", " DESIRED")  # what NumPy calls the two sides


@jax.custom_jvp
def wrong_square(x):
    return x**2


wrong_square.defjvp(lambda x, d: (x[0] ** 2, 3 * x[0] * d[0]))


@jax.custom_vjp
def wrong_in_reverse(x):
    return x**2


wrong_in_reverse.defvjp(lambda x: (x**2, x), lambda x, g: (3 * x * g,))


@pytest.mark.parametrize("wrong", [wrong_square, wrong_in_reverse])
def test_a_wrong_derivative_is_named_with_both_numbers(wrong):
    scale, shift = jnp.array(2.0), jnp.array(1.0)
    fun = lambda x: x**2 - wrong(scale) - shift
    # x = sqrt(5); dx/dscale = 2 / x, and with the wrong rule 3 / x.
    with pytest.raises(AssertionError) as caught:
        fv.testing.check_rule(newton, fun, 2.0)
    text = str(caught.value)
    assert "newton: the derivative by scale is not" in text
    got, expected = (float(re.search(rf"{side}: array\((.*?)\)", text)[1]) for side in NUMPYS)
    assert got / expected == pytest.approx(3 / 2, rel=1e-6)


def test_a_wrong_imaginary_part_is_found():
    z = jnp.array(1.0 + 2.0j)
    fun = lambda x: x**2 - z.real**2 - jax.lax.stop_gradient(z.imag) ** 2
    with pytest.raises(AssertionError, match=r"by z is not"):
        fv.testing.check_rule(newton, fun, 2.0)


def test_a_wrong_second_derivative_is_found():
    @jax.custom_jvp
    def square(x):
        return x**2

    square.defjvp(lambda x, d: (x[0] ** 2, 2 * jax.lax.stop_gradient(x[0]) * d[0]))
    a = jnp.array(2.0)
    fv.testing.check_rule(newton, lambda x: x**2 - square(a), 1.0)
    with pytest.raises(AssertionError, match=r"(?s)by a is not .*JVP of"):
        fv.testing.check_rule(newton, lambda x: x**2 - square(a), 1.0, order=2)


def test_extra_arguments_are_named():
    fun = lambda x, a, b: x**2 - a * wrong_square(b)
    with pytest.raises(AssertionError, match="by args/1 is not"):
        fv.testing.check_rule(newton, fun, 1.0, 2.0, 3.0)


def test_tolerances_are_the_user_s():
    a = jnp.array(2.0)
    slightly = lambda x: x**2 - a - 1e-3 * jax.lax.stop_gradient(a)
    with pytest.raises(AssertionError):
        fv.testing.check_rule(newton, slightly, 1.0)
    fv.testing.check_rule(newton, slightly, 1.0, rtol=1e-2)
    fv.testing.check_rule(newton, slightly, 1.0, atol=1e-2, step=1e-4)


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(TypeError, match="decorated by root"):
        fv.testing.check_rule(_newton, residual, 1.0)
    with pytest.raises(ValueError, match="no floating or complex"):
        fv.testing.check_rule(newton, lambda x: x**2 - 2.0, 1.0)
    a = jnp.array(50.0)
    with pytest.raises(NotASolutionError):
        fv.testing.check_rule(newton, lambda x: x**2 - a, 1.0, steps=1)


# Mutations: a solver, a rule or a linear system that is wrong in one way each.

TARGET = np.array([1.0, 2.0])  # of NumPy: float64 whatever the setting at import


def _equations(x):
    return jnp.stack([x[0] ** 2 + 0.3 * x[1], x[1] ** 3 + 0.5 * x[0]]) - TARGET


def _newton_system(fun, x0, steps=20):
    step = lambda _, x: x - jnp.linalg.solve(jax.jacobian(fun)(x), fun(x))
    return jax.lax.fori_loop(0, steps, step, x0)


@jax.custom_jvp
def _dropped(w):
    return w**2


_dropped.defjvp(lambda w, d: (w[0] ** 2, jnp.zeros_like(d[0])))


@jax.custom_jvp
def _negated(w):
    return w**2


_negated.defjvp(lambda w, d: (w[0] ** 2, -2 * w[0] * d[0]))

WRONG = {
    "stops early": (
        fv.root(lambda fun, x0: _newton_system(fun, x0, steps=1), check=False),
        _equations,
    ),
    "stops early, less so": (
        fv.root(lambda fun, x0: _newton_system(fun, x0, steps=2), check=False),
        _equations,
    ),
    "ignores the function": (fv.root(lambda fun, x0: x0 * 1.1, check=False), _equations),
    "is another condition": (
        fv.root(lambda fun, x0: _newton_system(lambda x: fun(x) - 0.5 * x, x0), check=False),
        _equations,
    ),
    "a diagonal for the system": (
        fv.root(
            _newton_system, linear_solve=lambda apply, b: b / apply(jnp.ones_like(b)), check=False
        ),
        _equations,
    ),
    "the system transposed": (
        fv.root(
            _newton_system,
            linear_solve=lambda apply, b: jnp.linalg.solve(
                jax.vmap(apply)(jnp.eye(b.size, dtype=b.dtype)), b
            ),
            check=False,
        ),
        _equations,
    ),
    "the sign of the system": (
        fv.root(
            _newton_system,
            linear_solve=lambda apply, b: (
                -jnp.linalg.solve(jax.vmap(apply, out_axes=1)(jnp.eye(b.size, dtype=b.dtype)), b)
            ),
            check=False,
        ),
        _equations,
    ),
    "a fixed point for a root": (
        fv.fixed_point(_newton_system, check=False),
        _equations,
    ),
    "a rule that drops a value": (
        fv.root(_newton_system),
        lambda x: _equations(x) - 0.1 * _dropped(TARGET),
    ),
    "a rule of the wrong sign": (
        fv.root(_newton_system),
        lambda x: _equations(x) - 0.1 * _negated(TARGET),
    ),
    "a wrong custom_vjp": (
        fv.root(_newton_system),
        lambda x: _equations(x) - 0.1 * wrong_in_reverse(TARGET),
    ),
    "a value that is detached": (
        fv.root(_newton_system),
        lambda x: _equations(x) - 0.1 * jax.lax.stop_gradient(TARGET),
    ),
}


def test_the_right_system_passes():
    fv.testing.check_rule(fv.root(_newton_system), _equations, jnp.ones(2), order=2)
    solve = lambda apply, b: jnp.linalg.solve(
        jax.vmap(apply, out_axes=1)(jnp.eye(b.size, dtype=b.dtype)), b
    )
    right = fv.root(_newton_system, linear_solve=solve, check=False)
    fv.testing.check_rule(right, _equations, jnp.ones(2))


@pytest.mark.parametrize("name", WRONG)
def test_a_mutation_is_caught(name):
    solver, fun = WRONG[name]
    with pytest.raises(AssertionError, match="the derivative by "):
        fv.testing.check_rule(solver, fun, jnp.ones(2))
