"""`freevars.jax.scipy.minimize` against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from scipy.optimize import (
    Bounds,
    LinearConstraint,
    NonlinearConstraint,
    OptimizeResult,
    OptimizeWarning,
)

import freevars.jax as fv
from freevars.errors import NotASolutionError
from freevars.jax.scipy import minimize
from freevars.jax.scipy._constraints import as_functions, as_sides
from freevars.jax.scipy._scipy import as_start

QUICK = ["BFGS", "trust-exact"]
OTHERS = [
    "SLSQP",
    "Newton-CG",
    "CG",
    "L-BFGS-B",
    "TNC",
    "trust-constr",
    "dogleg",
    "trust-ncg",
    "trust-krylov",
]
TARGET = np.array([1.0, 2.0])


def _lowest(a, **options):
    """At (a, a^2)."""
    rosen = lambda x: (a - x[0]) ** 2 + 5 * (x[1] - x[0] ** 2) ** 2
    return minimize(rosen, jnp.ones(2), **options).x


@pytest.mark.parametrize(
    "method", [*QUICK, *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS)]
)
def test_no_method_differences(method) -> None:
    """Where float32 is all there is, differences of scipy's steps are zero."""
    with jax.enable_x64(False):
        slope = jax.jacrev(lambda a: _lowest(a, method=method))(1.2)
    np.testing.assert_allclose(slope, [1.0, 2.4], rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Nelder-Mead", "Powell", "COBYLA", "COBYQA"])
def test_methods_without_derivatives_are_polished(method) -> None:
    """The error of x goes to its square, but for a factor."""
    solve = lambda a, **how: _lowest(a, method=method, **how)
    error = lambda x: np.max(np.abs(x - np.array([1.2, 1.44])))
    assert error(solve(1.2)) < min(20 * error(solve(1.2, polish=False)) ** 2 + 1e-12, 1e-3)
    np.testing.assert_allclose(jax.jacrev(solve)(1.2), [1.0, 2.4], rtol=1e-3)


def test_polishing_ends_on_the_bounds_that_hold_x() -> None:
    """An interior-point method keeps a distance from them, which the other components feel."""

    def solve(a, **how):
        bowl = lambda x: (x[0] - 3 * a) ** 2 + (x[1] - a) ** 2 + x[0] * x[1]
        return minimize(bowl, jnp.zeros(2), method="trust-constr", bounds=(None, 1.0), **how).x

    assert solve(1.0, polish=False)[0] < 1.0
    np.testing.assert_allclose(solve(1.0), [1.0, 0.5], rtol=1e-14)
    np.testing.assert_allclose(jax.jacfwd(solve)(1.0), [0.0, 1.0], atol=1e-12)


@pytest.mark.slow
def test_a_loose_result_is_polished_or_refused() -> None:
    loose = {"options": {"gtol": 0.5}}
    with pytest.raises(NotASolutionError, match="minimize: the solver did not converge"):
        jax.jacfwd(lambda a: _lowest(a, polish=False, **loose))(1.2)
    kept = jax.jacfwd(lambda a: _lowest(a, polish=False, on_failure="nan", **loose))(1.2)
    assert np.isnan(kept).all()


@pytest.mark.slow
def test_in_programs_of_any_order() -> None:
    many = jnp.array([0.9, 1.2])
    slopes = jax.jit(jax.vmap(jax.jacrev(_lowest)))(many)
    np.testing.assert_allclose(slopes, jnp.stack([jnp.ones(2), 2 * many], 1), rtol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(jax.jacrev(_lowest))(1.2), [0.0, 2.0], atol=1e-5)


@pytest.mark.slow
def test_args_and_captures_alike() -> None:
    def solve(a, b):
        fun = lambda x, a, n: jnp.sum((x["u"] - a) ** n) + (x["v"] - b) ** 2
        return minimize(fun, {"u": jnp.zeros(2), "v": 0.0}, args=(a, 2)).x

    assert jax.tree.map(jnp.shape, solve(1.0, 3.0)) == {"u": (2,), "v": ()}

    def total(a, b):
        x = solve(a, b)
        return jnp.sum(x["u"]) + 10 * x["v"]

    np.testing.assert_allclose(jax.grad(total, (0, 1))(1.0, 3.0), [2.0, 10.0])
    single = minimize(lambda x, a: (x - a) ** 2, 0.0, args=2.0).x  # scipy takes one as it is
    np.testing.assert_allclose(single, 2.0)


def test_a_start_has_no_part_in_the_solution() -> None:
    slope = jax.grad(lambda x0: minimize(lambda x: (x - 2.0) ** 2, x0).x)
    assert slope(1.0) == 0.0


@pytest.mark.parametrize("x0", [[0, 0], (0, 0), np.zeros(2, int), [0.0, np.float64(1)]])
def test_numbers_are_an_array(x0) -> None:
    x = minimize(lambda x: jnp.dot(x, x) - 2 * x.sum(), x0).x
    np.testing.assert_allclose(x, [1.0, 1.0])


def test_starts_that_stay_pytrees() -> None:
    start = lambda x0: jax.tree.map(jnp.result_type, as_start(x0))
    double = jnp.dtype(float)
    assert start({"a": 1, "b": (1.0, jnp.zeros(2))}) == {"a": double, "b": (double, double)}
    assert start((jnp.zeros(2), jnp.zeros(3))) == (double, double)
    assert start([]) == start(np.float64(1)) == double
    assert start(np.complex64(1)) == np.complex64


def test_an_objective_of_one_number() -> None:
    """As scipy takes it, of x0 = [0.0] say."""
    solve = lambda a: minimize(lambda x: (x - a) ** 2, jnp.zeros(1))
    assert solve(2.0).fun.shape == ()
    np.testing.assert_allclose(jax.jacfwd(lambda a: solve(a).x)(2.0), [1.0])


CAP = 0.5
BOUNDS = {
    "sides": (None, np.array([CAP, 5.5])),
    "lists": (None, [CAP, 5.5]),
    "pairs": [(None, CAP), (None, 5.5)],
    "rows": np.array([[-np.inf, CAP], [-np.inf, 5.5]]),
    "zip": zip([None, None], [CAP, 5.5], strict=True),
    "Bounds": Bounds(-np.inf, [CAP, 5.5]),
}


@pytest.mark.parametrize("form", BOUNDS)
def test_bounds_in_every_form(form) -> None:
    (lower, upper), feasible = as_sides(BOUNDS[form], jnp.zeros(2), "minimize")
    np.testing.assert_array_equal(upper, [CAP, 5.5])
    assert lower is None or np.all(lower == -np.inf)
    assert not feasible


def test_bounds_over_the_numbers_of_a_pytree() -> None:
    x0 = {"p": 0.0, "q": jnp.zeros((1, 2))}
    pairs = [(0, 1), (2, 3), (4, 5)]
    limits = Bounds([0, 2, 4], [1, 3, 5], keep_feasible=True)
    for given, keep in ((pairs, False), (limits, True)):
        (lower, upper), feasible = as_sides(given, x0, "minimize")
        assert jax.tree.map(np.shape, lower) == {"p": (), "q": (1, 2)}
        assert (lower["p"], upper["p"]) == (0, 1)
        assert (lower["q"].tolist(), upper["q"].tolist()) == ([[2, 4]], [[3, 5]])
        assert np.all(feasible) == keep


def test_sides_of_two_parts_are_not_taken_for_pairs() -> None:
    parts = [jnp.zeros(1), jnp.zeros(1)]
    for x0 in (parts, tuple(parts)):
        sides = [type(x0)(side) for side in ([0.0, 1.0], [2.0, 3.0])]
        with pytest.raises(TypeError, match=r"two sides of .*, or two pairs .* upper\)\.$"):
            as_sides(sides, x0, "minimize")
    (lower, upper), _ = as_sides([(0.0, 1.0), (2.0, 3.0)], parts, "minimize")
    assert (lower, upper) == ([0.0, 2.0], [1.0, 3.0])


@pytest.mark.parametrize("transform", [lambda f: f, pytest.param(jax.jit, marks=pytest.mark.slow)])
def test_derivatives_flow_into_bounds(transform) -> None:
    fun = lambda x: jnp.sum((x - TARGET) ** 2)
    limits = lambda cap: [(-1, cap), (None, None)]
    solve = lambda cap: minimize(fun, jnp.zeros(2), bounds=limits(cap)).x
    np.testing.assert_allclose(transform(solve)(0.5), [0.5, 2.0])
    np.testing.assert_allclose(transform(jax.jacrev(solve))(0.5), [1.0, 0.0], atol=1e-12)


@pytest.mark.slow
def test_a_degenerate_bound() -> None:
    at = lambda t, **how: minimize(lambda x: (x - t) ** 2, 0.3, bounds=(None, 1.0), **how).x
    with pytest.raises(NotASolutionError, match="degenerate: the upper bound of x is reached"):
        jax.grad(at)(1.0)
    assert jax.grad(lambda t: at(t, one_sided=True))(1.0) == 0.0


def _total(x):
    return x[0] + x[1]


X = np.array([0.3, 0.9])
# The same constraints: x0 + x1 = 1, x0 <= 0.5, x1 >= -5
CONSTRAINTS = {
    "dicts": [
        {"type": "eq", "fun": lambda x, t: _total(x) - t, "args": (1.0,)},
        {"type": "ineq", "fun": lambda x: x[1] + 5},
        {"type": "INEQ", "fun": lambda x: 0.5 - x[0]},
    ],
    "rows": NonlinearConstraint(
        lambda x: [_total(x), x[0], x[1]], [1.0, -np.inf, -5.0], [1.0, 0.5, np.inf]
    ),
    "linear": [
        LinearConstraint([[1.0, 1.0], [0.0, 1.0]], [1.0, -5.0], [1.0, np.inf]),
        LinearConstraint(scipy.sparse.csr_array([[1.0, 0.0]]), ub=0.5),
    ],
}


@pytest.mark.parametrize("form", CONSTRAINTS)
def test_constraints_are_sorted_by_their_limits(form) -> None:
    equality, inequality = as_functions(CONSTRAINTS[form], "minimize")
    flat = lambda f: np.concatenate([np.ravel(part) for part in f(X)])
    np.testing.assert_allclose(flat(equality), [0.2])
    np.testing.assert_allclose(sorted(flat(inequality)), [0.2, 5.9])


def test_limits_that_are_traced() -> None:
    def sorted_into(t):
        found = as_functions(
            [NonlinearConstraint(_total, t, t), NonlinearConstraint(_total, 0, t)], ""
        )
        return [f(X) for f in found]

    (zero,), (above, below) = jax.jit(sorted_into)(2.0)
    np.testing.assert_allclose(np.ravel([zero, above, below]), [-0.8, 1.2, 0.8])
    assert as_functions((), "minimize") == (None, None)


def test_limits_of_which_some_are_traced() -> None:
    """What is known is sorted all the same: the equation of the second row."""

    def sorted_into(t):
        limits = NonlinearConstraint(lambda x: x, [-np.inf, 0.9], [t, 0.9])
        return [f(X) for f in as_functions(limits, "")]

    (zero,), (below,) = jax.jit(sorted_into)(2.0)
    np.testing.assert_allclose([zero, below], [[0.0], [1.7]], atol=1e-7)


@pytest.mark.slow
def test_limits_that_are_traced_may_be_infinite() -> None:
    """No limit, and no number that a solver would count with."""

    def solve(t):
        limits = jnp.stack([-jnp.inf, 0.0]), jnp.stack([t, jnp.inf])
        fun = lambda x: jnp.sum((x - jnp.array([2.0, -1.0])) ** 2)
        constraint = NonlinearConstraint(lambda x: x, *limits)
        return minimize(fun, jnp.array([0.1, 0.3]), constraints=constraint).x

    np.testing.assert_allclose(jax.jit(solve)(1.0), [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(jax.jacrev(solve)(1.0), [1.0, 0.0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "trust-constr"])
def test_derivatives_flow_into_constraints(method) -> None:
    """At (t / 2, s - t / 2), as long as t holds x below the middle."""

    def solve(s, t):
        limits = [
            NonlinearConstraint(_total, s, s),
            {"type": "ineq", "fun": lambda x: t - 2 * x[0]},
        ]
        fun = lambda x: jnp.sum((x - jnp.array([2.0, 1.0])) ** 2)
        return minimize(fun, jnp.array([0.5, 0.5]), method=method, constraints=limits).x

    by_both = jax.jacfwd(lambda s: solve(s, s / 5))(1.0)  # s, and t = s / 5
    np.testing.assert_allclose(by_both, [0.1, 0.9], atol=1e-9)


def test_what_the_result_tells() -> None:
    fun = lambda x, a: jnp.sum((x - a) ** 2) + a**2
    result = minimize(fun, jnp.zeros(2), args=(3.0,), method="BFGS")
    assert result.message == "Optimization terminated successfully."
    assert bool(result.success)
    assert (int(result.status), int(result.nhev)) == (0, -1)
    assert result.nit > 0
    assert result.nfev == result.njev > 0
    np.testing.assert_allclose(result.fun, 9.0)
    value = lambda a: minimize(fun, jnp.zeros(2), args=(a,)).fun
    np.testing.assert_allclose(jax.grad(value)(3.0), 6.0)

    batch = jax.jit(jax.vmap(lambda a: minimize(fun, jnp.zeros(2), args=(a,))))(jnp.arange(2.0))
    assert batch.success.tolist() == [True, True]
    assert batch.message == ["Optimization terminated successfully."] * 2
    known = []
    jax.jit(lambda a: known.append(minimize(fun, jnp.zeros(2), args=(a,)).message))(1.0)
    assert known == [None]


def test_a_failure_is_told_by_the_result() -> None:
    result = minimize(lambda x: (x - 3.0) ** 4, 0.0, options={"maxiter": 1})
    assert not result.success
    assert "exceeded" in result.message


@pytest.mark.slow
def test_callback_and_callable_method() -> None:
    seen = []
    minimize(lambda x: (x - 3.0) ** 4, 0.0, callback=seen.append, method="CG")
    assert isinstance(seen[0], np.ndarray)

    def newton(fun, x0, args, *, jac, hess, **_):
        x = x0 - np.linalg.solve(hess(x0), jac(x0))
        return OptimizeResult(x=x, fun=fun(x), success=True)

    solve = lambda a: minimize(lambda x: jnp.sum((x - a) ** 2), jnp.zeros(2), method=newton).x
    np.testing.assert_allclose(jax.jacrev(solve)(2.0), [1.0, 1.0])


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"jac": True}, TypeError, "minimize: jac= is not needed, got True"),
        ({"hess": lambda x: x}, TypeError, "minimize: hess= is not needed"),
        ({"hessp": lambda x: x}, TypeError, "minimize: hessp= is not needed"),
        ({"method": "bogus"}, ValueError, "Unknown solver bogus"),
        ({"bounds": (jnp.zeros(2), jnp.ones(2))}, TypeError, "two sides of two numbers, or two"),
        ({"bounds": [(0, 1)] * 3}, TypeError, "for each of 2 unknowns"),
        ({"constraints": {"type": "le", "fun": sum}}, ValueError, "expected type 'eq' or 'ineq'"),
        ({"constraints": {"fun": sum}}, ValueError, "expected type 'eq' or 'ineq', got None"),
        ({"constraints": {"type": "eq"}}, TypeError, r"\[0\]: fun: expected a function of x"),
        ({"constraints": [3]}, TypeError, r"constraints\[0\]: expected a dict"),
        ({"constraints": 3}, TypeError, r"constraints\[0\]: expected a dict"),
        ({"constraints": Bounds(0, 1)}, TypeError, r"Bounds of x itself go into bounds="),
        (
            {"constraints": {"type": "eq", "fun": jnp.sum, "jac": jnp.ones}},
            TypeError,
            r"constraints\[0\]: jac= is not needed",
        ),
        (
            {"constraints": NonlinearConstraint(jnp.sum, 0, 1, keep_feasible=True)},
            TypeError,
            "keep_feasible: expected False",
        ),
    ],
)
def test_mistakes(given, error, text) -> None:
    with pytest.raises(error, match=text):
        minimize(lambda x: jnp.sum(x**2), jnp.zeros(2), **given)


def _branches(x):
    return x if x > 0 else -x


@pytest.mark.parametrize("fun", [lambda x: np.asarray(x) ** 2, lambda x: float(x) ** 2, _branches])
def test_a_function_in_numpy_is_told_what_to_write(fun) -> None:
    with pytest.raises(TypeError, match=r"minimize: expected a function in JAX, got .*\.py:\d"):
        minimize(fun, 1.0)


@pytest.mark.parametrize(("fun", "got"), [(lambda x: x, r"shape \(2,\)"), (lambda _: None, "None")])
def test_an_objective_that_is_no_number(fun, got) -> None:
    with pytest.raises(TypeError, match=r"a number of shape \(\), got " + got):
        minimize(fun, jnp.zeros(2))


def test_a_gradient_beside_the_value_is_refused() -> None:
    with pytest.raises(TypeError, match="return the value alone"):
        minimize(lambda x: (x**2, 2 * x), 1.0)


def test_an_unknown_option_is_told_by_scipy() -> None:
    with pytest.warns(OptimizeWarning, match="Unknown solver options: bogus"):
        minimize(lambda x: x**2, 1.0, options={"bogus": 1})


def test_it_is_the_attribute_scipy() -> None:
    assert fv.scipy.minimize is minimize
    with pytest.raises(AttributeError, match=r"'freevars.jax' has no attribute 'numpy'"):
        fv.numpy  # noqa: B018
