"""Differential equations: the adjoint equation and forward sensitivities against closed forms, for
solvers in JAX and on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from jax import lax
from jax.experimental import ode

import freevars.jax as fv
from freevars.errors import NotASolutionError, StructureError

ARGS = (1.3, np.array([0.5, 0.2]), np.array([0.1, 0.6, 1.0]))
WEIGHTS = np.array([1.0, 2.0, 3.0])
ALL = (0, 1, 2)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def rk4(field, y0, ts, steps=20):
    """For any pytree, and times in any order."""

    def leg(y, ends):
        h = (ends[1] - ends[0]) / steps

        def step(y, i):
            t = ends[0] + i * h
            add = lambda k, c: jax.tree.map(lambda y, k: y + c * h * k, y, k)
            k1 = field(t, y)
            k2 = field(t + h / 2, add(k1, 0.5))
            k3 = field(t + h / 2, add(k2, 0.5))
            k4 = field(t + h, add(k3, 1.0))
            slope = jax.tree.map(lambda a, b, c, d: (a + 2 * (b + c) + d) / 6, k1, k2, k3, k4)
            return add(slope, 1.0), None

        y = lax.scan(step, y, jnp.arange(steps))[0]
        return y, y

    rest = lax.scan(leg, y0, (ts[:-1], ts[1:]))[1]
    return jax.tree.map(lambda y, ys: jnp.concatenate([y[None], ys]), y0, rest)


@fv.odeint
@fv.on_host
def on_host(field, y0, ts, method="DOP853"):
    out = scipy.integrate.solve_ivp(
        field, (ts[0], ts[-1]), y0, method, t_eval=ts, rtol=1e-10, atol=1e-12
    )
    return out.y.T


SOLVERS = {
    "rk4": fv.odeint(rk4),
    "sensitivities": fv.odeint(rk4, reverse="sensitivities"),
    "pytree": fv.odeint(rk4, takes="pytree"),
    "jax": lambda f, y0, ts: fv.odeint(ode.odeint, tfirst=False)(
        lambda y, t: f(t, y), y0, ts, rtol=1e-10, atol=1e-10
    ),
    "host": on_host,
}


def oscillator(solve, w, y0, ts):
    ys = solve(lambda t, y: jnp.stack([y[1], -(w**2) * y[0]]), y0, ts)
    return jnp.sum(ys[:, 0] * WEIGHTS[: len(ts)])


def exact(w, y0, ts):
    t = ts - ts[0]
    y = y0[0] * jnp.cos(w * t) + y0[1] / w * jnp.sin(w * t)
    return jnp.sum(y * WEIGHTS[: len(ts)])


TRANSFORMATIONS = {
    "grad": lambda g: jax.grad(g, ALL),
    "jit": lambda g: jax.jit(jax.grad(g, ALL)),
    "jvp": lambda g: lambda *args: jax.jvp(g, args, args),
    "hessian": lambda g: jax.hessian(g, ALL),
    "reverse over reverse": lambda g: jax.jacrev(jax.jacrev(g, ALL), ALL),
    "vmap": lambda g: (
        lambda w, y0, ts: jax.vmap(jax.grad(g, ALL), (0, None, None))(jnp.stack([w, w / 2]), y0, ts)
    ),
}
TABLE = [
    *[(s, t) for s in SOLVERS for t in ("grad", "jvp")],
    *[("rk4", t) for t in TRANSFORMATIONS if t not in {"grad", "jvp"}],
    ("sensitivities", "hessian"),
    ("host", "jit"),
]
SLOW = {"hessian", "reverse over reverse", "vmap"}
DEAR = {("pytree", "jvp"), ("sensitivities", "jvp"), ("jax", "jvp"), ("host", "jit")}


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        pytest.param(*row, marks=[pytest.mark.slow] if row[1] in SLOW or row in DEAR else [])
        for row in TABLE
    ],
)
def test_equals_the_closed_form(solver, name) -> None:
    transform, args = TRANSFORMATIONS[name], tuple(map(jnp.asarray, ARGS))
    got = transform(lambda *args: oscillator(SOLVERS[solver], *args))(*args)
    expected = transform(exact)(*args)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "ts",
    [[1.0, 0.6, 0.1], [0.4], [0.1, 0.1, 0.8], [0.8, 0.8]],
    ids=["back", "one", "twice", "still"],
)
def test_times(ts) -> None:
    """Decreasing, one alone, repeated; and the derivative by each of them."""
    args = (ARGS[0], jnp.asarray(ARGS[1]), jnp.asarray(ts))
    solve = fv.odeint(rk4)
    got = jax.grad(lambda *args: oscillator(solve, *args), ALL)(*args)
    for x, y in zip(got, jax.grad(exact, ALL)(*args), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ts", [[0.1, 0.1, 0.8], [0.8, 0.8]], ids=["twice", "still"])
def test_times_that_are_equal_move_in_a_second_derivative(ts) -> None:
    """Nothing is solved between them, and the way from one to the other has derivatives still."""
    args = (ARGS[0], jnp.asarray(ARGS[1]), jnp.asarray(ts))
    dots = (1.0, jnp.array([0.3, -0.5]), jnp.arange(1.0, len(ts) + 1))
    solve = fv.odeint(rk4)
    second = lambda fun: jax.jvp(jax.grad(fun, ALL), args, dots)[1]
    got = second(lambda *args: oscillator(solve, *args))
    for x, y in zip(got, second(exact), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_structures_and_types() -> None:
    """A pytree with a complex state; captured integers; both modes, by all that is complex."""
    solve, n = fv.odeint(rk4), jnp.array([1, 2])

    def program(c):
        y0 = {"z": jnp.array([1.0 + 0.5j, 0.3j]), "u": (jnp.array(2.0),)}
        field = lambda t, y: {"z": c * n * y["z"], "u": (-jnp.abs(c) * y["u"][0],)}
        ys = solve(field, y0, jnp.array([0.0, 0.5, 1.0]))
        return jnp.sum(jnp.abs(ys["z"][1:]) ** 2) + ys["u"][0][-1]

    def closed(c):
        t = jnp.array([0.5, 1.0])[:, None]
        z = jnp.array([1.0 + 0.5j, 0.3j]) * jnp.exp(c * n * t)
        return jnp.sum(jnp.abs(z) ** 2) + 2 * jnp.exp(-jnp.abs(c))

    c = 0.3 - 0.4j
    np.testing.assert_allclose(jax.grad(program)(c), jax.grad(closed)(c), rtol=1e-6)
    np.testing.assert_allclose(
        jax.jvp(program, (c,), (1 + 2j,))[1], jax.jvp(closed, (c,), (1 + 2j,))[1], rtol=1e-6
    )


def test_a_python_number_beside_a_table_in_another_precision() -> None:
    """The number is of weak type, and so is what is integrated for its derivative at first."""
    knots, table = jnp.array([0.0, 0.5, 1.0]), jnp.array([1.0, 2.0, 1.0], "float32")
    ts = jnp.array([0.0, 1.0])

    def end(rate):
        return SOLVERS["pytree"](lambda t, y: -rate * jnp.interp(t, knots, table) * y, 1.0, ts)[-1]

    slope = -1.5 * np.exp(-0.7 * 1.5)
    np.testing.assert_allclose(jax.grad(end)(0.7), slope, rtol=1e-5)
    np.testing.assert_allclose(jax.jvp(end, (0.7,), (1.0,))[1], slope, rtol=1e-5)


@pytest.mark.slow
def test_kepler_against_finite_differences() -> None:
    """Eccentric orbits, whose field is not linear, by the mass that the field captures."""

    solve = fv.odeint(rk4)

    def end(mass):
        def field(t, s):
            return jnp.concatenate([s[2:], -mass * s[:2] / jnp.sum(s[:2] ** 2) ** 1.5])

        y0 = jnp.array([1.0, 0.0, 0.0, 0.8])
        return solve(field, y0, jnp.array([0.0, 0.7, 1.5]), steps=100)[-1, 0]

    h = 1e-4
    difference = (end(1.0 + h) - end(1.0 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(end)(1.0), difference, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(end, (1.0,), (1.0,))[1], difference, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_on_each_device_of_a_mesh(check_vma) -> None:
    """Inside `shard_map`, whose types say what varies from device to device."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")

    def end(rate):
        area = fv.integral(lambda f, a, b: (b - a) * f((a + b) / 2))(lambda u: rate * u, 0.0, 1.0)
        ys = fv.odeint(rk4)(lambda t, y: -rate * y, jnp.ones_like(rate), jnp.array([0.0, 1.0]))
        return jnp.sum(ys[-1] + area)

    on_mesh = jax.shard_map(
        jax.grad(end), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
    )
    rate = jnp.array([0.5, 1.0])
    np.testing.assert_allclose(jax.jit(on_mesh)(rate), 0.5 - jnp.exp(-rate), rtol=1e-5)


def test_extra_arguments_are_differentiated_by() -> None:
    solve = fv.odeint(ode.odeint, tfirst=False)
    ts = jnp.array([0.0, 1.0])
    end = lambda a, b: solve(lambda y, t, a, b: -a * y + 0 * b["n"], 1.0, ts, a, b)[-1]
    np.testing.assert_allclose(jax.grad(end)(0.5, {"n": 3}), -np.exp(-0.5), rtol=1e-6)


def decaying(rate, **options):
    """Backwards it grows by exp(200)."""
    solve = fv.odeint(rk4, **options)
    ys = solve(lambda t, y: -rate * (y - jnp.cos(t)), 0.0, jnp.array([0.0, 2.0]), steps=400)
    return ys[-1]


def test_a_backward_solve_that_loses_the_state_is_refused() -> None:
    with pytest.raises(NotASolutionError, match='reverse="sensitivities"'):
        jax.grad(decaying)(100.0)
    assert np.isnan(jax.jit(jax.grad(decaying))(100.0))
    assert np.isnan(jax.grad(lambda r: decaying(r, on_failure="nan"))(100.0))
    warned = jax.jit(jax.grad(lambda r: decaying(r, on_failure="warn")))
    with pytest.warns(UserWarning, match="the state differs"):
        assert np.isnan(jax.block_until_ready(warned(100.0)))


def test_where_backwards_fails_forwards_does_not() -> None:
    exact = jax.jvp(decaying, (100.0,), (1.0,))[1]
    h = 1e-3
    np.testing.assert_allclose(exact, (decaying(100 + h) - decaying(100 - h)) / (2 * h), rtol=1e-5)
    got = jax.grad(lambda r: decaying(r, reverse="sensitivities"))(100.0)
    np.testing.assert_allclose(got, exact, rtol=1e-9)


@pytest.mark.slow
def test_a_coarse_solver_is_refused_and_a_plain_one_is_not() -> None:
    def euler(field, y0, ts, n=4):
        h = (ts[-1] - ts[0]) / n
        step = lambda i, y: y + h * field(ts[0] + i * h, y)
        return jnp.stack([y0, lax.fori_loop(0, n, step, y0)])

    slope = lambda n, **o: jax.grad(
        lambda a: fv.odeint(euler, **o)(lambda t, y: a * y, 1.0, jnp.array([0.0, 1.0]), n=n)[-1]
    )(1.0)
    with pytest.raises(NotASolutionError, match=r"up to 1\.0e-02 is accepted"):
        slope(4)
    np.testing.assert_allclose(slope(200), np.exp(1.0), rtol=1e-2)
    np.testing.assert_allclose(slope(4, tol=0.5), np.exp(1.0), rtol=0.5)
    np.testing.assert_allclose(slope(4, check=False), slope(4, tol=0.5))


@pytest.mark.parametrize("leaves", [False, True])
def test_a_component_that_is_zero_whenever_it_is_seen(leaves) -> None:
    """After whole periods only the velocity is not zero."""

    def end(w):
        def field(t, y):
            x, v = y
            out = (v, -(w**2) * x)
            return out if leaves else jnp.stack(out)

        y0 = (jnp.array(0.0), jnp.array(1.0))
        ys = fv.odeint(rk4)(field, y0 if leaves else jnp.stack(y0), jnp.arange(3.0), steps=40)
        return ys[0][-1] if leaves else ys[-1, 0]

    # of sin(2 w) / w
    np.testing.assert_allclose(jax.grad(end)(2 * np.pi), 1 / np.pi, rtol=1e-2)


@pytest.mark.slow
def test_like_diffrax_through_its_steps() -> None:
    diffrax = pytest.importorskip("diffrax")

    def solver(field, y0, ts):
        term = diffrax.ODETerm(lambda t, y, _: field(t, y))
        control = diffrax.PIDController(rtol=1e-8, atol=1e-8)
        at = diffrax.SaveAt(ts=ts)
        ends = (ts[0], ts[-1], None, y0)
        return diffrax.diffeqsolve(
            term, diffrax.Dopri5(), *ends, saveat=at, stepsize_controller=control
        ).ys

    def total(w, solve):
        field = lambda t, y: {"a": jnp.tanh(w @ y["a"]) * jnp.cos(t), "b": -y["b"] * w[0, 0]}
        ys = solve(field, {"a": jnp.ones(2), "b": jnp.array(1.0)}, jnp.array([0.0, 0.7, 2.0]))
        return jnp.sum(ys["a"] ** 2) + jnp.sum(ys["b"])

    w = jnp.array([[0.3, -1.0], [0.8, 0.1]])
    expected = jax.grad(total)(w, solver)
    np.testing.assert_allclose(jax.grad(total)(w, fv.odeint(solver)), expected, rtol=1e-5)


def test_the_order_of_the_field() -> None:
    ts = jnp.array([0.0, 1.0])
    wrong = fv.odeint(ode.odeint)  # which calls field(y, t)
    with pytest.raises(StructureError, match=r"tfirst=False\) as field\(y, t\)"):
        wrong(lambda y, t: -y, jnp.ones(2), ts)
    # Of one number the value is right in either order, and the derivative is refused.
    assert wrong(lambda y, t: -y, 1.0, ts)[-1] == pytest.approx(np.exp(-1.0))
    with pytest.raises(StructureError, match=r"tfirst=False\) as field\(y, t\)"):
        jax.grad(lambda a: wrong(lambda y, t: -a * y, 1.0, ts)[-1])(1.0)


def test_what_is_refused() -> None:
    solve = fv.odeint(rk4)
    with pytest.raises(StructureError, match=r"y0\['n'\]: expected a floating .* got dtype int64"):
        solve(lambda t, y: y, {"n": jnp.array(1)}, jnp.ones(2))
    with pytest.raises(StructureError, match="ts: expected a vector"):
        solve(lambda t, y: y, 1.0, jnp.array(2.0))
    with pytest.raises(StructureError, match="the field: expected a value like y0"):
        solve(lambda t, y: jnp.stack([y, y]), 1.0, jnp.array([0.0, 1.0]))
    for nothing in (None, "y"):
        with pytest.raises(StructureError, match="the field: expected a value like y0"):
            solve(lambda t, y, nothing=nothing: nothing, 1.0, jnp.array([0.0, 1.0]))
    with pytest.raises(StructureError, match="with a leading axis over ts"):
        fv.odeint(lambda f, y0, ts: y0)(lambda t, y: y, 1.0, jnp.array([0.0, 1.0]))


def test_the_host_is_given_the_jacobian() -> None:
    """For stiff methods: a row for each component of the field, without the time."""
    shapes = []

    @fv.odeint
    @fv.on_host
    def radau(field, y0, ts):
        shapes.append(field.jacobian(ts[0], y0).shape)
        out = scipy.integrate.solve_ivp(
            field, ts, y0, "Radau", rtol=1e-8, atol=1e-10, jac=field.jacobian
        )
        return out.y[:, [0, -1]].T

    ts = jnp.array([0.0, 1.0])
    end = lambda a: radau(lambda t, y: -a * y * jnp.array([1.0, 2.0]), jnp.ones(2), ts)[-1, 1]
    np.testing.assert_allclose(jax.grad(end)(0.3), -2 * np.exp(-0.6), rtol=1e-6)
    assert shapes == [(2, 2), (5, 5)]


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_of_a_state_with_several_leaves(outer, inner) -> None:
    """A solver that goes leaf by leaf: of several directions, only the sensitivities differ."""

    def end(rate):
        field = lambda t, y: {"u": rate * y["u"], "w": -rate * y["w"]}
        y = SOLVERS["rk4"](
            field, {"u": jnp.array(1.5), "w": jnp.ones(2)}, jnp.array([0.0, 0.4, 1.0])
        )
        return y["u"][-1] + y["w"][-1, 0]

    wanted = 1.5 * np.exp(0.7) + np.exp(-0.7)
    np.testing.assert_allclose(outer(inner(end))(0.7), wanted, rtol=1e-6)


def test_a_tangent_that_is_a_python_number() -> None:
    direction = lambda f: lambda a: jax.jvp(f, (a,), (1.0,))[1]
    end = lambda a: SOLVERS["rk4"](lambda t, y: a * y, 1.5, jnp.array([0.0, 1.0]))[-1]
    np.testing.assert_allclose(direction(direction(end))(0.7), 1.5 * np.exp(0.7), rtol=1e-6)
