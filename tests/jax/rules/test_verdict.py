"""When a derivative is believed: in every unit, at every size, and what is said where it is not."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import freevars.jax as fv
from freevars.errors import NotASolutionError, SingularError

pytestmark = pytest.mark.slow  # each test compiles a rule with its system and its check


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def returns(x):
    """A solver that returns x, whatever it is given."""
    return lambda fun, x0: x


def newton_steps(fun, x0, steps=30):
    return lax.fori_loop(0, steps, lambda _, x: x - fun(x) / jax.grad(fun)(x), x0)


A = np.array([[4.0, 1.0, -1.0], [1.0, 3.0, 0.5], [-1.0, 0.5, 5.0]])
X = np.array([1.5, -0.8, 0.4])
B = A @ X**2


def derivative(rows, columns, error, dtype=jnp.float64, start=None):
    """d(x)/d(scale of b) of A x^2 = scale b in units of the equations and unknowns, at an x that is
    off by `error`, in the units of x."""
    m = jnp.asarray(rows[:, None] * A / columns**2, dtype)
    b = jnp.asarray(rows * B, dtype)
    x = jnp.asarray(X * columns * (1 + error), dtype)
    start = x * 0 if start is None else jnp.asarray(start, dtype)
    solve = fv.root(returns(x))
    by_scale = jax.jacrev(lambda s: solve(lambda x: m @ (x * x) - s * b, start))(
        jnp.ones((), dtype)
    )
    return by_scale / columns


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spread", [0, 3])
def test_units_change_nothing(dtype, spread):
    rows, columns = 10.0 ** np.linspace(-spread, spread, 3), 10.0 ** np.linspace(spread, -spread, 3)
    for r, c in ((rows, columns[::-1] ** 0.5), (rows**2, columns), (1e-9 * rows, 1e-6 + 0 * rows)):
        got = derivative(r, c, 0.0, dtype)
        np.testing.assert_allclose(got, X / 2, rtol=1e-4 if dtype == "float32" else 1e-9)
        for start in (None, 1e2 * c):
            with pytest.raises(NotASolutionError, match="did not converge"):
                derivative(r, c, np.array([0.0, 0.0, 0.4]), dtype, start)
            with pytest.raises(NotASolutionError, match="did not converge"):
                derivative(r, c, np.array([-0.3, 0.0, 0.0]), dtype, start)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_objectives_and_equations_of_any_size(dtype):
    x = jnp.asarray([2.0, 3.0], dtype)
    least = 1e-30 if dtype == "float32" else 1e-200
    for size in (least, 1.0, 1 / least):
        for kind, fun in (
            (fv.argmin, lambda a: lambda x: size * jnp.sum((x - a) ** 2)),
            (fv.root, lambda a: lambda x: size * (x - a)),
        ):
            solve = kind(returns(x))
            got = jax.jacrev(lambda a: solve(fun(a), jnp.zeros_like(x)))(x)
            np.testing.assert_array_equal(got, np.eye(2))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_solver_that_stops_early_is_caught_however_small_x_is(dtype):
    for x in (1e-9, 1e-3, 1.0, 1e9):
        # On the way from 1, what is far below sqrt(eps) cannot be told from zero.
        starts = (2 * x, 0.0, 1.0) if x > jnp.finfo(dtype).eps else (2 * x, 0.0)
        for start in starts:
            a = jnp.asarray(x, dtype) ** 2
            for off, is_right in ((1e-6, True), (0.5, False), (0.1, False)):
                solve = fv.root(returns(jnp.asarray(x * (1 + off), dtype)))
                by = jax.grad(lambda a: solve(lambda x: x * x - a, jnp.asarray(start, dtype)))
                if is_right:
                    np.testing.assert_allclose(by(a), 0.5 / x, rtol=1e-3)
                else:
                    with pytest.raises(NotASolutionError, match="did not converge"):
                        by(a)


def test_a_second_step_tells_where_the_derivative_changes_on_the_way():
    # The same Newton step of 0.4 percent: of a line, and towards a fold.
    line = fv.root(returns(jnp.asarray(1.004)))
    np.testing.assert_allclose(jax.grad(lambda a: line(lambda x: 3 * x - a, 0.0))(3.0), 1 / 3)
    fold = fv.root(returns(jnp.asarray(1.004)))
    by_fold = jax.grad(lambda a: fold(lambda x: (x - 0.99) ** 2 - a, 0.0))
    with pytest.raises(NotASolutionError, match="a second one by"):
        by_fold(1e-4)
    np.testing.assert_array_equal(jax.jit(by_fold)(1e-4), jnp.nan)
    assert np.isfinite(
        jax.grad(lambda a: fv.root(returns(1.004), tol=0.01)(lambda x: (x - 0.99) ** 2 - a, 0.0))(
            1e-4
        )
    )


def test_components_that_are_zero():
    m = jnp.asarray(A)
    for x0 in (jnp.zeros(3), jnp.ones(3)):
        for x in (jnp.zeros(3), jnp.array([1.0, 0.0, 0.0])):
            solve = fv.root(returns(x))
            b = m @ x
            got = jax.jacfwd(lambda b: solve(lambda x: m @ x - b, x0))(b)
            np.testing.assert_allclose(got, np.linalg.inv(A), rtol=1e-12)


SINGULAR = {
    "a row that depends on others": np.array([[1.0, 2, 3], [0, 1e6, 5e6], [1e-6, 3e-6, 8e-6]]),
    "a column of zeros": np.array([[1.0, 0, 2], [3, 0, 5], [4, 0, 9]]),
    "a difference of neighbours": np.array([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2]]),
    "nothing": np.zeros((3, 3)),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SINGULAR)
def test_singular_systems_are_refused_in_every_unit(name, dtype):
    for rows, columns in ((np.ones(3), np.ones(3)), (10.0 ** np.arange(3), 10.0 ** -np.arange(3))):
        m = jnp.asarray(rows[:, None] * SINGULAR[name] * columns, dtype)
        x = jnp.asarray(np.array([0.7, 1.3, -1.1]) / columns, dtype)
        solve = fv.root(returns(x))
        by = jax.jacfwd(lambda s: solve(lambda x: m @ x - s * (m @ lax.stop_gradient(x)), 0 * x))
        f = jax.jacfwd(lambda s: solve(lambda y: m @ (y - s * x), 0 * x))
        with pytest.raises(SingularError, match="is singular"):
            f(jnp.ones((), dtype))
        assert np.all(np.isnan(jax.jit(f)(jnp.ones((), dtype))))
        del by


# --- What is asked for ----------------------------------------------------------------------------


def test_a_refused_member_of_a_batch_that_is_not_asked_for_contributes_nothing():
    solve = fv.root(newton_steps)
    a = jnp.array([4.0, 9.0, -1.0])  # the last has no real root
    nowhere = fv.root(lambda fun, x0: jnp.where(fun(x0) > 0, jnp.inf, newton_steps(fun, x0)))

    def total(s, solver, found):
        x = jax.vmap(lambda a: solver(lambda x: x**2 - s * a, 1.0))(a)
        return jnp.sum(jnp.where(found, x, 0.0))

    want = (2 + 3) / 2
    for solver in (solve, nowhere):
        for transform in (jax.grad, lambda f, **k: jax.jit(jax.grad(f, **k), static_argnums=1)):
            np.testing.assert_allclose(transform(total)(1.0, solver, a > 0), want, rtol=1e-9)
            assert np.isnan(transform(total)(1.0, solver, a > -2))


def bounded(fun, x0, low, steps=200):
    return lax.fori_loop(0, steps, lambda _, x: jnp.maximum(x - 0.3 * jax.grad(fun)(x), low), x0)


def test_an_option_that_the_solution_depends_on_is_refused():
    solve = fv.argmin(bounded)
    by_low = jax.grad(lambda low, a: solve(lambda x: (x - a) ** 2, 1.0, low))
    assert by_low(0.2, 0.7) == 0.0  # the bound is not active
    with pytest.raises(NotASolutionError, match="a bound or constraint is active"):
        by_low(0.2, -0.5)
    assert np.isnan(jax.jit(by_low)(0.2, -0.5))
    assert jax.jit(by_low)(0.2, 0.7) == 0.0

    def captured(low, a):
        return fv.argmin(lambda fun, x0: bounded(fun, x0, low))(lambda x: (x - a) ** 2, 1.0)

    assert jax.grad(captured)(0.2, 0.7) == 0.0
    with pytest.raises(NotASolutionError, match="what the solver captures"):
        jax.grad(captured)(0.2, -0.5)


def test_a_result_on_a_bound_says_so():
    solve = fv.argmin(bounded)
    for low in (0.0, 0.123456789):
        by_a = jax.grad(lambda a: solve(lambda x: jnp.sum((x - a) ** 2), jnp.ones(2), low).sum())
        with pytest.raises(
            NotASolutionError, match=r"a bound or constraint is active.*x\[1\]"
        ) as e:
            by_a(jnp.array([1.0, -0.5]))
        assert "check=False" not in str(e.value)
        assert "longer" not in str(e.value)


def test_a_warning_says_why_from_inside_a_program():
    solve = fv.root(returns(jnp.asarray(3.0)), on_failure="warn")
    by_a = jax.grad(lambda a: solve(lambda x: x**2 - a, 1.0))
    for f in (by_a, jax.jit(by_a)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert np.isnan(jax.block_until_ready(f(4.0)))
            jax.effects_barrier()
        assert any("solver did not converge: a Newton step" in str(w.message) for w in told)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(jax.jit(by_a)(9.0), 1 / 6)
        jax.effects_barrier()


def test_diagnose_gives_the_figures_as_data():
    solve = fv.root(newton_steps)
    found = solve.diagnose(lambda x: x**2 - 2.0, 1.0)
    assert found.accepted
    assert found.error is None
    assert found.figures.step < 1e-15
    np.testing.assert_allclose(found.x, 2**0.5)
    early = fv.root(lambda fun, x0: newton_steps(fun, x0, 2)).diagnose(lambda x: x**2 - 2.0, 1.0)
    assert 1e-4 < early.figures.step < 1e-2
    assert early.accepted  # by the second step
    lazy = fv.root(returns(jnp.asarray(2.0))).diagnose(lambda x: x**2 - 2.0, 2.0)
    assert not lazy.accepted
    assert lazy.figures.step == 0.25
    assert lazy.newton_step == 0.5
    assert "returned its starting point" in str(lazy.error)
    with pytest.raises(TypeError, match="inside jit"):
        jax.jit(lambda a: solve.diagnose(lambda x: x**2 - a, 1.0).x)(2.0)


def test_a_tolerance_and_a_polished_solution():
    loose = lambda fun, x0: newton_steps(fun, x0, 2) + 0.03
    by = lambda solve: jax.grad(lambda a: solve(lambda x: x**2 - a, 1.0))
    with pytest.raises(NotASolutionError, match="polish=True"):
        by(fv.root(loose))(2.0)
    assert abs(by(fv.root(loose, tol=0.1))(2.0) - 0.5 / 2**0.5) > 1e-3
    polished = fv.root(loose, polish=True)
    for f in (by(polished), jax.jit(by(polished))):
        np.testing.assert_allclose(f(2.0), 0.5 / 2**0.5, rtol=1e-3)
    assert abs(polished(lambda x: x**2 - 2.0, 1.0) - 2**0.5) < 1e-3
    assert polished(lambda x: x - 2.0, 1.0) == 2.0
    for wrong in (0.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match="tol: expected"):
            fv.root(loose, tol=wrong)


# --- Freedoms and totals --------------------------------------------------------------------------


def steady(fun, x0, steps=3000, dt=0.02):
    return lax.fori_loop(0, steps, lambda _, x: x + dt * fun(x), x0)


def reaction(k):  # A + B <-> C
    def rates(x):
        r = k[0] * x[0] * x[1] - k[1] * x[2]
        return jnp.stack([-r, -r, r])

    return rates


def in_closed_form(k, x0):
    a, b, ratio = x0[0] + x0[2], x0[1] + x0[2], k[1] / k[0]
    s = a + b + ratio
    c = (s - jnp.sqrt(s * s - 4 * a * b)) / 2
    return jnp.stack([a - c, b - c, c])


K, X0 = np.array([1.0, 0.5]), np.array([1.0, 2.0, 0.0])


def test_conserved_totals():
    want = jax.jacfwd(in_closed_form, (0, 1))(K, X0)
    kept = lambda x: {"a": x[0] + x[2], "b": x[1] + x[2]}
    solve = fv.root(steady, conserved=kept)
    f = lambda k, x0: solve(reaction(k), x0)
    for jacobian in (jax.jacfwd, jax.jacrev):
        for got, expected in zip(jax.jit(jacobian(f, (0, 1)))(K, X0), want, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-8)
    second = jax.hessian(lambda k: f(k, X0)[2])(K)
    np.testing.assert_allclose(
        second, jax.hessian(lambda k: in_closed_form(k, X0)[2])(K), atol=1e-6
    )
    wrong = fv.root(steady, conserved=lambda x: x[0] + x[1])
    with pytest.raises((NotASolutionError, SingularError)):
        jax.jacfwd(lambda k: wrong(reaction(k), X0))(K)


def test_least_squares_takes_freedoms_and_refuses_totals():
    by_k = lambda **how: jax.jacfwd(lambda k: fv.root(steady, **how)(reaction(k), X0))
    with pytest.raises(SingularError, match="conserved=lambda x"):
        by_k()(K)
    with pytest.raises(SingularError, match="conserved=lambda x"):
        by_k(on_failure="least_squares")(K)
    with pytest.raises(SingularError):  # which of the solutions depends on the start
        jax.jacfwd(lambda x0: fv.root(steady)(reaction(K), x0))(X0)

    # Positions up to a shift: x_j - x_i = d.
    edges = jnp.array([[-1.0, 1, 0], [0, -1, 1], [-1, 0, 1]])
    objective = lambda d: lambda x: jnp.sum((edges @ x - d) ** 2)
    descend = lambda fun, x0: lax.fori_loop(0, 300, lambda _, x: x - 0.1 * jax.grad(fun)(x), x0)
    d = jnp.array([1.0, 2.0, 2.5])
    with pytest.raises(SingularError, match='on_failure="least_squares" takes'):
        jax.jacfwd(lambda d: fv.argmin(descend)(objective(d), jnp.zeros(3)))(d)
    solve = fv.argmin(descend, on_failure="least_squares")
    got = jax.jacrev(lambda d: solve(objective(d), jnp.zeros(3)))(d)
    np.testing.assert_allclose(got, np.linalg.pinv(edges), atol=1e-9)
    # The same without an objective: its equations are those of a root.
    root = fv.root(lambda fun, x0: descend(objective(d), x0), on_failure="least_squares")
    got = jax.jacrev(lambda d: root(lambda x: edges.T @ (edges @ x - d), jnp.zeros(3)))(d)
    np.testing.assert_allclose(got, np.linalg.pinv(edges), atol=1e-9)
