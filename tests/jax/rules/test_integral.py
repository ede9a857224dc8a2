"""Integrals: Leibniz' rule against closed forms, for solvers in JAX and on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from jax import lax

import freevars.jax as fv
from freevars.errors import CaptureError, NotASolutionError, StructureError

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)
P = np.array([0.7, 0.3])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def gauss(f, a, b):
    """A rule with fixed nodes, for any pytree."""
    values = jax.vmap(f)((a + b) / 2 + (b - a) / 2 * NODES)
    return jax.tree.map(lambda v: (b - a) / 2 * jnp.tensordot(WEIGHTS, v, 1), values)


@fv.integral
@fv.on_host
def quad(f, a, b):
    return scipy.integrate.quad(f, a, b, epsabs=1e-12, epsrel=1e-12)[0]


def damped(integrate, p, a, b):
    return integrate(lambda t: jnp.exp(-p[0] * t) * jnp.cos(p[1] * t), a, b)


def exact(p, a, b):
    c = -p[0] + 1j * p[1]
    return jnp.real((jnp.exp(c * b) - jnp.exp(c * a)) / c)


ALL = (0, 1, 2)
TRANSFORMATIONS = {
    "grad": lambda g: jax.grad(g, ALL),
    "grad of jit": lambda g: jax.grad(jax.jit(g), ALL),
    "jacfwd": lambda g: jax.jacfwd(g, ALL),
    "hessian": lambda g: jax.hessian(g, ALL),
    "reverse over reverse": lambda g: jax.jacrev(jax.jacrev(g, ALL), ALL),
    "reverse over forward": lambda g: jax.jacrev(jax.jacfwd(g, ALL), ALL),
    "vmap": lambda g: (
        lambda p, a, b: jax.vmap(jax.grad(g, ALL), (None, 0, None))(p, jnp.stack([a, a / 2]), b)
    ),
    "scan": lambda g: jax.grad(
        lambda p, a, b: lax.scan(lambda c, x: (c + g(p * c, a, x), None), b, b * jnp.arange(2.0))[
            0
        ],
        ALL,
    ),
}


SLOW = {"grad of jit", "jacfwd", "reverse over reverse", "reverse over forward"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(t, marks=[pytest.mark.slow] if t in SLOW else []) for t in TRANSFORMATIONS],
)
def test_equals_the_closed_form(name) -> None:
    integrate, transform = fv.integral(gauss), TRANSFORMATIONS[name]
    got = transform(lambda *args: damped(integrate, *args))(P, 0.2, 1.3)
    expected = transform(exact)(P, 0.2, 1.3)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("takes", [None, "pytree", "array", "scalar"])
def test_the_same_gradient_in_every_form(takes) -> None:
    integrate = fv.integral(gauss, takes=takes)
    got = jax.grad(lambda *args: damped(integrate, *args), ALL)(P, 0.2, 1.3)
    for x, y in zip(got, jax.grad(exact, ALL)(P, 0.2, 1.3), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10)


def test_a_solver_of_pytrees_integrates_a_gradient_at_once() -> None:
    w, shapes = jnp.linspace(0.1, 1.0, 50), []

    def solver(f, a, b):
        value = gauss(f, a, b)
        shapes.append([leaf.shape for leaf in jax.tree.leaves(value)])
        return value

    for takes, expected in (("pytree", (50,)), ("array", (50,))):
        shapes.clear()
        integrate = fv.integral(solver, takes=takes, check=False)
        got = jax.grad(lambda w: integrate(lambda t: jnp.sum(jnp.sin(w * t)), 0.0, 1.0))(w)
        # d/dw int sin(w t) = int t cos(w t) dt over [0, 1]
        np.testing.assert_allclose(got, (np.cos(w) + w * np.sin(w) - 1) / w**2, rtol=1e-9)
        assert shapes == [[()], [expected]]


def test_a_solver_of_numbers_evaluates_the_integrand_once_for_all() -> None:
    """The batch over components is not a batch over points."""
    seen = []

    def counted(t):
        jax.debug.callback(lambda _: seen.append(1), t)
        return t

    w = jnp.linspace(0.1, 1.0, 5)
    integrate = fv.integral(lambda f, a, b: (b - a) * f((a + b) / 2), check=False)
    pull = jax.vjp(lambda w: integrate(lambda t: jnp.sum(w * counted(t)), 0.0, 1.0), w)[1]
    jax.effects_barrier()
    seen.clear()
    np.testing.assert_allclose(pull(1.0)[0], 0.5)
    jax.effects_barrier()
    assert len(seen) == 1


def test_a_solver_of_numbers_on_the_host() -> None:
    calls = []

    @fv.integral
    @fv.on_host
    def solve(f, a, b):
        assert isinstance(f(a), float)
        calls.append((a, b))
        return scipy.integrate.quad(f, a, b)[0]

    def gaussian(p):
        return solve(lambda t: p[1] * jnp.exp(-p[0] * t**2), 0.0, jnp.inf)

    # sqrt(pi / p0) p1 / 2
    got = jax.grad(gaussian)(P)
    np.testing.assert_allclose(got, np.sqrt(np.pi / P[0]) * np.array([-P[1] / P[0] / 4, 0.5]))
    assert [b for _, b in calls] == [np.inf] * 3
    calls.clear()
    np.testing.assert_allclose(jax.jit(jax.grad(gaussian))(P), got)
    assert len(calls) == 2  # the value is not asked for


def test_infinite_limits_do_not_move() -> None:
    def tail(a, b):
        return quad(lambda t: jnp.exp(-t) / t, a, b)

    assert jax.grad(tail, 1)(1.0, jnp.inf) == 0.0
    assert jax.grad(jax.grad(tail, 1), 1)(1.0, jnp.inf) == 0.0
    np.testing.assert_allclose(jax.grad(tail)(1.0, jnp.inf), -np.exp(-1.0))
    np.testing.assert_allclose(jax.grad(tail, 1)(1.0, 2.0), np.exp(-2.0) / 2)


def test_structures_and_types() -> None:
    """A pytree with a complex part, of captured integers and complex numbers; derivatives of both
    modes agree with the closed form."""
    integrate, n = fv.integral(gauss), jnp.arange(1, 3)

    def program(z):
        out = integrate(lambda t: {"c": (z * t) ** n, "r": jnp.abs(z) * t}, 0.0, 1.0)
        return jnp.sum(jnp.abs(out["c"]) ** 2) + out["r"]

    def closed(z):
        return jnp.sum(jnp.abs(z**n / (n + 1)) ** 2) + jnp.abs(z) / 2

    z = 0.4 + 0.3j
    np.testing.assert_allclose(jax.grad(program)(z), jax.grad(closed)(z), rtol=1e-9)
    np.testing.assert_allclose(
        jax.jvp(program, (z,), (1 - 2j,))[1], jax.jvp(closed, (z,), (1 - 2j,))[1], rtol=1e-9
    )


def test_extra_arguments_and_options() -> None:
    @fv.integral(has_aux=True)
    def solve(f, low, high, args=(), *, scale=1.0):
        return scale * gauss(lambda t: f(t, *args), low, high), {"scale": scale}

    def program(c, scale):
        value, aux = solve(lambda t, c: c * t, 0, 2, args=(c,), scale=scale)
        return value + 0 * aux["scale"]

    assert jax.grad(program)(3.0, 1.0) == pytest.approx(2.0)
    with pytest.raises(CaptureError, match="the option scale="):
        jax.grad(program, 1)(3.0, 1.0)


def test_an_integrand_that_knows_no_vmap() -> None:
    def on_host(f, x):
        return jax.pure_callback(f, jax.ShapeDtypeStruct((), jnp.float64), x)

    sine = jax.custom_jvp(lambda x: on_host(np.sin, x))
    sine.defjvp(lambda x, dot: (sine(*x), on_host(np.cos, *x) * dot[0]))

    def by_points(f, a, b):
        nodes, weights = map(jnp.asarray, (NODES, WEIGHTS))
        term = lambda i, total: total + weights[i] * f((a + b) / 2 + (b - a) / 2 * nodes[i])
        return (b - a) / 2 * lax.fori_loop(0, 16, term, 0.0)

    total = lambda w: fv.integral(by_points)(lambda t: sine(w * t), 0.0, 1.0)
    slope = np.sin(0.5) / 0.5 - (1 - np.cos(0.5)) / 0.25  # of (1 - cos w) / w
    assert jax.grad(total)(0.5) == pytest.approx(slope, rel=1e-12)
    assert jax.jvp(total, (0.5,), (1.0,))[1] == pytest.approx(slope, rel=1e-12)


def peak(integrate, c):
    """Narrower than the nodes of `gauss` are apart."""
    return integrate(lambda t: 1 + jnp.exp(-(((t - c) / 0.02) ** 2)), 0.0, 1.0)


def test_a_derivative_that_the_points_miss_is_refused() -> None:
    integrate = fv.integral(gauss)
    with pytest.raises(NotASolutionError, match=r"gauss: .* integrated over both halves"):
        jax.grad(lambda c: peak(integrate, c))(0.37)
    with pytest.raises(NotASolutionError, match="accept more by the rule's tol="):
        jax.jvp(lambda c: peak(integrate, c), (0.37,), (1.0,))
    assert np.isnan(jax.jit(jax.grad(lambda c: peak(integrate, c)))(0.37))
    by_rule = jax.grad(lambda c: peak(gauss, c))(0.37)
    unchecked = fv.integral(gauss, check=False)
    np.testing.assert_allclose(jax.grad(lambda c: peak(unchecked, c))(0.37), by_rule)
    warning = fv.integral(gauss, on_failure="warn")
    with pytest.warns(UserWarning, match="cannot be trusted"):
        assert np.isnan(jax.grad(lambda c: peak(warning, c))(0.37))


def test_no_unit_and_no_symmetry_is_a_failure() -> None:
    """Derivatives that are zero because their parts cancel, and integrands of any size."""
    integrate = fv.integral(gauss)
    waves = lambda p: integrate(lambda t: p * jnp.cos(4 * jnp.pi * t), 0.0, 1.0)
    distance = lambda c: integrate(lambda t: (t - c) ** 2, 0.0, 1.0)
    nothing = lambda c: integrate(lambda t: t + 0 * c, 0.0, 1.0)
    for fun in (waves, distance, nothing):
        np.testing.assert_allclose(jax.grad(fun)(0.5), 0.0, atol=1e-9)
    assert jax.grad(lambda c: integrate(lambda t: c * t, 1.0, 1.0))(2.0) == 0.0
    small = jax.grad(lambda c: integrate(lambda t: 1e-200 * jnp.exp(c * t), 0.0, 1e3))(1e-3)
    np.testing.assert_allclose(small, 1e-200 * 1e6, rtol=1e-9)
    single = jnp.array([0.0, 1.0], jnp.float32)
    slope = jax.grad(lambda c: integrate(lambda t: jnp.exp(c * t), *single))(single[1])
    np.testing.assert_allclose(slope, 1.0, rtol=1e-5)


def test_an_absolute_tolerance_that_accepts_anything_is_told() -> None:
    """scipy's is 1.5e-8, and looks no closer at what is smaller."""
    area = lambda c: fv.scipy.quad(lambda t: 1e-10 * jnp.exp(-(((t - c) / 1e-3) ** 2)), 0, 1)[0]
    with pytest.raises(NotASolutionError, match="quad: the derivative cannot be trusted"):
        jax.grad(lambda w: w * area(w))(0.37)


def test_methods() -> None:
    class Rule:
        def __init__(self, scale):
            self.scale = scale

        @fv.integral
        def solve(self, f, a, b):
            return gauss(f, a, b) * self.scale

    for scale in (1.0, 2.0):
        got = jax.grad(lambda w: Rule(scale).solve(lambda t: w * t, 0.0, 1.0))(1.0)
        assert got == pytest.approx(scale / 2)


def test_an_integral_that_is_a_whole_number() -> None:
    solve = fv.integral(lambda f, a, b: 3, check=False)
    value, slope = jax.value_and_grad(lambda c: solve(lambda t: c * t, 0.0, 1.0))(1.0)
    assert (value, slope) == (3.0, 3.0)
    assert jnp.issubdtype(value.dtype, jnp.floating)


def test_what_is_refused() -> None:
    integrate = fv.integral(gauss)
    with pytest.raises(StructureError, match="b: expected a real number"):
        integrate(lambda t: t, 0.0, jnp.ones(2))
    with pytest.raises(StructureError, match="the structure and shapes of the integrand"):
        fv.integral(lambda f, a, b: (f(a), f(b)))(lambda t: t, 0.0, 1.0)
    for nothing in (None, "t"):
        with pytest.raises(StructureError, match="the integrand: expected a number, an array"):
            integrate(lambda t, nothing=nothing: nothing, 0.0, 1.0)


def test_what_the_solver_reads_itself_has_no_derivative() -> None:
    """Neither an option nor a captured value, whether the integrand reads it too or not."""

    def scaled(f, a, b, scale=1.0):
        return gauss(f, a, b) * scale

    def holding(c):
        return fv.integral(lambda f, a, b: scaled(f, a, b, c))

    by_option = fv.integral(scaled)
    for integrand in (lambda c: lambda t: t, lambda c: lambda t: c * t):
        for transform in (jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))):
            with pytest.raises(CaptureError, match=r"the option scale=.* reads itself"):
                transform(lambda c, of=integrand: by_option(of(c), 0.0, 1.0, scale=c))(2.0)
            with pytest.raises(CaptureError, match="captures, which the solver reads itself"):
                transform(lambda c, of=integrand: holding(c)(of(c), 0.0, 1.0))(2.0)
    # Declared constant, or not differentiated by.
    still = jax.lax.stop_gradient
    got = jax.grad(lambda c: by_option(lambda t: c * t, 0.0, 1.0, scale=still(c)))(2.0)
    assert got == pytest.approx(1.0)
    assert jax.jit(lambda c: holding(c)(lambda t: t, 0.0, 1.0))(2.0) == pytest.approx(1.0)
    with pytest.raises(CaptureError, match="whose traced values are all arguments"):
        jax.jit(lambda c: jax.grad(lambda p: holding(c)(lambda t: p * t, 0.0, 1.0))(1.0))(2.0)
