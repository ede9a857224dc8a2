"""`linprog` and `fixed_point` of `freevars.jax.scipy` against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from scipy.optimize import Bounds

from freevars.errors import FreevarsError, NotASolutionError
from freevars.jax.scipy import fixed_point, linprog

GAIN = jnp.array([2.0, 3.0])


def _plan(gain, matrix, hours, cap):
    """At ((hours - m1 cap) / m0, cap)."""
    return linprog(-gain, matrix[None], jnp.array([hours]), bounds=[(0, None), (0, cap)]).x


def test_a_vertex_by_everything_that_is_given() -> None:
    matrix = jnp.array([1.0, 2.0])
    x = _plan(GAIN * jnp.array([1.0, 3.0]), matrix, 8.0, 3.0)
    np.testing.assert_allclose(x, [2.0, 3.0])
    found = jax.jacobian(_plan, (0, 1, 2, 3))(GAIN * jnp.array([1.0, 3.0]), matrix, 8.0, 3.0)
    expected = ([[0, 0], [0, 0]], [[-2, -3], [0, 0]], [1, 0], [-2, 1])
    for by_ours, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(by_ours, right, atol=1e-12)


def test_numbers_in_lists_are_differentiated() -> None:
    """At (cap - cap / 3, 1)."""
    solve = lambda cap: linprog([-1, -2], [[1.0, cap / 3]], [cap], bounds=(0, 1)).x
    np.testing.assert_allclose(solve(1.2), [0.8, 1.0])
    np.testing.assert_allclose(jax.jacobian(solve)(1.2), [2 / 3, 0.0], atol=1e-12)


@pytest.mark.slow
def test_equations_in_programs() -> None:
    """x + y = total with the dearer one at its lower bound."""
    solve = lambda total, low: linprog(
        jnp.array([1.0, 2.0]), A_eq=jnp.ones((1, 2)), b_eq=jnp.array([total]), bounds=(low, None)
    )
    result = jax.jit(solve)(5.0, 1.0)
    np.testing.assert_allclose(result.x, [4.0, 1.0])
    assert result.success
    by_both = jax.jit(jax.jacobian(lambda t, low: solve(t, low).x, (0, 1)))(5.0, 1.0)
    np.testing.assert_allclose(by_both, [[1.0, 0.0], [-1.0, 1.0]], atol=1e-12)


@pytest.mark.slow
def test_an_edge_of_minima_has_no_derivative() -> None:
    edge = lambda hours: _plan(jnp.ones(2), jnp.ones(2), hours, 3.0)
    with pytest.raises(FreevarsError):
        jax.jacobian(edge)(8.0)


@pytest.mark.slow
def test_more_constraints_than_unknowns_meet() -> None:
    corner = lambda cap: _plan(jnp.array([1.0, 2.0]), jnp.ones(2), 3.0, cap)
    with pytest.raises(FreevarsError, match=r"linprog: .*gradients.* not independent"):
        jax.jacobian(corner)(3.0)


@pytest.mark.slow
def test_what_is_infeasible_says_so() -> None:
    result = linprog(GAIN, -jnp.ones((1, 2)), jnp.array([-3.0]), bounds=(0, 1))
    assert not result.success
    assert "infeasible" in result.message
    assert np.isnan(result.x).all()
    equation = lambda b: linprog(GAIN, A_eq=jnp.ones((1, 2)), b_eq=b).x
    with pytest.raises(NotASolutionError, match="a value that is not finite"):
        jax.jacobian(equation)(jnp.array([-1.0]))
    with pytest.raises(TypeError, match="both A_ub and b_ub"):
        linprog(GAIN, jnp.ones((1, 2)))
    with pytest.raises(TypeError, match="integrality: expected None, got 1"):
        linprog(GAIN, integrality=1)
    with pytest.raises(TypeError, match="x0= has no place here"):
        linprog(GAIN, x0=GAIN)


@pytest.mark.parametrize("bounds", [[(0, 1)], Bounds(0, 1), zip([0, 0], [1, 1], strict=True)])
def test_bounds_and_sparse_matrices_as_scipy_takes_them(bounds) -> None:
    limits = {"A_ub": scipy.sparse.csr_array(np.ones((1, 2))), "b_ub": [1.5]}
    np.testing.assert_allclose(linprog([-1, -2], **limits, bounds=bounds).x, [0.5, 1.0])


@pytest.mark.parametrize("method", ["del2", "iteration"])
def test_fixed_point(method) -> None:
    solve = lambda a: fixed_point(lambda x, a: a * jnp.cos(x), 0.5, args=a, method=method)
    x = solve(1.0)
    np.testing.assert_allclose(x, np.cos(x), rtol=1e-12)
    slope = jax.grad(solve)(1.0)
    np.testing.assert_allclose(slope, np.cos(x) / (1 + np.sin(x)), rtol=1e-9)
    with pytest.raises(RuntimeError, match="Failed to converge"):
        fixed_point(lambda x: 2 * x + 1, 1.0, method="iteration", maxiter=3)
