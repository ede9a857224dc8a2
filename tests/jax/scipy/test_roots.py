"""`root`, `root_scalar` and `least_squares` of `freevars.jax.scipy` against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freevars.errors import NotASolutionError, StructureError
from freevars.jax.scipy import least_squares, root, root_scalar


def _square_root(a, **how):
    return root_scalar(lambda x, a: x**2 - a, args=a, **how).root


OTHERS = ("bisect", "ridder", "brenth", "toms748")


@pytest.mark.parametrize(
    "method", [None, *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS)]
)
def test_brackets(method) -> None:
    solve = lambda a: _square_root(a, bracket=[a / 4, a], method=method)
    np.testing.assert_allclose(solve(4.0), 2.0, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(solve)(4.0), 0.25, rtol=1e-12)


def test_brackets_that_are_traced() -> None:
    solve = lambda a: _square_root(a, bracket=(a / 4, a))
    many = jnp.array([4.0, 9.0])
    np.testing.assert_allclose(jax.jit(jax.vmap(solve))(many), [2, 3], rtol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(solve)))(many), [1 / 4, 1 / 6], rtol=1e-12)
    second = jax.jacfwd(jax.grad(solve))(4.0)
    np.testing.assert_allclose(second, -1 / 32, rtol=1e-10)


def test_a_bracket_has_no_part_in_the_root() -> None:
    by_ends = jax.grad(lambda a, b: _square_root(4.0, bracket=(a, b)), (0, 1))(0.0, 5.0)
    assert by_ends == (0.0, 0.0)


@pytest.mark.parametrize(
    "how",
    [
        {"x0": 1},
        {"x0": 1.0, "method": "halley"},
        {"x0": 1.0, "x1": 1.5},
        pytest.param(
            {"x0": 1.0, "bracket": (0.0, 5.0), "method": "Newton"}, marks=pytest.mark.slow
        ),
    ],
    ids=["newton", "halley", "secant", "of both"],
)
def test_starts(how) -> None:
    solve = lambda a: _square_root(a, **how)
    np.testing.assert_allclose(solve(4.0), 2.0, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(solve)(4.0), 0.25, rtol=1e-12)


@pytest.mark.parametrize("method", ["newton", "halley"])
def test_derivatives_are_exact_in_float32(method) -> None:
    with jax.enable_x64(False):
        result = root_scalar(lambda x: x**3 - 8.0, x0=3.0, method=method, xtol=1e-6)
        assert result.converged
        assert result.iterations <= 6
        np.testing.assert_allclose(result.root, 2.0, rtol=1e-6)


def test_what_a_root_tells() -> None:
    result = root_scalar(jnp.cos, bracket=(0.0, 3.0), maxiter=3)
    assert (bool(result.converged), result.flag) == (False, "convergence error")
    assert int(result.iterations) == 3
    result = jax.vmap(lambda a: root_scalar(lambda x: x - a, bracket=(-1.0, 2.0)))(jnp.ones(2))
    assert result.flag == ["converged"] * 2
    assert result.function_calls.shape == (2,)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"x0": 1.0, "fprime": jnp.cos}, TypeError, "root_scalar: fprime= is not needed"),
        ({"x0": 1.0, "fprime2": True}, TypeError, "root_scalar: fprime2= is not needed"),
        ({}, ValueError, "neither bracket nor starting point provided"),
        ({"method": "brentq"}, ValueError, "Bracket needed for brentq"),
        ({"method": "newton", "bracket": (0.0, 5.0)}, ValueError, "x0 must not be None"),
        ({"method": "bogus", "x0": 1.0}, ValueError, "Unknown solver bogus"),
        ({"bracket": (5.0, 6.0)}, ValueError, "must have different signs"),
        ({"x0": [1.0]}, TypeError, "Many roots at once are jax.vmap of this"),
        ({"x0": 1j}, TypeError, "a complex one is found by root"),
    ],
)
def test_mistakes_about_scalars(given, error, text) -> None:
    with pytest.raises(error, match=text):
        root_scalar(lambda x: x**2 - 4.0, **given)


@pytest.mark.parametrize("wrong", [lambda x: jnp.stack([x, x]), jnp.int32, lambda x: (x, x)])
def test_a_scalar_function_gives_one_number(wrong) -> None:
    with pytest.raises(StructureError, match="expected a function that returns a real"):
        root_scalar(wrong, x0=1.0)


@pytest.mark.parametrize(
    "method",
    [
        "hybr",
        "lm",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("broyden1", "broyden2", "anderson", "diagbroyden", "krylov", "df-sane")
        ),
    ],
)
def test_root(method) -> None:
    solve = lambda t: root(lambda x: x + 0.1 * x**3 - t, jnp.zeros(2), method=method).x
    np.testing.assert_allclose(jax.jacfwd(solve)(1.1), np.full(2, 1 / 1.3), rtol=1e-6)


@pytest.mark.slow
def test_root_takes_pytrees_and_args() -> None:
    def solve(radius):
        system = lambda p, r: {"circle": p["x"] ** 2 + p["y"] ** 2 - r**2, "line": p["x"] - p["y"]}
        return root(system, {"x": 1.0, "y": 0.5}, args=(radius,))

    result = solve(2.0)
    assert result.success
    assert "converged" in result.message
    np.testing.assert_allclose(jax.tree.leaves(result.fun), 0.0, atol=1e-12)
    slope = jax.jit(jax.grad(lambda r: solve(r).x["y"]))(2.0)
    np.testing.assert_allclose(slope, np.sqrt(0.5), rtol=1e-10)


def test_mistakes_about_systems() -> None:
    for given, error, text in (
        ({"jac": jnp.eye(2)}, TypeError, "root: jac= is not needed"),
        ({"method": "bogus"}, ValueError, "Unknown solver bogus"),
    ):
        with pytest.raises(error, match=text):
            root(lambda x: x, jnp.ones(2), **given)
    for polish in (True, False):
        with pytest.raises(StructureError, match="root: expected one equation for each unknown"):
            root(lambda x: jnp.sum(x)[None], jnp.ones(2), polish=polish)
    with pytest.raises(TypeError, match="root: expected a function in JAX, got <lambda>"):
        root(lambda x: np.asarray(x) - 1, jnp.ones(2))
    stopped = lambda a: root(lambda x: x**2 - a, 9.0, options={"maxfev": 1}).x
    with pytest.raises(NotASolutionError, match="root: the solver did not converge"):
        jax.grad(stopped)(2.0)


T = np.array([0.0, 1.0, 2.0, 3.0])
Y = jnp.array([2.0, 1.1, 0.4, 0.3])  # so that residuals remain


@pytest.mark.parametrize(
    "method", ["trf", *(pytest.param(m, marks=pytest.mark.slow) for m in ("lm", "dogbox"))]
)
def test_least_squares(method) -> None:
    model = lambda x, y, rate: x[0] * jnp.exp(-rate * x[1] * T) - y
    fit = lambda y: least_squares(
        model, jnp.array([1.0, 0.5]), method=method, args=(y,), kwargs={"rate": 1.0}
    )
    h = 1e-4 * np.eye(4)
    difference = np.stack([(fit(Y + d).x - fit(Y - d).x) / 2e-4 for d in h], 1)

    def told(y):
        result = fit(y)
        return result.x, result.cost

    by_y, cost_by_y = jax.jacrev(told)(Y)
    np.testing.assert_allclose(by_y, difference, rtol=1e-5, atol=1e-7)
    result = fit(Y)
    np.testing.assert_allclose(result.cost, jnp.sum(result.fun**2) / 2)
    # By the envelope theorem: the cost changes by the residuals alone.
    np.testing.assert_allclose(cost_by_y, -result.fun, atol=1e-6)


@pytest.mark.parametrize(
    ("bounds", "slope"),
    [
        (lambda _: (-np.inf, np.inf), 3.0),
        pytest.param(lambda cap: (0.0, cap), 1.0, marks=pytest.mark.slow),
    ],
    ids=["open", "bounded"],
)
def test_least_squares_in_bounds(bounds, slope) -> None:
    """Two residuals in a tuple are no residual and its aux: the mean of 2 t and 4 t."""

    def solve(t):
        return least_squares(lambda x: (x - 2 * t, x - 4 * t), 0.1, bounds=bounds(t)).x

    np.testing.assert_allclose(jax.grad(solve)(0.5), slope, rtol=1e-6)


def test_a_pair_of_bounds_is_never_taken_for_two_unknowns() -> None:
    fit = lambda bounds: least_squares(lambda x: x - 2, 0.1 * jnp.ones(2), bounds=bounds).x
    for bounds in (([0.0, 0.0], [1.0, 3.0]), (jnp.zeros(2), jnp.array([1.0, 3.0]))):
        np.testing.assert_allclose(fit(bounds), [1.0, 2.0], rtol=1e-6)


def test_mistakes_about_residuals() -> None:
    for given, text in (
        ({"jac": "2-point"}, "least_squares: jac= is not needed, got '2-point'"),
        ({"loss": "huber"}, "least_squares: loss: expected 'linear', got 'huber'"),
    ):
        with pytest.raises(TypeError, match=text):
            least_squares(lambda x: x, jnp.ones(2), **given)
