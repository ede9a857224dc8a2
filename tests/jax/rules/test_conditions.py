"""What `implicit` and `least_squares` add to the rules: conditions of the user's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

import freevars.jax as fv
from freevars.errors import NotASolutionError, StructureError
from freevars.jax.testing import check_rule


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _newton(fun, x0):
    step = lambda _, x: x - jnp.linalg.solve(jax.jacfwd(fun)(x), fun(x))
    return jax.lax.fori_loop(0, 12, step, x0)


N = 9


def _boundary_value_problem(field, u):
    """u'' = field(u) at inner points, u(0) = 0 and u(1) = 1."""
    ends = jnp.concatenate([jnp.zeros(1), u, jnp.ones(1)])
    return (ends[2:] - 2 * ends[1:-1] + ends[:-2]) * (N + 1) ** 2 - field(u)


@fv.implicit(_boundary_value_problem)
@fv.on_host
def _on_host(field, u0):
    """Sees the field alone, in NumPy."""
    equations = lambda u: np.diff(np.r_[0.0, u, 1.0], 2) * (N + 1) ** 2 - field(u)
    laplacian = scipy.linalg.toeplitz([-2.0, 1.0, *[0.0] * (N - 2)]) * (N + 1) ** 2
    jacobian = lambda u: laplacian - field.jacobian(u)
    return scipy.optimize.root(equations, u0, jac=jacobian, tol=1e-12).x


@pytest.mark.slow
def test_a_boundary_value_problem_that_the_solver_states_otherwise() -> None:
    solve = lambda a: _on_host(lambda u: a * u**3, jnp.linspace(0.1, 0.9, N)).sum()
    slope = jax.grad(solve)(2.0)
    difference = (solve(2.0 + 1e-4) - solve(2.0 - 1e-4)) / 2e-4
    np.testing.assert_allclose(slope, difference, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(solve))(2.0), slope, rtol=1e-10)
    second = jax.grad(jax.grad(solve))(2.0)
    difference = (jax.grad(solve)(2.0 + 1e-4) - jax.grad(solve)(2.0 - 1e-4)) / 2e-4
    np.testing.assert_allclose(second, difference, rtol=1e-5)


def test_a_derivative_flows_into_what_the_condition_alone_reads() -> None:
    def solve(shift):
        condition = lambda fun, x: fun(x) - shift
        return fv.implicit(condition)(lambda fun, x0: x0 + shift / 2)(lambda x: 2 * x, 0.0)

    assert jax.grad(solve)(3.0) == 0.5
    assert jax.jit(jax.vmap(jax.grad(solve)))(jnp.arange(3.0)).tolist() == [0.5] * 3


def test_a_fresh_condition_of_the_same_program_compiles_nothing() -> None:
    traced = []

    def solver(fun, x0):
        traced.append(1)
        return x0 - fun(x0) / 2

    solve = fv.implicit(lambda fun, x: fun(x))(solver)
    for a in map(jnp.asarray, (1.0, 2.0)):
        assert solve(lambda x: 2 * (x - a), jnp.zeros(2)).tolist() == [a, a]
    assert len(traced) == 1


def test_check_rule_takes_a_condition() -> None:
    a = jnp.array([2.0, 3.0])
    solve = fv.implicit(lambda fun, x: fun(x) ** 3 + fun(x))(_newton)
    check_rule(solve, lambda x: x**2 - a, jnp.ones(2))


@pytest.mark.parametrize("method", ["lm", "trf"])
@pytest.mark.slow
def test_scipys_least_squares_on_the_host(method) -> None:
    @fv.least_squares(polish=True)
    @fv.on_host
    def fit(residual, x0):
        assert residual.jacobian(x0).shape == (4, 2)
        return scipy.optimize.least_squares(
            residual, x0, jac=residual.jacobian, method=method, xtol=1e-15, ftol=1e-15, gtol=1e-15
        ).x

    t = jnp.arange(4.0)

    def model(y):
        return fit(lambda x: x[0] * jnp.exp(-x[1] * t) - y, jnp.array([1.0, 0.5]))

    y = jnp.array([2.0, 1.1, 0.4, 0.3])  # so that residuals remain
    h = 1e-4 * jnp.eye(4)
    difference = jnp.stack([(model(y + d) - model(y - d)) / 2e-4 for d in h], 1)
    np.testing.assert_allclose(jax.jacrev(model)(y), difference, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(model))(y), difference, rtol=1e-5, atol=1e-7)


def test_aux_and_complex_residuals() -> None:
    solve = fv.least_squares(lambda fun, x0: (x0 - fun(x0)[0].real, None), has_aux=True)
    found = lambda c: solve(lambda x: (x - (c + 2j), "aux"), 0.0)[0]
    assert jax.value_and_grad(found)(1.0) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: fv.implicit(3), TypeError, r"expected a function condition\(fun, x\), got 3"),
        (lambda: fv.implicit(lambda fun, x: x, argument=3), TypeError, "argument: expected"),
        (lambda: fv.implicit(lambda fun, x: x, tolerance=3), TypeError, "implicit: expected the"),
        (
            lambda: fv.implicit(lambda fun, x: x, argument=lambda x: x)(fv.on_host(_newton)),
            TypeError,
            "argument: a solver on the host",
        ),
        (
            lambda: jax.grad(
                lambda a: fv.implicit(lambda fun, x: x[:1])(_newton)(lambda x: x - a, jnp.ones(2))[
                    0
                ]
            )(1.0),
            StructureError,
            "the condition has 1 components for 2 unknowns",
        ),
        (
            lambda: jax.grad(lambda a: fv.least_squares(lambda f, x0: x0)(lambda x: 3, a))(1.0),
            StructureError,
            "returns floating or complex residuals",
        ),
    ],
)
def test_mistakes(make, error, text) -> None:
    with pytest.raises(error, match=text):
        make()


def test_no_solution_is_refused() -> None:
    solve = fv.implicit(lambda fun, x: fun(x))(lambda fun, x0: x0)
    with pytest.raises(NotASolutionError, match="did not converge"):
        jax.grad(lambda a: solve(lambda x: x - a, 9.0))(1.0)
