"""Minima with constraints in JAX, and scipy's solvers for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax import lax

import freevars.jax as fv
from freevars.errors import NotASolutionError, StructureError
from tests.constrained_problems import (
    FIXED,
    LEFT,
    PROBLEMS,
    REFUSED,
    T,
    active_set,
    all_at_zero,
    beside_bounds,
    fixed_by,
    free_and_small,
)
from tests.rule_problems import RuleHost


class Host(RuleHost):
    def numpy(self, x):
        return np.asarray(x)

    def on_host(self, solver, **options):
        return fv.on_host(solver, **options)


HOST = Host(
    xp=jnp,
    fv=fv,
    array=lambda values: np.asarray(values, dtype="float64"),
    grad=jax.grad,
    jacobian=jax.jacfwd,
    loop=lambda n, step, x: lax.fori_loop(0, n, lambda _, x: step(x), x),
    tree_map=jax.tree.map,
)
MINIMIZE = fv.argmin(active_set(HOST))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


TRANSFORMATIONS = {
    "reverse": jax.jacrev,
    "forward": jax.jacfwd,
    "second": lambda f: jax.jacfwd(jax.jacrev(f)),
}


# Compiling takes most of the time: the other modes meet one problem each.
@pytest.mark.parametrize(
    ("problem", "transformation"),
    [
        *((p, "reverse") for p in PROBLEMS[::3]),
        *(pytest.param(p, "reverse", marks=pytest.mark.slow) for p in PROBLEMS[1:3]),
        pytest.param(PROBLEMS[1], "forward", marks=pytest.mark.slow),
        pytest.param(PROBLEMS[1], "second", marks=pytest.mark.slow),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_equals_the_closed_form(problem, transformation) -> None:
    transform = TRANSFORMATIONS[transformation]
    got = transform(lambda t: problem.solve(HOST, MINIMIZE, t))(T)
    expected = transform(lambda t: problem.exact(HOST, t))(T)
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_in_programs() -> None:
    f = lambda t: PROBLEMS[1].solve(HOST, MINIMIZE, t)
    many = jnp.array([T, 0.9])
    got = jax.jit(jax.vmap(jax.jacrev(f)))(many)
    expected = jax.vmap(jax.jacrev(lambda t: PROBLEMS[1].exact(HOST, t)))(many)
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-9)


UNITS = [
    (512, 1e6, 1e-6, 1e-6),
    (512, 1e-8, 1, 1),
    (512, 1e-6, 1e6, 1e6),
    (0, 1e12, 1, 1),
    (0, 1e-6, 1e6, 1e-6),
]


@pytest.mark.parametrize(
    ("dense_limit", "objective", "equality", "inequality"),
    [UNITS[0], *(pytest.param(*units, marks=pytest.mark.slow) for units in UNITS[1:])],
)
def test_objective_and_constraints_in_any_units(
    dense_limit, objective, equality, inequality
) -> None:
    """The point nearest to a with x >= 0 and a given sum, in single precision: the multipliers are
    of another size than x, by twelve orders."""
    a, total = jnp.array([1.2, 2.0, -3.0, 0.5], jnp.float32), jnp.float32(2.5)
    free = jnp.array([1, 1, 0, 1], jnp.float32)
    shift = (jnp.sum(a * free) - total) / 3
    at_solution = fv.argmin(lambda fun, x0, *, equality, inequality: x0, dense_limit=dense_limit)

    def nearest(a, total):
        return at_solution(
            lambda x: objective * jnp.sum((x - a) ** 2) / 2,
            lax.stop_gradient((a - shift) * free),
            equality=lambda x: equality * (jnp.sum(x) - total),
            inequality=lambda x: inequality * x,
        )

    by_a, by_total = jax.jacrev(nearest, (0, 1))(a, total)
    np.testing.assert_allclose(by_a, jnp.diag(free) - jnp.outer(free, free) / 3, atol=1e-6)
    np.testing.assert_allclose(by_total, free / 3, atol=1e-6)


def test_a_result_beside_its_bounds_in_any_units() -> None:
    np.testing.assert_allclose(jax.grad(lambda t: beside_bounds(HOST, t))(T), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("bend", [0.0, 1.0])
def test_what_a_solver_leaves_of_zero_is_no_size(bend) -> None:
    for left in LEFT if bend else LEFT[:-1]:
        assert jax.grad(lambda t: all_at_zero(HOST, left, bend, t))(1.0) == 2.0
    for size in (1e-6, 1e-10, 1e-14):
        np.testing.assert_allclose(jax.grad(lambda t: free_and_small(HOST, size, t))(1.0), 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("refused", REFUSED, ids=lambda r: r.name)
def test_what_is_refused(refused) -> None:
    with pytest.raises(getattr(fv, refused.error), match=refused.text):
        jax.grad(lambda t: refused.solve(HOST, {}, t))(1.0)
    assert np.isnan(jax.grad(lambda t: refused.solve(HOST, {"on_failure": "nan"}, t))(1.0))


@pytest.mark.slow
def test_a_bound_and_an_equality_at_one_place_keep_no_totals() -> None:
    """Of the system with a bound in it, null vectors are not those of the transpose."""

    @fv.argmin(on_failure="least_squares")
    def solve(fun, x0, *, bounds, equality):
        return jnp.array([0.5, 2.0])

    def x(t):
        fun = lambda x: jnp.sum((x - 2.0) ** 2)
        return solve(
            fun, jnp.zeros(2), bounds=(None, jnp.stack([t, 9.0])), equality=lambda x: x[0] - t
        )

    with pytest.raises(fv.SingularError, match="active constraints are not independent"):
        jax.jacrev(x)(0.5)


def test_one_sided() -> None:
    """At the degenerate point, the bound stays active."""
    assert jax.grad(lambda t: REFUSED[1].solve(HOST, {"one_sided": True}, t))(1.0) == 1.0


@pytest.mark.parametrize("options", [{}, {"one_sided": True}], ids=str)
@pytest.mark.parametrize(("side", "goal", "slope"), FIXED)
def test_the_side_that_holds_a_fixed_component_moves_it(side, goal, slope, options) -> None:
    assert jax.grad(lambda t: fixed_by(HOST, options, side, goal, t))(1.0) == slope


@fv.argmin
@fv.on_host
def scipy_minimize(fun, x0, *, method, bounds=None, equality=None, inequality=None):
    limits = scipy.optimize.NonlinearConstraint
    constraints = []
    for c, upper in ((equality, 0.0), (inequality, np.inf)):
        if c is not None:
            constraints.append(limits(c, 0.0, upper, jac=c.jacobian))
    sides = None if bounds is None else scipy.optimize.Bounds(*bounds)
    options = {
        "SLSQP": {"ftol": 1e-15, "maxiter": 300},
        "trust-constr": {"gtol": 1e-11, "xtol": 1e-14, "barrier_tol": 1e-11, "maxiter": 500},
        "L-BFGS-B": {"ftol": 0.0, "gtol": 1e-11},
    }[method]
    hess = fun.hessian if method == "trust-constr" else None
    return scipy.optimize.minimize(
        fun.value_and_grad,
        x0,
        jac=True,
        hess=hess,
        method=method,
        bounds=sides,
        constraints=constraints,
        options=options,
    ).x


def _differences(f, t, h):
    return (8 * (f(t + h) - f(t - h)) - (f(t + 2 * h) - f(t - 2 * h))) / (12 * h)


@pytest.mark.parametrize("method", ["SLSQP", pytest.param("trust-constr", marks=pytest.mark.slow)])
def test_a_nonlinear_program(method) -> None:
    """Interior points leave the bound at a distance, active sets do not."""

    def solve(t):
        return scipy_minimize(
            lambda x: jnp.sum((x - t * jnp.array([1.0, 2.0, -1.0])) ** 2) + x[0] * x[1],
            jnp.full(3, 0.3),
            method=method,
            bounds=(0.0, 1 + t),
            inequality=lambda x: t**2 - x[0] ** 2 - 2 * x[1] ** 2,
        )

    np.testing.assert_allclose(
        jax.jacrev(solve)(1.0), _differences(solve, 1.0, 1e-2), rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_logistic_regression_in_a_box() -> None:
    rng = np.random.default_rng(0)
    data, labels = rng.normal(size=(20, 4)), np.sign(rng.normal(size=20))

    def solve(cap):
        loss = lambda w: jnp.mean(jax.nn.softplus(-labels * (data @ w))) + 0.01 * w @ w
        return scipy_minimize(loss, jnp.zeros(4), method="L-BFGS-B", bounds=(-cap, cap))

    assert 0 < jnp.sum(jnp.abs(solve(0.06)) == 0.06) < 4
    slope = jax.jacrev(solve)(0.06)
    np.testing.assert_allclose(slope, _differences(solve, 0.06, 1e-3), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_lasso_as_bounds() -> None:
    """w = p - q with p, q >= 0; on the support the derivative is that of the normal equations."""
    rng = np.random.default_rng(1)
    data, y = rng.normal(size=(12, 4)), rng.normal(size=12)

    def solve(penalty):
        def objective(x):
            residual = data @ (x["p"] - x["q"]) - y
            return residual @ residual / 2 + penalty * jnp.sum(x["p"] + x["q"])

        zeros = {"p": jnp.zeros(4), "q": jnp.zeros(4)}
        x = scipy_minimize(objective, zeros, method="L-BFGS-B", bounds=(0.0, None))
        return x["p"] - x["q"]

    w = np.asarray(solve(2.5))
    support = np.abs(w) > 0
    assert 0 < support.sum() < 4
    a = data[:, support]
    expected = np.zeros(4)
    expected[support] = -np.linalg.solve(a.T @ a, np.sign(w[support]))
    np.testing.assert_allclose(jax.jacrev(solve)(2.5), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_the_dual_of_a_support_vector_machine() -> None:
    """Its multipliers are bounded by C and orthogonal to the labels."""
    x = np.array([[0.0, 1.0], [1.0, 0.3], [0.4, 0.6], [1.0, 2.0], [2.0, 1.2], [0.7, 0.9]])
    y = np.array([-1.0, -1.0, 1.0, 1.0, 1.0, -1.0])

    def solve(scale):
        z = y[:, None] * x * scale
        dual = lambda a: jnp.sum((a @ z) ** 2) / 2 + 0.05 * a @ a - jnp.sum(a)
        equality = lambda a: jnp.sum(a * y)
        return scipy_minimize(
            dual, jnp.full(6, 0.1), method="SLSQP", bounds=(0.0, 1.0), equality=equality
        )

    got = jax.jacrev(solve)(1.0)
    np.testing.assert_allclose(got, _differences(solve, 1.0, 1e-3), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_nonnegative_least_squares() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(8, 4)), rng.normal(size=8)

    @fv.least_squares
    @fv.on_host
    def nnls(residual, x0, bounds):
        return scipy.optimize.nnls(residual.jacobian(x0), -residual(0 * x0))[0]

    def solve(t):
        right = b + t * jnp.arange(8.0)
        return nnls(lambda x: a @ x - right, jnp.zeros(4), bounds=(0.0, None))

    for slope in (jax.jacrev(solve), jax.jit(jax.jacfwd(solve))):
        np.testing.assert_allclose(slope(0.1), _differences(solve, 0.1, 1e-3), atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["equality", "inequality"])
def test_a_complex_unknown(kind) -> None:
    """The shortest vector whose sum is real and q: q / 2 twice."""

    def shortest(q, off=0.0):
        def given(fun, x0, *, equality=None, inequality=None):
            return jnp.full(2, lax.stop_gradient(q) / 2 + off, complex)

        length = lambda x: jnp.sum(jnp.abs(x) ** 2)
        constraint = {kind: lambda x: jnp.sum(x).real - q}
        return fv.argmin(given)(length, jnp.zeros(2, complex), **constraint)[0].real

    np.testing.assert_allclose(jax.grad(shortest)(0.7), 0.5, rtol=1e-12)
    with pytest.raises(NotASolutionError):
        jax.grad(lambda q: shortest(q, 0.1j))(0.7)


@pytest.mark.slow
def test_a_solver_in_jax_sees_closures() -> None:
    @fv.argmin
    def projected(fun, x0, *, bounds):
        low, high = bounds
        step = lambda _, x: jnp.clip(x - 0.4 * jax.grad(fun)(x), low, high)
        return lax.fori_loop(0, 60, step, x0)

    solve = lambda t: projected(lambda x: jnp.sum((x - t) ** 2), jnp.zeros(2), bounds=(0.0, 2 * t))
    assert jax.jit(jax.jacrev(solve))(0.5).tolist() == [1.0, 1.0]
    at_bound = lambda t: projected(lambda x: jnp.sum((x - 3.0) ** 2), jnp.zeros(2), bounds=(0.0, t))
    assert jax.jacrev(at_bound)(0.5).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"bounds": 3.0}, TypeError, "bounds: expected a pair"),
        ({"equality": 3.0}, TypeError, "equality: expected a function of x, whose result is 0"),
        ({"bounds": (jnp.zeros(3), None)}, StructureError, "bounds: expected each side like x0"),
        ({"inequality": lambda x: x > 0}, StructureError, r"inequality: .* floating arrays, got"),
        ({"inequality": lambda x: x + 0j}, StructureError, r"inequality: .* floating arrays, got"),
        ({"equality": lambda x: "0"}, StructureError, r"equality: .* floating or complex .* '0'"),
    ],
)
def test_mistakes(given, error, text) -> None:
    with pytest.raises(error, match=text):
        MINIMIZE(lambda x: jnp.sum(x**2), jnp.zeros(2), **given)


@pytest.mark.slow
def test_a_degenerate_component_is_found_wherever_it_is():
    """From inside its bound, at the distance that an interior-point method leaves; of those that
    are not degenerate, none is refused."""
    n = 100
    near = 1 - 1e-5 * jnp.eye(n)
    upper = 3 - 2 * jnp.eye(n)

    def derivative(x, upper, goal):
        solve = fv.argmin(lambda fun, x0, bounds: x, on_failure="nan")
        f = lambda t: solve(
            lambda x: jnp.sum((x - t * goal) ** 2), jnp.ones(n), bounds=(0.0, upper)
        )
        return jax.grad(lambda t: jnp.sum(f(t)))(1.0)

    compiled = jax.jit(jax.vmap(derivative))
    assert jnp.all(jnp.isnan(compiled(near, upper, jnp.ones((n, n)))))
    active = 1 + jnp.eye(n)  # its goal is beyond the bound
    np.testing.assert_allclose(compiled(jnp.ones((n, n)), upper, active), n - 1, rtol=1e-6)
