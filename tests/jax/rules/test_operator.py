"""What a `linear_solve` is given, truncated backward passes, and the methods of the default."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

import freevars.jax as fv
from freevars.jax._rules import iterative, krylov, powers
from freevars.jax._rules.coordinates import Space
from freevars.jax._rules.iterative import Choice, Units, solve_by_default
from freevars.jax._rules.operator import LinearOperator


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


RNG = np.random.default_rng(0)
M = 3 * np.eye(3) + RNG.normal(size=(3, 3)) / 2  # not symmetric
B = np.array([1.0, -2.0, 0.5])


def exact(fun, x0):
    """One step of Newton's method on a vector: exact for linear functions."""
    return x0 - jnp.linalg.solve(jax.jacfwd(fun)(x0), fun(x0))


def loss(linear_solve, matrix=M, **options):
    solver = fv.root(exact, linear_solve=linear_solve, **options)
    return lambda b: jnp.sum(jnp.arange(1.0, 4.0) * solver(lambda x: matrix @ x - b, jnp.zeros(3)))


def test_the_operator_of_a_root():
    seen = []

    def solve(operator, b):
        seen.append(operator)
        return jnp.linalg.solve(operator.as_matrix(), b)

    right = np.linalg.solve(M.T, np.arange(1.0, 4.0))
    np.testing.assert_allclose(jax.grad(loss(solve))(B), right)
    operator = fv.LinearOperator(lambda v: M @ v, jnp.zeros(3))
    np.testing.assert_allclose(operator.as_matrix(), M)
    np.testing.assert_allclose(operator.T.as_matrix(), M.T)
    np.testing.assert_allclose(operator.diagonal(), np.diag(M))
    np.testing.assert_allclose(operator.rmatvec(jnp.asarray(B)), M.T @ B)
    np.testing.assert_allclose(operator.as_lineax().as_matrix(), M)
    assert [o.symmetric for o in seen] == [False] * len(seen)
    assert seen[0].structure == jax.ShapeDtypeStruct((3,), "float64")
    assert repr(operator.T) == "<linear operator of 3 real unknowns, transposed>"


def test_an_operator_on_a_pytree_with_a_complex_array():
    structure = {"c": (jnp.zeros(2), jnp.zeros(2)), "r": jnp.zeros(())}
    weights = {"c": (jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])), "r": jnp.asarray(5.0)}
    operator = fv.LinearOperator(lambda v: jax.tree.map(jnp.multiply, weights, v), structure)
    np.testing.assert_allclose(operator.as_matrix(), np.diag([1.0, 2, 3, 4, 5]))
    jax.tree.map(np.testing.assert_allclose, operator.diagonal(), weights)
    jax.tree.map(np.testing.assert_allclose, operator.unravel(operator.ravel(weights)), weights)


def by_factors(factors):
    """Never asks the operator; JAX can transpose it."""
    return lambda operator, b: jax.scipy.linalg.lu_solve(factors, b)


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))])
@pytest.mark.slow
def test_a_linear_solve_that_captures_traced_factors_of_an_asymmetric_matrix(transform):
    def x_of(matrix):
        factors = jax.scipy.linalg.lu_factor(matrix)
        return jnp.sum(loss(by_factors(factors), matrix)(B))

    right = lambda matrix: jnp.sum(jnp.arange(1.0, 4.0) * jnp.linalg.solve(matrix, B))
    np.testing.assert_allclose(transform(x_of)(M), transform(right)(M), rtol=1e-9)


@pytest.mark.slow
def test_a_second_derivative_through_captured_factors():
    def x_of(t):
        matrix = M + t * jnp.diag(jnp.arange(3.0))
        return loss(by_factors(jax.scipy.linalg.lu_factor(matrix)), matrix)(B)

    def right(t):
        matrix = M + t * jnp.diag(jnp.arange(3.0))
        return jnp.sum(jnp.arange(1.0, 4.0) * jnp.linalg.solve(matrix, B))

    np.testing.assert_allclose(jax.hessian(x_of)(0.1), jax.hessian(right)(0.1), rtol=1e-8)


def test_a_loop_that_jax_cannot_transpose_is_asked_for_the_transposed_system():
    def richardson(operator, b):
        step = lambda s: (s[0] + 0.2 * (b - operator(s[0])), s[1] + 1)
        return jax.lax.while_loop(lambda s: s[1] < 200, step, (jnp.zeros_like(b), 0))[0]

    right = np.linalg.solve(M.T, np.arange(1.0, 4.0))
    np.testing.assert_allclose(jax.grad(loss(richardson))(B), right, rtol=1e-8)


@pytest.mark.slow
def test_a_factorisation_on_the_host_knows_which_system_it_is_asked_for():
    factors = scipy.sparse.linalg.splu(scipy.sparse.csc_matrix(M))

    def solve(operator, b):
        how = "T" if operator.transposed else "N"
        back = lambda b: factors.solve(np.asarray(b), trans=how)
        return jax.pure_callback(back, jax.ShapeDtypeStruct(b.shape, b.dtype), b)

    right = np.linalg.solve(M.T, np.arange(1.0, 4.0))
    np.testing.assert_allclose(jax.grad(loss(solve))(B), right, rtol=1e-9)


def test_a_solution_of_another_structure_is_refused():
    with pytest.raises(fv.StructureError, match="linear_solve: the returned solution"):
        jax.grad(lambda b: loss(lambda operator, b: (b, b))(b))(B)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"preconditioner": 3}, TypeError, "preconditioner: expected"),
        ({"preconditioner": abs, "linear_solve": lx.LU()}, ValueError, "for the default method"),
        ({"dense_limit": "all"}, TypeError, "dense_limit: expected"),
    ],
)
def test_mistakes_in_options(options, error, match):
    with pytest.raises(error, match=match):
        fv.root(exact, **options)


# --- Truncated backward passes --------------------------------------------------------------------

iterate = lambda fun, x0: jax.lax.fori_loop(0, 200, lambda _, x: fun(x), x0)


@pytest.mark.parametrize("terms", [1, 3])
def test_a_truncated_series_of_a_fixed_point(terms):
    solver = fv.fixed_point(iterate, linear_solve=fv.one_step if terms == 1 else fv.neumann(terms))
    j = np.array([[0.4, 0.2], [-0.1, 0.3]])
    f = lambda b: jnp.sum(solver(lambda x: j @ x + b, jnp.zeros(2)))
    series = sum(np.linalg.matrix_power(j, k) for k in range(terms))
    np.testing.assert_allclose(jax.grad(f)(jnp.ones(2)), series.T @ np.ones(2))
    np.testing.assert_allclose(jax.jacfwd(f)(jnp.ones(2)), series.T @ np.ones(2))


def test_the_step_of_a_truncated_series_has_derivatives_where_it_matters():
    """d/da of the truncated gradient: the step is captured, and the series depends on it."""
    descend = lambda fun, x0: jax.lax.fori_loop(0, 200, lambda _, x: x - 0.3 * jax.grad(fun)(x), x0)

    def slope(step):
        solver = fv.argmin(descend, linear_solve=fv.neumann(2, step))
        return jax.grad(lambda a: solver(lambda x: x**2 - 2 * a * x, 0.0))(1.0)

    series = lambda step: 2 * step * (1 + (1 - 2 * step))  # the second derivative is 2, dF/da is -2
    np.testing.assert_allclose(slope(0.2), series(0.2))
    np.testing.assert_allclose(jax.grad(slope)(0.2), jax.grad(series)(0.2))


# --- The methods of the default -------------------------------------------------------------------


def laplace(v):
    """The second difference of a grid function that vanishes at both ends."""
    zero = jnp.zeros(1, v.dtype)
    return 2 * v - jnp.concatenate([v[1:], zero]) - jnp.concatenate([zero, v[:-1]])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("argmin", "float32"),
        ("root", "float64"),
        pytest.param("argmin", "float64", marks=pytest.mark.slow),
        pytest.param("root", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_fine_grid_is_solved(kind, dtype):
    """700 unknowns of a Poisson problem: restarted GMRES stands still there. Whether float32 tells
    such a system from a singular one is the check's affair, which is left out."""
    n = 700
    b = jnp.asarray(RNG.normal(size=n), dtype)
    by_matrix = lambda fun, x0: x0 - jnp.linalg.solve(jax.jacfwd(laplace)(x0), fun(x0))
    if kind == "root":
        solver, fun = fv.root(by_matrix, check=False), lambda x, t: laplace(x) - t * b
    else:
        solver = fv.argmin(lambda fun, x0: by_matrix(jax.grad(fun), x0), check=False)
        fun = lambda x, t: x @ laplace(x) / 2 - t * b @ x
    # The shape of the solution is smooth: rounding takes no more than its share of 2e5 eps.
    x = lambda t: solver(lambda x: fun(x, t), jnp.zeros(n, dtype))
    got = jax.jit(lambda t: jax.jvp(x, (t,), (jnp.ones((), dtype),))[1])(jnp.ones((), dtype))
    right = np.linalg.solve(np.asarray(jax.jacfwd(laplace)(jnp.zeros(n))), np.asarray(b, float))
    error = np.linalg.norm(got - right) / np.linalg.norm(right)
    assert error < (2e-2 if dtype == "float32" else 1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("unit", [1e-25, 1e-15, 1.0, 1e15, 1e25])
def test_zeros_and_units_play_no_part(symmetric, unit, monkeypatch):
    monkeypatch.setattr(iterative, "DENSE_FALLBACK", 0)  # no matrix helps
    d = {"u": jnp.linspace(1.0, 10.0, 30, dtype="float32"), "v": jnp.ones((2, 3), "float32")}
    b = jax.tree.map(jnp.zeros_like, d)
    b["u"] = b["u"].at[0].set(unit)
    coupled = lambda t: jax.tree.map(lambda d, x: d * x + 0.1 * jnp.sum(t["u"]), d, t)
    if symmetric:  # the leaf v is no part of it
        coupled = lambda t: {"u": d["u"] * t["u"] + 0.1 * jnp.sum(t["u"]), "v": t["v"]}
    eps, space = float(jnp.finfo("float32").eps), Space()
    operator = LinearOperator(coupled, b, symmetric=symmetric)
    by_default = lambda: solve_by_default(Choice(None, 0, False, True), operator, space, eps, b)
    found, part = jax.jit(by_default)()
    left = space.norm(jax.tree.map(jnp.subtract, coupled(found), b))
    assert left <= 3 * eps**0.75 * unit
    assert part <= 2 * eps**0.75


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("rate", [0.3, 0.95, 30.0])
def test_an_iteration_solves_its_own_system_while_it_contracts(rate, unit):
    n, eps = 700, float(jnp.finfo("float32").eps)
    b = jnp.asarray(unit * RNG.normal(size=n), "float32")
    operator = LinearOperator(lambda v: v - rate * jnp.roll(v, 1), b, fixed_point=True)
    tol = eps**0.75
    system = krylov.System(operator.matvec, b, Space().dot, tol, eps, 1.0, 500)
    first = jax.jit(lambda: krylov.richardson(system))()
    assert bool(first.solved) == (rate == 0.3 and unit == 1)
    if first.solved:  # one product a step
        assert first.steps == np.ceil(np.log(tol) / np.log(rate))
    choice = Choice(None, 512, least_squares=False, check=True)
    x, told = jax.jit(lambda: solve_by_default(choice, operator, Space(), eps, b))()
    left, of = np.asarray(b - operator.matvec(x), float), np.asarray(b, float)
    assert np.linalg.norm(left) < 1e-4 * np.linalg.norm(of)
    assert told < 1e-4


@pytest.mark.slow
def test_a_preconditioner_that_captures_a_traced_value():
    d = jnp.linspace(1.0, 1e6, 50)
    steps = []

    def count(tree):
        jax.debug.callback(lambda: steps.append(1))
        return tree

    def x_of(scale, **options):
        solver = fv.argmin(lambda fun, x0: x0 - jax.grad(fun)(x0) / (scale * d), **options)
        fun = lambda x: jnp.sum(scale * d * count(x) ** 2) / 2 - jnp.sum(x)
        return jnp.sum(solver(fun, jnp.zeros(50)))

    jacobi = lambda scale: {"preconditioner": lambda operator: lambda v: v / (scale * d)}
    right = -np.sum(1 / np.asarray(d)) / 4
    np.testing.assert_allclose(jax.grad(lambda s: x_of(s, **jacobi(s)))(2.0), right, rtol=1e-8)


@pytest.mark.slow
def test_division_and_the_limit_of_what_is_written_out():
    one = fv.root(lambda fun, x0: jax.lax.fori_loop(0, 30, lambda _, x: x - fun(x) / 4, x0))
    text = str(jax.make_jaxpr(jax.grad(lambda a: one(lambda x: 4 * x - a, 1.0)))(1.0))
    assert "= lu" not in text
    assert "triangular_solve" not in text
    small = str(jax.make_jaxpr(jax.grad(loss(None)))(B))
    iterative = str(jax.make_jaxpr(jax.grad(loss(None, dense_limit=2)))(B))
    assert "= lu" in small
    assert "while" not in small.rsplit("linear_solve", maxsplit=1)[-1]
    assert "while" in iterative


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_units_are_powers_of_two_as_exponents(dtype):
    top = np.finfo(dtype).maxexp - 2
    exponents = np.array([-top, -3, 0, 5, top], np.int16)
    found = powers.two_to(exponents, jnp.dtype(dtype))
    np.testing.assert_array_equal(found, np.ldexp(np.ones(5, dtype), exponents))
    np.testing.assert_array_equal(powers.exponent(1.5 * found), exponents)
    v = np.array([1.5, -2.0, 0.0, np.nan, 3.0], dtype)
    units = Units(jnp.array([4, -7, 100, 1, -3], jnp.int16))
    np.testing.assert_array_equal(units.times(v)[:2], v[:2] * np.array([16, 1 / 128], dtype))
    np.testing.assert_array_equal(units.times(units.times(v), -1), v)
