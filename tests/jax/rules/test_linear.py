"""How the system of a derivative is solved, and that no failure of any part is silent."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import freevars.jax as fv
from freevars.errors import NotASolutionError, SingularError

TOL = {"rtol": 1e-10, "atol": 1e-10}


# "Large" is made small, so that the tests are quick: N unknowns are above the limit.
LIMIT, N = 8, 40


pytestmark = pytest.mark.slow  # each test compiles a rule with its system and its check


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def by_matrix(fun, x0):
    """Exact for linear functions, the shortest step where the matrix is singular."""
    return x0 - jnp.linalg.pinv(jax.jacfwd(fun)(x0)) @ fun(x0)


def by_hessian(fun, x0):
    return by_matrix(jax.grad(fun), x0)


A = np.array([[2.0, 1.0], [0.5, 3.0]])
S = A @ A.T
SINGULAR = np.array([[1.0, 2.0], [2.0, 4.0]])
B = np.array([1.0, 2.0])


def of_root(matrix, **options):
    solver = fv.root(by_matrix, **options)
    return lambda t: jnp.sum(solver(lambda x: matrix @ x - t * B, jnp.zeros(2)))


def of_argmin(matrix, **options):
    solver = fv.argmin(by_hessian, **options)
    return lambda t: jnp.sum(solver(lambda x: x @ matrix @ x / 2 - t * B @ x, jnp.zeros(2)))


def dense(matvec, b):
    return jnp.linalg.solve(jax.jacfwd(matvec)(b), b)


ANY = [None, lx.LU(), lx.QR(), lx.SVD(), lx.AutoLinearSolver(well_posed=True)]
ANY += [lx.GMRES(**TOL), lx.Normal(lx.CG(**TOL)), dense]
name = lambda solver: getattr(solver, "__name__", type(solver).__name__)


@pytest.mark.parametrize("linear_solve", ANY, ids=name)
def test_every_kind_gives_the_derivative_of_a_root(linear_solve):
    f = of_root(A, linear_solve=linear_solve)
    exact = np.sum(np.linalg.solve(A, B))
    for derivative in (jax.grad(f), jax.jit(jax.grad(f)), lambda t: jax.jvp(f, (t,), (1.0,))[1]):
        np.testing.assert_allclose(derivative(1.0), exact, rtol=1e-9)


@pytest.mark.parametrize("linear_solve", [*ANY, lx.CG(**TOL), lx.Cholesky()], ids=name)
def test_every_kind_gives_the_derivative_of_a_minimum(linear_solve):
    f = of_argmin(S, linear_solve=linear_solve)
    exact = np.sum(np.linalg.solve(S, B))
    for derivative in (jax.grad(f), lambda t: jax.jvp(f, (t,), (1.0,))[1]):
        np.testing.assert_allclose(derivative(1.0), exact, rtol=1e-9)


@pytest.mark.parametrize("linear_solve", [lx.CG(**TOL), lx.Cholesky(), lx.Diagonal()], ids=name)
def test_a_solver_for_another_kind_of_system_is_refused(linear_solve):
    with pytest.raises(ValueError, match="may only be used for"):
        jax.grad(of_root(A, linear_solve=linear_solve))(1.0)


@pytest.mark.parametrize("linear_solve", [lx.LU, 3, "LU"])
def test_what_is_no_solver_is_refused(linear_solve):
    with pytest.raises(TypeError, match="linear_solve: expected None, a lineax solver"):
        fv.root(by_matrix, linear_solve=linear_solve)


@pytest.mark.parametrize("linear_solve", [lx.LU(), lx.QR(), lx.GMRES(**TOL)], ids=name)
def test_least_squares_needs_a_solver_for_it(linear_solve):
    with pytest.raises(ValueError, match="finds the shortest solution"):
        fv.root(by_matrix, linear_solve=linear_solve, on_failure="least_squares")


# --- An objective whose custom rule is not a gradient ---------------------------------------------


@jax.custom_jvp
def crooked(x):
    return x @ x / 2


crooked.defjvp(lambda x, d: (crooked(*x), (A @ x[0]) @ d[0]))  # its "Hessian" is A, not symmetric


@pytest.mark.parametrize("n", [2, 3, 40])
def test_conjugate_gradients_tell_an_asymmetric_hessian(n):
    skew = jnp.zeros((n, n)).at[0, 1].set(0.5 * n)
    twisted = jax.custom_jvp(lambda x: x @ x / 2)
    twisted.defjvp(lambda x, d: (twisted(*x), (x[0] + skew @ x[0]) @ d[0]))
    solver = fv.argmin(by_hessian, linear_solve=lx.CG(**TOL))
    f = lambda t: jnp.sum(solver(lambda x: twisted(x) - t * jnp.sum(x[:2]), jnp.zeros(n)))
    with pytest.raises(SingularError, match=r"is not symmetric|leaves a residual of"):
        jax.grad(f)(1.0)
    assert np.isnan(jax.jit(jax.grad(f))(1.0))


@pytest.mark.parametrize("how", [{}, {"linear_solve": lx.Cholesky()}, {"dense_limit": 1}])
def test_an_asymmetric_hessian_has_one_message(how):
    solver = fv.argmin(by_hessian, **how)
    f = lambda t: jnp.sum(solver(lambda x: crooked(x) - t * B @ x, jnp.zeros(2)))
    with pytest.raises(SingularError, match=r"is not symmetric.*under root"):
        jax.grad(f)(1.0)
    assert np.isnan(jax.jit(jax.grad(f))(1.0))
    # As the message says.
    by_slope = fv.root(lambda fun, x0: by_hessian(lambda x: crooked(x) - B @ x, x0))
    f = lambda t: jnp.sum(by_slope(jax.grad(lambda x: crooked(x) - t * B @ x), jnp.zeros(2)))
    np.testing.assert_allclose(jax.grad(f)(1.0), np.sum(np.linalg.solve(A, B)))


# --- Singular systems -----------------------------------------------------------------------------

FINITE = [None, lx.QR(), lx.SVD(), lx.GMRES(**TOL)]


@pytest.mark.parametrize("linear_solve", FINITE, ids=name)
def test_a_singular_system_raises_or_is_nan(linear_solve):
    f = of_root(SINGULAR, linear_solve=linear_solve)
    for derivative in (jax.grad(f), lambda t: jax.jvp(f, (t,), (1.0,))[1]):
        with pytest.raises(SingularError, match=r"singular|residual"):
            derivative(1.0)
        assert np.isnan(jax.jit(derivative)(1.0))
    quiet = of_root(SINGULAR, linear_solve=linear_solve, on_failure="nan")
    assert np.isnan(jax.grad(quiet)(1.0))
    assert np.isnan(jax.jvp(quiet, (1.0,), (1.0,))[1])


@pytest.mark.parametrize("linear_solve", [None, lx.SVD(), lx.LSMR(**TOL)], ids=name)
def test_least_squares_takes_the_shortest_solution(linear_solve):
    f = of_root(SINGULAR, linear_solve=linear_solve, on_failure="least_squares")
    shortest = np.sum(np.linalg.pinv(SINGULAR) @ B)
    for derivative in (jax.grad(f), jax.jit(jax.grad(f)), lambda t: jax.jvp(f, (t,), (1.0,))[1]):
        np.testing.assert_allclose(derivative(1.0), shortest, rtol=1e-9)


def test_an_ill_conditioned_system_is_told_with_its_number():
    nearly = lambda d: jnp.array([[1.0, 1.0], [1.0, 1.0 + d]])
    with pytest.raises(SingularError, match=r"reciprocal condition number about \d\.\de-1[67]"):
        jax.grad(of_root(nearly(4e-16)))(1.0)
    jax.grad(of_root(nearly(1e-9)))(1.0)


# --- A solver that did not do its work ------------------------------------------------------------


def newton(fun, x0, steps):
    return jax.lax.fori_loop(0, steps, lambda _, x: x - fun(x) / jax.grad(fun)(x), x0)


def square_root(steps, **options):
    solver = fv.root(newton, **options)
    return lambda a: solver(lambda x: x**2 - a, 1.0, steps)


def test_not_converged():
    f = square_root(1)
    with pytest.raises(NotASolutionError, match=r"did not converge: .* component by 4.6e-01"):
        jax.grad(f)(50.0)
    with pytest.raises(NotASolutionError, match="newton: the solver did not converge"):
        jax.jvp(f, (50.0,), (1.0,))
    with pytest.raises(NotASolutionError, match="did not converge"):
        jax.hessian(f)(50.0)
    assert np.isnan(jax.jit(jax.grad(f))(50.0))
    np.testing.assert_array_equal(np.isnan(jax.vmap(jax.grad(f))(jnp.array([1.0, 50.0]))), [0, 1])
    assert np.isfinite(f(50.0))  # the solver's own result stays as it is
    assert np.isnan(jax.grad(square_root(1, on_failure="nan"))(50.0))
    with pytest.raises(NotASolutionError):
        jax.grad(square_root(1, on_failure="least_squares"))(50.0)
    np.testing.assert_allclose(jax.grad(square_root(1, check=False))(50.0), 0.5 / 25.5)


def test_not_finite():
    f = square_root(20)
    with pytest.raises(NotASolutionError, match="not finite"):
        jax.grad(f)(jnp.nan)
    assert np.isnan(jax.jit(jax.grad(f))(jnp.nan))
    infinite_slope = fv.root(lambda fun, x0: x0)
    with pytest.raises(NotASolutionError, match="derivative of that is not finite"):
        jax.grad(lambda a: infinite_slope(lambda x: jnp.sqrt(x) + a - a, 0.0))(1.0)


def test_check_false_adds_nothing_to_the_program():
    text = lambda *, check: str(jax.make_jaxpr(jax.grad(square_root(2, check=check)))(2.0))
    assert "is_finite" in text(check=True)
    assert "is_finite" not in text(check=False)


# --- Large systems --------------------------------------------------------------------------------

GENERAL = 3 * np.eye(N) + np.random.default_rng(0).normal(size=(N, N)) / N**0.5
DIAGONAL = np.linspace(1.0, 50.0, N)
solve_general = lambda fun, x0: x0 - jnp.linalg.solve(GENERAL, fun(x0))
solve_diagonal = lambda fun, x0: x0 - jax.grad(fun)(x0) / DIAGONAL


def large_root(**options):
    solver = fv.root(solve_general, dense_limit=LIMIT, **options)
    return lambda t: jnp.sum(solver(lambda x: GENERAL @ x - t, jnp.zeros(N)))


def large_argmin(**options):
    solver = fv.argmin(solve_diagonal, dense_limit=LIMIT, **options)
    objective = lambda x, t: x @ (DIAGONAL * x) / 2 - t * jnp.sum(x)
    return lambda t: jnp.sum(solver(lambda x: objective(x, t), jnp.zeros(N)))


def test_a_large_system_is_never_written_out():
    for f in (large_root(), large_argmin()):
        program = jax.make_jaxpr(lambda t, f=f: jax.jvp(f, (t,), (1.0,))[1])(1.0).jaxpr
        tangents = [
            e.params["jaxpr"].jaxpr for e in program.eqns if e.params.get("name") == "tangent"
        ]
        sizes = [v.aval.size for p in (program, *tangents) for e in p.eqns for v in e.outvars]
        assert max(sizes) < N * N


def test_large_systems_have_the_right_derivative():
    exact = np.sum(np.linalg.solve(GENERAL, np.ones(N)))
    np.testing.assert_allclose(jax.grad(large_root())(1.0), exact, rtol=1e-9)
    by_bicgstab = large_root(linear_solve=lx.BiCGStab(**TOL))
    np.testing.assert_allclose(jax.jvp(by_bicgstab, (1.0,), (1.0,))[1], exact, rtol=1e-9)
    np.testing.assert_allclose(jax.grad(large_argmin())(1.0), np.sum(1 / DIAGONAL), rtol=1e-9)
    np.testing.assert_array_equal(jax.grad(lambda t: 0.0 * large_argmin()(t))(1.0), 0.0)


@pytest.mark.parametrize(
    "f",
    [
        large_root(linear_solve=lx.GMRES(**TOL, max_steps=2, restart=2)),
        large_root(linear_solve=lx.BiCGStab(**TOL, max_steps=3)),
        large_argmin(linear_solve=lx.CG(**TOL, max_steps=2)),
        large_argmin(linear_solve=lambda matvec, b: b),
    ],
)
def test_a_linear_solver_that_stops_short_is_told(f):
    with pytest.raises(SingularError, match=r"linear solver leaves a residual of \d"):
        jax.grad(f)(1.0)
    with pytest.raises(SingularError, match=r"linear solver leaves a residual of \d"):
        jax.jvp(f, (1.0,), (1.0,))
    assert np.isnan(jax.jit(jax.grad(f))(1.0))


def test_large_least_squares():
    hole = np.where(np.arange(N) == 5, 0.0, DIAGONAL)
    step = lambda fun, x0: x0 - jnp.where(hole > 0, jax.grad(fun)(x0) / jnp.maximum(hole, 1), 0)
    solver = fv.argmin(step, on_failure="least_squares", dense_limit=LIMIT)
    b = 1.0 * (hole > 0)
    f = lambda t: jnp.sum(solver(lambda x: x @ (hole * x) / 2 - t * b @ x, jnp.zeros(N)))
    np.testing.assert_allclose(jax.grad(f)(1.0), np.sum(b / np.maximum(hole, 1)), rtol=1e-9)


@pytest.mark.parametrize("check", [True, False])
def test_conjugate_gradients_solve_for_small_components_too(check):
    # A ridge regression whose unknowns differ by 10,000: in float32 the residual of the large ones
    # hides that of the others.
    rng = np.random.default_rng(0)
    size = 10.0 ** np.linspace(-2, 2, N)
    features = rng.normal(size=(3 * N, N)) * size
    y = features @ (rng.normal(size=N) / size) + 0.1 * rng.normal(size=3 * N)
    hessian = 2 * features.T @ features / (3 * N) + 0.6 * np.diag(size**2)
    x = np.linalg.solve(hessian, 2 * features.T @ y / (3 * N))
    want = -np.linalg.solve(hessian, 2 * size**2 * x)
    features, y, size, x = (jnp.asarray(each, jnp.float32) for each in (features, y, size, x))
    solve = fv.argmin(lambda fun, x0: x, dense_limit=LIMIT, check=check)

    def objective(penalty):
        fit = lambda x: jnp.mean((features @ x - y) ** 2)
        return lambda x: fit(x) + penalty * jnp.sum((size * x) ** 2)

    got = jax.jit(jax.jacfwd(lambda p: solve(objective(p), jnp.zeros(N, jnp.float32))))(
        jnp.float32(0.3)
    )
    np.testing.assert_allclose(got * size, want * size, atol=3e-3 * np.max(np.abs(want * size)))


@pytest.mark.parametrize("reverse", [True, False])
def test_a_program_for_any_number_of_unknowns(reverse) -> None:
    """Of a size that only a call will know, the system is not written out."""

    @fv.fixed_point
    def iterate(fun, x0):
        return jax.lax.fori_loop(0, 60, lambda _, x: fun(x), x0)

    def mixed(p):  # of neighbours, so that the system is no diagonal
        return iterate(lambda x: 0.4 * p * jnp.cos(x + jnp.roll(x, 1)), jnp.zeros_like(p))

    def slope(p):
        if reverse:
            return jax.grad(lambda p: mixed(p) @ jnp.cos(jnp.arange(p.size)))(p)
        return jax.jvp(mixed, (p,), (jnp.cos(p),))[1]

    (n,) = jax.export.symbolic_shape("n")
    exported = jax.export.export(jax.jit(slope))(jax.ShapeDtypeStruct((n,), jnp.float64))
    for size in (2, 5):
        p = jnp.linspace(0.3, 0.9, size)
        np.testing.assert_allclose(exported.call(p), slope(p), rtol=1e-8)
