"""`quad` and `solve_ivp` with scipy's signatures, against scipy, closed forms and differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import freevars.jax.scipy as fs
from freevars.errors import NotASolutionError


def decay(rate, ts, **options):
    fun = lambda t, y: -rate * jnp.array([1.0, 2.0]) * y
    return fs.solve_ivp(fun, (0.0, 2.0), jnp.array([1.0, 3.0]), t_eval=ts, **options)


def test_quad_is_scipys() -> None:
    p, f = 1.7, lambda t: jnp.sin(1.7 * t) / (1 + t)
    value, error = fs.quad(f, 0.0, 2.0)
    told = scipy.integrate.quad(lambda t: np.sin(p * t) / (1 + t), 0.0, 2.0)
    np.testing.assert_allclose((value, error), told, rtol=1e-6)
    options = {"epsabs": 1e-3, "epsrel": 1e-3, "limit": 3, "points": [0.5]}
    told = scipy.integrate.quad(lambda t: abs(t - 0.5), 0.0, 1.0, **options)
    np.testing.assert_allclose(
        fs.quad(lambda t: jnp.abs(t - 0.5), 0, 1, **options), told, rtol=1e-6
    )


def test_derivatives_of_quad() -> None:
    def area(p, a, b):
        return fs.quad(lambda t, q: p * q * jnp.exp(-p * t), a, b, args=(2.0,))[0]

    exact = lambda p, a, b: 2 * (jnp.exp(-p * a) - jnp.exp(-p * b))
    for b in (2.0, jnp.inf):
        for transform in (jax.grad, lambda f, i: jax.jit(jax.grad(f, i)), jax.jacfwd):
            got = transform(area, (0, 1, 2))(1.3, 0.2, b)
            expected = (*jax.grad(exact, (0, 1))(1.3, 0.2, min(b, 1e3)), 2.6 * np.exp(-1.3 * b))
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)


def test_an_integral_does_not_depend_on_where_it_is_cut() -> None:
    area = lambda c: fs.quad(lambda t: jnp.abs(t - c), 0.0, 1.0, points=[c])[0]
    np.testing.assert_allclose(jax.grad(area)(0.3), 2 * 0.3 - 1)


def test_quad_of_complex_numbers() -> None:
    def wave(p):
        return fs.quad(lambda t: jnp.exp(1j * p * t), 0.0, 1.0, complex_func=True)[0]

    exact = lambda p: (jnp.exp(1j * p) - 1) / (1j * p)
    np.testing.assert_allclose(
        jax.jvp(wave, (2.0,), (1.0,)), jax.jvp(exact, (2.0,), (1.0,)), rtol=1e-9
    )
    np.testing.assert_allclose(
        jax.grad(lambda p: jnp.abs(wave(p)))(2.0), jax.grad(lambda p: jnp.abs(exact(p)))(2.0)
    )


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"full_output": 1}, "full_output= has no place"),
        ({"weight": "cos", "wvar": 2.0}, "write the weight into the function"),
        ({"func": lambda t: jnp.stack([t, t])}, r"a number of shape \(\)"),
        ({"func": lambda t: 1j * t}, "complex_func=True"),
        ({"func": lambda t: np.exp(float(t))}, "expected a function in JAX"),
    ],
)
def test_mistakes_of_quad(given, text) -> None:
    with pytest.raises(TypeError, match=text):
        fs.quad(**({"func": lambda t: t, "a": 0.0, "b": 1.0} | given))


def test_times_that_were_rounded() -> None:
    ts = jnp.linspace(0.0, 0.1, 2, dtype=jnp.float32)  # 0.1 is less in float64
    y = fs.solve_ivp(lambda t, y: -y, (0.0, 0.1), jnp.ones(1), t_eval=ts).y[0, -1]
    np.testing.assert_allclose(y, np.exp(-0.1), rtol=1e-6)


def test_lists_of_numbers_are_vectors() -> None:
    y = fs.solve_ivp(lambda t, y: [y[1], -y[0]], (0, 1), [1, 0], t_eval=[1.0], rtol=1e-8).y
    np.testing.assert_allclose(y[:, -1], [np.cos(1), -np.sin(1)], rtol=1e-6)


def test_times_in_a_list_have_derivatives() -> None:
    last = lambda t: fs.solve_ivp(lambda t, y: -y, (0, 2), jnp.ones(1), t_eval=[0.5, t]).y[0, -1]
    np.testing.assert_allclose(jax.grad(last)(1.0), -np.exp(-1.0), rtol=1e-5)


def test_solve_ivp_is_scipys() -> None:
    ts = np.array([0.5, 1.0, 2.0])
    got = decay(0.7, ts, method="RK45", rtol=1e-5, atol=1e-8)
    told = scipy.integrate.solve_ivp(
        lambda t, y: -0.7 * np.array([1.0, 2.0]) * y,
        (0, 2),
        [1.0, 3.0],
        t_eval=ts,
        rtol=1e-5,
        atol=1e-8,
    )
    np.testing.assert_allclose(got.y, told.y, rtol=1e-9)
    np.testing.assert_array_equal(got.t, told.t)
    assert got.message == told.message
    assert (bool(got.success), int(got.status), int(got.nfev)) == (True, 0, told.nfev)


@pytest.mark.parametrize(
    "method", ["RK45", *(pytest.param(m, marks=pytest.mark.slow) for m in ("Radau", "LSODA"))]
)
def test_derivatives_of_solve_ivp(method) -> None:
    exact = lambda rate, ts: jnp.sum(jnp.exp(-rate * ts) + 3 * jnp.exp(-2 * rate * ts))
    total = lambda rate, ts: jnp.sum(decay(rate, ts, method=method, rtol=1e-7).y)
    ts = jnp.array([0.5, 1.0, 2.0])
    for got, expected in zip(
        jax.grad(total, (0, 1))(0.7, ts), jax.grad(exact, (0, 1))(0.7, ts), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jacfwd(total)(0.7, ts), jax.grad(exact)(0.7, ts), rtol=1e-5)


def test_backwards_in_time_by_the_first_time_and_in_a_batch() -> None:
    def end(rate, first):
        fun = lambda t, y, a: {"u": -a * y["u"] + 0 * t}
        out = fs.solve_ivp(
            fun, (first, 0.0), {"u": jnp.ones(2)}, t_eval=jnp.array([1.0, 0.0]), args=(rate,)
        )
        return out.y["u"][0, -1]

    # exp(rate first)
    got = jax.vmap(jax.grad(end, (0, 1)), (0, None))(jnp.array([0.5, 1.0]), 2.0)
    np.testing.assert_allclose(got[0], 2 * np.exp([1.0, 2.0]), rtol=1e-5)
    np.testing.assert_allclose(got[1], np.array([0.5, 1.0]) * np.exp([1.0, 2.0]), rtol=1e-5)


@pytest.mark.slow  # backwards it takes its time to fail
def test_stiff_equations_go_forwards() -> None:
    """With tolerances for each component, which the larger system of a derivative extends."""

    def end(rate, **how):
        fun = lambda t, y: jnp.stack([-rate * (y[0] - jnp.cos(t)), y[0]])
        ts, atol = jnp.array([1.0]), np.array([1e-10, 1e-9])
        out = fs.solve_ivp(fun, (0.0, 1.0), jnp.zeros(2), "BDF", ts, rtol=1e-6, atol=atol, **how)
        return out.y[0, -1]

    with pytest.raises(NotASolutionError, match='reverse="sensitivities"'):
        jax.grad(end)(100.0)
    # y = (r^2 cos t + r sin t) / (1 + r^2) once the start is forgotten
    exact = jax.grad(lambda r: (r**2 * jnp.cos(1.0) + r * jnp.sin(1.0)) / (1 + r**2))(100.0)
    got = jax.grad(lambda r: end(r, reverse="sensitivities"))(100.0)
    np.testing.assert_allclose(got, exact, rtol=1e-4)


@pytest.mark.parametrize("reverse", ["adjoint", "sensitivities"])
def test_no_derivative_past_the_end_of_a_solution(reverse) -> None:
    """y = 1 / (1 - rate t) ends at t = 1 / rate."""

    def last(rate):
        square = lambda t, y: rate * y**2
        times = jnp.array([0.5, 1.5])
        return fs.solve_ivp(square, (0, 1.5), [1.0], t_eval=times, reverse=reverse).y[0, -1]

    with pytest.raises(NotASolutionError, match="there is no derivative: a state"):
        jax.grad(last)(1.0)
    found = jax.vmap(jax.grad(last))(jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(found, [1.5 / (1 - 1.5 * 0.5) ** 2, np.nan], rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"t_eval": None}, TypeError, "t_eval: expected the times"),
        ({"t_eval": 1.0}, TypeError, r"t_eval: expected the times .* got shape \(\)"),
        ({"t_eval": jnp.array([3.0])}, ValueError, "expected times in t_span"),
        ({"t_span": (0.0, 0.5, 1.0)}, TypeError, "t_span: expected a pair"),
        ({"t_span": 1.0}, TypeError, "t_span: expected a pair"),
        ({"events": lambda t, y: y[0]}, TypeError, "events= has no place"),
        ({"jac": lambda t, y: y}, TypeError, "jac= is not needed"),
        ({"lband": 1}, TypeError, "lband= has no place"),
    ],
)
def test_mistakes_of_solve_ivp(given, error, text) -> None:
    call = {"t_span": (0.0, 1.0), "y0": jnp.ones(1), "t_eval": jnp.array([1.0])}
    with pytest.raises(error, match=text):
        fs.solve_ivp(lambda t, y: -y, **(call | given))
