"""When a derivative is believed: in every unit, at every size, and what is said where it is not."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import freevars.jax as fv
from freevars._solvers.verdict import Limits
from freevars.errors import NotASolutionError, SingularError


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def returns(x):
    """A solver that returns x, whatever it is given."""
    return lambda fun, x0: x


# The same with x as an option: what is compiled for it serves every x.
ROOT, ARGMIN = (kind(lambda fun, x0, x: x) for kind in (fv.root, fv.argmin))


def newton_steps(fun, x0, steps=30):
    return lax.fori_loop(0, steps, lambda _, x: x - fun(x) / jax.grad(fun)(x), x0)


A = np.array([[4.0, 1.0, -1.0], [1.0, 3.0, 0.5], [-1.0, 0.5, 5.0]])
X = np.array([1.5, -0.8, 0.4])
B = A @ X**2


def derivative(rows, columns, error, start):
    """d(x)/d(scale of b) of A x^2 = scale b in units of the equations and unknowns, at an x that is
    off by `error`; all in the units of x. NaN where it is refused."""
    m = rows[:, None] * A.astype(rows.dtype) / columns**2
    b = rows * B.astype(rows.dtype)
    x = X.astype(rows.dtype) * columns * (1 + error)
    by_scale = jax.jacrev(lambda s: ROOT(lambda x: m @ (x * x) - s * b, columns * start, x))
    return by_scale(jnp.ones((), rows.dtype)) / columns


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_units_change_nothing(dtype):
    every = jax.jit(jax.vmap(derivative))
    spreads = [(10.0 ** np.linspace(-k, k, 3), 10.0 ** np.linspace(k, -k, 3)) for k in (0, 3)]
    cases = [
        (rows, columns, error, start)
        for r, c in spreads
        for rows, columns in ((r, c[::-1] ** 0.5), (r**2, c), (1e-9 * r, 1e-6 + 0 * r))
        for error in (0 * X, np.array([0, 0, 0.4]), np.array([-0.3, 0, 0]))
        for start in (0 * X, 1 + 0 * X, 1e2 + 0 * X)
    ]
    rows, columns, error, start = (
        jnp.asarray(np.stack(x), dtype) for x in zip(*cases, strict=True)
    )
    got = every(rows, columns, error, start)
    right = ~np.any(error != 0, axis=1)
    want = np.broadcast_to(X / 2, got[right].shape)
    np.testing.assert_allclose(got[right], want, rtol=1e-4 if dtype == "float32" else 1e-9)
    assert np.all(np.isnan(got[~right]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_objectives_and_equations_of_any_size(dtype):
    x = jnp.asarray([2.0, 3.0], dtype)
    least = 1e-30 if dtype == "float32" else 1e-200
    for solve, fun in (
        (ARGMIN, lambda size, a: lambda x: size * jnp.sum((x - a) ** 2)),
        (ROOT, lambda size, a: lambda x: size * (x - a)),
    ):
        by = jax.jit(
            lambda size, solve=solve, fun=fun: jax.jacrev(
                lambda a: solve(fun(size, a), jnp.zeros_like(x), x)
            )(x)
        )
        for size in (least, 1.0, 1 / least):
            np.testing.assert_array_equal(by(jnp.asarray(size, dtype)), np.eye(2))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_solver_that_stops_early_is_caught_however_small_x_is(dtype):
    def by(a, start, x):
        return jax.grad(lambda a: ROOT(lambda x: x * x - a, start, x))(a)

    # Far below what rounding leaves of the start, too: the equation tells x from zero.
    x, start, off = (
        jnp.asarray(each.ravel(), dtype)
        for each in np.meshgrid(
            [1e-9, 1e-6, 1e-3, 1.0, 1e9], [np.nan, 0.0, 1.0, 1e4], [1e-6, 0.1, 0.5, 1e2, -0.9995]
        )
    )
    start = jnp.where(jnp.isnan(start), 2 * x, start)
    got = jax.jit(jax.vmap(by))(x * x, start, x * (1 + off))
    right = off == jnp.asarray(1e-6, dtype)
    np.testing.assert_allclose(got[right], 0.5 / x[right], rtol=1e-3)
    assert np.all(np.isnan(got[~right]))
    x = jnp.asarray(2e-9, dtype)
    early = jax.grad(lambda a: fv.root(returns(x))(lambda x: x * x - a, jnp.ones((), dtype)))
    with pytest.raises(NotASolutionError, match="did not converge"):
        early(jnp.asarray(1e-18, dtype))


def test_a_solution_that_is_next_to_nothing_beside_the_step_is_not_zero():
    # In float32, x - s is zero up to rounding; the iterate after that is 1e-11.
    by = jax.grad(lambda t, *at: ROOT(lambda x: x * t - 1e-11, *at))
    for x, right in ((1e-11, True), (4e-3, False)):
        at = (jnp.asarray(a, jnp.float32) for a in (1.0, 4e4, x))
        assert np.isfinite(jax.jit(by)(*at)) == right


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_solution_that_is_zero_counts_by_how_far_the_solver_came(dtype):
    def by(t, start, x):
        return jax.grad(lambda t: ROOT(lambda x: jnp.exp(x) - 1 - t, start, x))(t)

    eps = float(jnp.finfo(dtype).eps)
    cases = (
        (0.0, 1.0, eps / 2, True),  # what rounding leaves: the equation does not see it
        (0.0, 1.0, eps, True),
        (0.0, 1.0, 3e-4 * eps**0.5, True),  # on the way to zero
        (0.0, 1.0, 5e-3 * eps**0.25, True),
        (0.0, 1.0, 5e-2 * eps**0.25, False),
        (0.0, 1.0, 0.1, False),
        (0.1, 1.0, 0.11, False),
    )
    t, start, x, right = (np.array(each) for each in zip(*cases, strict=True))
    got = jax.jit(jax.vmap(by))(*(jnp.asarray(each, dtype) for each in (t, start, x)))
    np.testing.assert_array_equal(np.isfinite(got), right)
    np.testing.assert_allclose(got[right], 1.0, rtol=1e-3)


def test_a_second_step_tells_where_the_derivative_changes_on_the_way():
    # The same Newton step of 0.4 percent: of a line, and towards a fold.
    line = fv.root(returns(jnp.asarray(1.004)))
    np.testing.assert_allclose(jax.grad(lambda a: line(lambda x: 3 * x - a, 0.0))(3.0), 1 / 3)
    fold = fv.root(returns(jnp.asarray(1.004)))
    by_fold = jax.grad(lambda a: fold(lambda x: (x - 0.99) ** 2 - a, 0.0))
    with pytest.raises(NotASolutionError, match="the derivative changes by"):
        by_fold(1e-4)
    np.testing.assert_array_equal(jax.jit(by_fold)(1e-4), jnp.nan)
    assert np.isfinite(
        jax.grad(lambda a: fv.root(returns(1.004), tol=0.01)(lambda x: (x - 0.99) ** 2 - a, 0.0))(
            1e-4
        )
    )


def test_curvature_is_no_coarse_arithmetic():
    """Near a triple root the derivative by what holds it there is the same along the step; that by
    what splits it, of 3e7, is found as 1e4."""

    def slopes(x):
        cube = lambda a, b: ROOT(lambda x: (x - a) ** 3 - b, x, x)
        return jax.grad(cube, (0, 1))(1.0, 1e-12)

    np.testing.assert_allclose(slopes(1 + 1e-4), (1.0, 1e8 / 3), rtol=1e-6)
    with pytest.raises(NotASolutionError, match="the derivative changes by"):
        slopes(1.005)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_derivative_itself_is_compared_along_the_step(dtype):
    # Where tanh is saturated, x[1] does not see x[0] change by 1%, and its derivative does: by 12%.
    def equations(t, w):
        return lambda x: x - jnp.stack([t, jnp.tanh(w * x[0]), 0.1 + x[1] * jnp.exp(-w * x[0])])

    exact = np.array([1.0, np.tanh(6.0), 0.1 + np.tanh(6.0) * np.exp(-6.0)])
    by = jax.jit(jax.jacfwd(lambda t, w, x: ROOT(equations(t, w), 0 * x, x), (0, 1)))
    for error, right in ((0.0, True), (3e-5, True), (9e-3, False)):
        x = jnp.asarray(exact * (1 + error * np.array([1.0, 0.0, 0.0])), dtype)
        found = by(jnp.ones((), dtype), jnp.full((), 6.0, dtype), x)
        assert np.all(np.isfinite(found)) == right
        if right:
            np.testing.assert_allclose(found[0][1], 6 * (1 - np.tanh(6.0) ** 2), rtol=2e-2)


def test_components_that_are_zero():
    m = jnp.asarray(A)
    by = jax.jit(lambda x, x0: jax.jacfwd(lambda b: ROOT(lambda x: m @ x - b, x0, x))(m @ x))
    for x0 in (jnp.zeros(3), jnp.ones(3)):
        for x in (jnp.zeros(3), jnp.array([1.0, 0.0, 0.0])):
            np.testing.assert_allclose(by(x, x0), np.linalg.inv(A), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_component_that_is_zero_counts_alike_from_zero_and_from_afar(dtype):
    m, solution = A.astype(dtype), np.array([1.0, -0.5, 0.0], dtype)
    right = np.linalg.inv(A * (1 + 3 * solution**2))

    def by_b(x, x0):
        b = m @ (solution + solution**3)
        return jax.jacfwd(lambda b: ROOT(lambda x: m @ (x + x**3) - b, x0, x))(b)

    errors = np.array([1e-3, 1e-2, 0.1, 0.5]) * np.finfo(dtype).eps ** 0.5
    x = solution + (errors[:, None] * np.array([0, 0, 1])).astype(dtype)
    for x0 in (0 * solution, 1 + 0 * solution):
        found = jax.jit(jax.vmap(by_b, (0, None)))(x, x0)
        np.testing.assert_allclose(found, np.stack(4 * [right]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dtype", "spread"), [("float32", 14), ("float64", 40)])
def test_components_beside_which_others_vanish(dtype, spread):
    """Concentrations from equations in their logarithms: each counts by itself, all are right."""
    logs = np.array([-spread, -2.0, spread])
    m, z = A.astype(dtype), logs.astype(dtype)
    x = jnp.exp(z)
    contraction = (np.eye(3) - 0.2 * A).astype(dtype)

    def of_root(s):
        return ROOT(lambda x: m @ (jnp.log(x) - s * z), 2 * x, x)

    def of_fixed_point(s):
        fun = lambda x: jnp.exp(contraction @ (jnp.log(x) - s * z) + s * z)
        return fv.fixed_point(returns(x))(fun, 2 * x)

    for solve in (of_root, of_fixed_point):
        np.testing.assert_allclose(jax.jacrev(solve)(jnp.ones((), dtype)) / x, logs, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dense_limit", [512, 0])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_the_parts_of_a_complex_number_are_as_large_as_it(dense_limit, mode):
    """Imaginary parts that are zero: of the solution, of the start, and of all that they are
    coupled by. What a solver leaves there is rounding."""
    solver = fv.root(lambda fun, x0, x: x, dense_limit=dense_limit)
    exact, one = jnp.array([1.0, 1.5, 2.0]), jnp.ones(3, complex)

    @jax.jit
    def by(error):
        def square_root(c):
            return solver(lambda z: z**2 - c, one, exact + error)

        if mode == "forward":
            return jax.jvp(square_root, (exact**2 + 0j,), (one,))[1]
        return jax.vjp(square_root, exact**2 + 0j)[1](one)[0]

    np.testing.assert_allclose(by(1e-16j), 1 / (2 * exact), rtol=1e-12)
    assert np.all(np.isnan(by(0.1j)))  # no solution is 6 degrees away


def test_a_complex_eigenvector_of_a_real_first_entry():
    def eigenpair(matvec, x):
        phase = 1j * x["v"][0].imag
        return matvec(x["v"]) - x["l"] * x["v"], jnp.vdot(x["v"], x["v"]) - 1 + phase

    def matrix(t):
        return jnp.array([[2.0, 0.3 + 0.2j], [0.3 - 0.2j, 1.0]]) + t * jnp.array(
            [[0.1, 1j], [-1j, 0.4]]
        )

    def by_lapack(matvec, x0):
        values, vectors = jnp.linalg.eigh(jax.vmap(matvec, out_axes=1)(jnp.eye(2) + 0j))
        v = vectors[:, -1] * jnp.exp(-1j * jnp.angle(vectors[0, -1]))
        return {"v": v + jnp.array([1e-16j, 0]), "l": values[-1] + 0j}

    solver = fv.implicit(eigenpair, argument=lambda x: x["v"])(by_lapack)
    x0 = {"v": jnp.ones(2) + 0j, "l": jnp.zeros(()) + 0j}

    def share(t):
        return jnp.abs(solver(lambda v: matrix(t) @ v, x0)["v"][1]) ** 2

    def exact(t):
        return jnp.abs(jnp.linalg.eigh(matrix(t))[1][1, -1]) ** 2

    slope = (exact(0.3 + 1e-5) - exact(0.3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(share)(0.3), slope, rtol=1e-7)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(share))(0.3), slope, rtol=1e-7)


SINGULAR = {
    "a row that depends on others": np.array([[1.0, 2, 3], [0, 1e6, 5e6], [1e-6, 3e-6, 8e-6]]),
    "a column of zeros": np.array([[1.0, 0, 2], [3, 0, 5], [4, 0, 9]]),
    "a difference of neighbours": np.array([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2]]),
    "nothing": np.zeros((3, 3)),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.slow
def test_singular_systems_are_refused_in_every_unit(dtype):
    def by(m, x):
        return jax.jacfwd(lambda s: ROOT(lambda y: m @ (y - s * x), 0 * x, x))(jnp.ones((), dtype))

    compiled = jax.jit(by)
    for name, matrix in SINGULAR.items():
        for rows, columns in (
            (np.ones(3), np.ones(3)),
            (10.0 ** np.arange(3), 10.0 ** -np.arange(3)),
        ):
            m = jnp.asarray(rows[:, None] * matrix * columns, dtype)
            x = jnp.asarray(np.array([0.7, 1.3, -1.1]) / columns, dtype)
            assert np.all(np.isnan(compiled(m, x))), name
    with pytest.raises(SingularError, match="is singular"):
        by(m, x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_fixed_point_whose_equations_cancel_is_singular(dtype):
    """x = t P x with columns of P that sum to 1: what is left of 1 - P is rounding, at t = 1."""
    solve = fv.fixed_point(lambda fun, x0, x: x)
    random = np.random.default_rng(0)
    for n in [1, 2, 3, 20]:
        by = jax.jit(
            lambda p, x, b, t: jax.grad(
                lambda t: jnp.sum(solve(lambda x: t * (p @ x) + b, 2 * x, x))
            )(t)
        )
        for _ in range(10):
            p = random.random((n, n)) ** 4
            p /= p.sum(0)
            x = np.linalg.matrix_power(p, 1 << 12).sum(1)
            given = [jnp.asarray(a, dtype) for a in (p, x, (1 - 0.9) * x, 0.9)]
            regular, (p, x, b, t) = by(*given), given
            # Of the sum s of x, which is (0.1 s) / (1 - t).
            np.testing.assert_allclose(regular, 10 * n, rtol=1e-4)
            assert np.isnan(by(p, x, 0 * b, 1 + 0 * t))


# --- What is asked for ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("eigenvalue", [0.9, 1.0])
def test_a_direction_that_an_iteration_never_leaves_is_found_among_many(dtype, eigenvalue):
    n = 2000
    p, c = (v / np.linalg.norm(v) for v in np.random.default_rng(3).normal(size=(2, n)))
    c -= p * (p @ c)
    p, c = (jnp.asarray(a, dtype) for a in (p, c))
    fun = lambda x, t: 0.3 * x + (eigenvalue - 0.3) * p * (p @ x) + t * c
    x = c / 0.7
    solver = fv.fixed_point(returns(x))
    slope = jax.jit(jax.grad(lambda t: c @ solver(lambda x: fun(x, t), 0 * x)))(jnp.ones((), dtype))
    if eigenvalue == 1:
        assert np.isnan(slope)
    else:
        np.testing.assert_allclose(slope, c @ c / 0.7, rtol=1e-3)


@pytest.mark.slow
def test_what_the_check_adds_to_a_step_is_taken_out_before_anything_else_is_asked():
    n, calls = 1000, []
    c = np.random.default_rng(1).choice([0.7, -0.7], n).astype("float32")
    c[::100] = 0.003  # where an error is as large as it may be, relative to x

    def runs_of_fun(error):
        def fun(x, scale):
            jax.debug.callback(lambda: calls.append(1))
            return 0.3 * x + scale * c

        calls.clear()
        x = jnp.asarray(c / 0.7 + error, "float32")
        solver = fv.fixed_point(returns(x))
        slope = jax.grad(lambda s: jnp.sum(solver(lambda x: fun(x, s), x * 0)))(jnp.float32(1))
        jax.effects_barrier()
        np.testing.assert_allclose(slope, np.sum(c) / 0.7, rtol=1e-3)
        return len(calls)

    assert runs_of_fun(0.0) == runs_of_fun(1.2e-6) < runs_of_fun(2.5e-6)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
START = np.array([1.0, 3.0])


@pytest.mark.slow  # many programs
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


@pytest.mark.slow  # many programs
def test_totals_may_read_what_is_differentiated_by():
    """Weights of the total decide where it settles, as they would decide an equation."""

    def mixed(weights):
        settle = lambda fun, x0: jnp.ones(2) * jax.lax.stop_gradient(mean(weights))
        solve = fv.root(settle, conserved=lambda x: weights @ x)
        return solve(lambda x: jnp.stack([x[0] - x[1], x[1] - x[0]]), START)[0]

    def mean(weights):
        return weights @ START / weights.sum()

    weights, each = jnp.array([1.0, 2.0]), jnp.array([[1.0, 2.0], [3.0, 1.0]])
    for transform in (
        lambda f: jax.jit(jax.grad(f))(weights),
        lambda f: jax.grad(jax.jit(f))(weights),
        lambda f: jax.jvp(f, (weights,), (each[1],))[1],
        lambda f: jax.vmap(jax.grad(f))(each),
        lambda f: jax.hessian(f)(weights),
    ):
        np.testing.assert_allclose(transform(mixed), transform(mean), atol=1e-9)


@pytest.mark.slow  # many programs
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


@pytest.mark.parametrize("n", [2, 600])
def test_least_squares_refuses_what_has_no_solution(n: int) -> None:
    """Pairs of (x - a)^2 + b y: flat in y, at b = 0 alone."""
    found = jnp.tile(jnp.array([0.5, 0.0]), n // 2)
    solve = fv.argmin(lambda fun, x0: found, on_failure="least_squares")

    def at(a, b):
        fun = lambda x: jnp.sum((x[::2] - a) ** 2) + b * jnp.sum(x[1::2])
        return solve(fun, jnp.zeros(n))

    moving = jnp.array(0.5), jnp.array(0.0)
    np.testing.assert_allclose(jax.jacfwd(at, 0)(*moving), 2 * found, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda a: at(a, 0.0) @ found)(0.5), n / 4, rtol=1e-6)
    for derivative in (jax.jacfwd(at, 1), jax.grad(lambda *t: at(*t).sum(), (0, 1))):
        with pytest.raises(SingularError, match="has no solution"):
            derivative(*moving)


def test_two_constraints_at_one_place_that_may_move_apart() -> None:
    solve = fv.argmin(lambda fun, x0, *, inequality: jnp.ones(1), on_failure="least_squares")

    def nearest(a, b):
        limits = lambda x: jnp.stack([a - x[0], b - x[0]])
        return solve(lambda x: jnp.sum((x - 3) ** 2), jnp.zeros(1), inequality=limits)[0]

    np.testing.assert_allclose(jax.grad(lambda a: nearest(a, a))(1.0), 1, rtol=1e-6)
    with pytest.raises(SingularError, match="has no solution"):
        jax.grad(nearest, (0, 1))(1.0, 1.0)


@pytest.mark.slow
def test_a_component_that_one_direction_hardly_moves_is_no_reason_to_refuse() -> None:
    """Of many components some move little by chance, and change by a large part of that."""
    n = 150
    rng = np.random.default_rng(1)
    mixing = 3 * jnp.asarray(rng.standard_normal((n, n)) / n**0.5)
    signs = jnp.asarray(np.sign(rng.standard_normal(n)))

    def loss(mixing):
        return lambda z: jnp.sum(jax.nn.softplus(-signs * (mixing @ z))) + z @ z / 2

    def newton(fun, z):
        slope = jax.grad(fun)
        step = lambda _, z: z - jnp.linalg.solve(jax.jacfwd(slope)(z), slope(z))
        return lax.fori_loop(0, 12, step, z)

    def total(solver):
        return lambda mixing: jnp.sum(jnp.abs(fv.argmin(solver)(loss(mixing), jnp.zeros(n))))

    exact = newton(loss(mixing), jnp.zeros(n))
    nearly = exact * (1 + 1e-3 * jnp.asarray(rng.uniform(-1, 1, n)))
    right = jax.grad(total(newton))(mixing)
    got = jax.jit(jax.grad(total(lambda fun, x0: nearly)))(mixing)
    np.testing.assert_allclose(got, right, atol=2e-3 * float(jnp.max(jnp.abs(right))))


@pytest.mark.parametrize("count", [3, 2000])
def test_a_function_that_is_not_finite_at_x_is_refused_in_a_batch_of_any_size(count) -> None:
    """XLA's maximum over the entries of each of many members loses NaN."""
    a = jnp.linspace(1.0, 2.0, 4)
    slope = lambda x, x0: jax.grad(lambda t: ROOT(lambda x: jnp.log(x) - t * a, x0, x)[0])(1.0)
    wrong, x = jnp.full((count, 4), -0.1), jnp.tile(jnp.exp(a), (count, 1))
    got = jax.jit(jax.vmap(slope))(jnp.stack([wrong, x], 1).reshape(-1, 4)[:count], x)
    assert np.isnan(got[::2]).all()
    np.testing.assert_allclose(got[1::2], a[0] * jnp.exp(a[0]))


@pytest.mark.parametrize(("dtype", "gap"), [(jnp.float32, 1e-3), (jnp.float64, 1e-5)])
def test_a_small_step_is_no_reason_to_believe_a_difference(dtype, gap) -> None:
    """dF/dt = x1 - x0 is a difference of nearly equal numbers; F is straight in x."""
    fun = lambda x, t: jnp.stack([x[0] - t, x[1] - x[0] * (1 - gap), x[2] - (x[0] - x[1]) * t])
    x = jnp.stack([1, 1 - gap, gap]).astype(dtype)
    slope = jax.grad(lambda t, x: ROOT(lambda x: fun(x, t), x, x)[2])
    np.testing.assert_allclose(slope(dtype(1), x), 2 * gap, rtol=1e-2)
    moved = x + gap * jnp.array([-1, 1, 0.0], dtype) / 2
    assert jnp.abs(moved / x - 1).max() < Limits.of(float(jnp.finfo(dtype).eps)).certain
    with pytest.raises(NotASolutionError):
        slope(dtype(1), moved)


@pytest.mark.parametrize("n", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_nan_of_an_eager_backward_pass_raises_as_one_of_a_forward_pass_does(n) -> None:
    """Of the transpose alone: a forward pass sees nothing of it."""
    d = jnp.linspace(1.0, 2.0, n)

    def solve(operator, b):
        # What JAX cannot transpose is called again, for the transpose.
        x, _ = lax.while_loop(lambda s: s[1] < 1, lambda s: (s[0] / d, s[1] + 1), (b, 0))
        return x * jnp.nan if operator.transposed else x

    def total(**how):
        solver = fv.root(lambda fun, x0: 1 / d, linear_solve=solve, **how)
        return lambda t: jnp.sum(solver(lambda x: d * x - t, jnp.zeros(n)))

    np.testing.assert_allclose(jax.jvp(total(), (1.0,), (1.0,))[1], jnp.sum(1 / d))
    with pytest.raises(SingularError, match="the derivative is not finite"):
        jax.grad(total())(1.0)
    assert np.isnan(jax.jit(jax.grad(total()))(1.0))
    assert np.isnan(jax.grad(total(on_failure="nan"))(1.0))


@jax.custom_jvp
def coarse(a, b):
    """A product in the digits of TF32, as a GPU computes it in float32 by default."""
    few = lambda a: lax.reduce_precision(a, exponent_bits=8, mantissa_bits=10)
    return few(a) @ few(b)


@coarse.defjvp
def _(primals, tangents):
    (a, b), (da, db) = primals, tangents
    return coarse(a, b), coarse(da, b) + coarse(a, db)


@pytest.mark.parametrize(
    "shape", [(20,), pytest.param((40, 16), marks=pytest.mark.slow)], ids=["dense", "matrix-free"]
)
def test_what_coarse_arithmetic_leaves_is_accepted(shape):
    """And what a solver left beyond that is not."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((shape[-1], shape[-1]))
    weights = jnp.asarray(weights * 0.9 / np.linalg.norm(weights, 2), jnp.float32)
    inputs = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    zero = jnp.zeros_like(inputs)

    def iterate(fun, z):
        return lax.fori_loop(0, 100, lambda _, z: fun(z), z)

    def loss(solver, product):
        def of(weights):
            z = solver(lambda z: jnp.tanh(product(z, weights) + inputs), zero)
            return jnp.sum(z**3)

        return of

    right = jax.jacfwd(loss(iterate, jnp.matmul))(weights)
    got = jax.grad(loss(fv.fixed_point(iterate), coarse))(weights)
    assert jnp.linalg.norm(got - right) < 2e-3 * jnp.linalg.norm(right)

    off = fv.fixed_point(lambda fun, z: iterate(fun, z) * 1.05)
    with pytest.raises(NotASolutionError, match="did not converge"):
        jax.grad(loss(off, coarse))(weights)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-24])
def test_a_small_solution_found_from_afar_counts_by_itself(size):
    """Though the squares of its components are 0 in float32."""
    with jax.enable_x64(False):
        solve = fv.fixed_point(lambda fun, x0, x: x, on_failure="nan")

        def slope(x):
            f = lambda a: solve(lambda x: 0.5 * x + 0.5 * a, jnp.ones(700), jnp.full(700, x))
            return jax.grad(lambda a: jnp.sum(f(a)))(jnp.float32(size)) / 700

        compiled = jax.jit(slope)
        assert jnp.isclose(compiled(jnp.float32(size)), 1.0, rtol=1e-3)
        assert jnp.isnan(compiled(jnp.float32(2 * size)))


@pytest.mark.parametrize("n", [1, 5, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("straight", [True, False])
def test_a_known_solution_is_judged_as_in_a_program(n, straight):
    """There the program has a closer look from the first solution on that asks for it."""
    solve = fv.root(lambda fun, x0, x: x)
    dims = jnp.linspace(1.0, 2.0, n)
    wave = lambda x: x if straight else x + jnp.sin(400 * (x - 1)) / 401

    def slope(error):
        x = lambda t: solve(lambda x: dims * (wave(x) - t), jnp.zeros(n), 1 + error + jnp.zeros(n))
        return jax.grad(lambda t: jnp.sum(x(t)))(1.0) / n

    errors = [0.0, 1e-15, 1e-9, 1e-5, 3e-4, 3e-3, 0.05, -0.4, jnp.nan, 0.0, 1e-9]
    compiled = jax.jit(slope)
    outcomes = []
    for error in map(jnp.float64, errors):
        in_a_program = compiled(error)
        if jnp.isnan(in_a_program):
            with pytest.raises(NotASolutionError):
                slope(error)
        else:
            assert jnp.isclose(slope(error), in_a_program, rtol=1e-6)
        outcomes.append(bool(jnp.isnan(in_a_program)))
    assert (
        outcomes == [False] * (6 if straight else 5) + [True] * (3 if straight else 4) + [False] * 2
    )
