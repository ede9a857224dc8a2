"""`freevars.torch.scipy` against closed forms: the rows of `freevars.jax.scipy`, in PyTorch."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, NonlinearConstraint

import freevars.torch as fv
from freevars.errors import NotASolutionError, StructureError
from freevars.torch.scipy import least_squares, minimize, root, root_scalar
from freevars.torch.scipy._constraints import as_functions, as_sides

jacobian = torch.autograd.functional.jacobian
QUICK = ["BFGS", "trust-exact", "Newton-CG", "SLSQP"]
OTHERS = ["CG", "L-BFGS-B", "TNC", "trust-constr", "dogleg", "trust-ncg", "trust-krylov"]


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def number(x):
    return torch.tensor(float(x))


def _lowest(a, **options):
    """At (a, a^2)."""
    rosen = lambda x: (a - x[0]) ** 2 + 5 * (x[1] - x[0] ** 2) ** 2
    return minimize(rosen, torch.ones(2, dtype=a.dtype), **options).x


@pytest.mark.parametrize(
    "method", [*QUICK, *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS)]
)
def test_no_method_differences(method) -> None:
    """In float32 differences of scipy's steps are zero."""
    slope = jacobian(lambda a: _lowest(a, method=method), torch.tensor(1.2, dtype=torch.float32))
    np.testing.assert_allclose(slope, [1.0, 2.4], rtol=2e-3)


@pytest.mark.parametrize("method", ["Nelder-Mead", "COBYQA"])
def test_methods_without_derivatives_are_polished(method) -> None:
    np.testing.assert_allclose(
        jacobian(lambda a: _lowest(a, method=method), number(1.2)), [1.0, 2.4], rtol=1e-3
    )


def test_a_loose_result_is_refused_where_it_is_not_polished() -> None:
    loose = {"options": {"gtol": 0.5}, "polish": False}
    with pytest.raises(NotASolutionError, match="minimize: the solver did not converge"):
        jacobian(lambda a: _lowest(a, **loose), number(1.2))
    kept = jacobian(lambda a: _lowest(a, on_failure="nan", **loose), number(1.2))
    assert kept.isnan().all()


def test_transforms_and_second_order() -> None:
    slopes = torch.func.vmap(torch.func.jacrev(_lowest))(torch.tensor([0.9, 1.2]))
    np.testing.assert_allclose(slopes, [[1.0, 1.8], [1.0, 2.4]], rtol=1e-6)
    second = torch.func.jacfwd(torch.func.jacrev(_lowest))(number(1.2))
    np.testing.assert_allclose(second, [0.0, 2.0], atol=1e-5)


def test_args_captures_and_starts_of_any_form() -> None:
    a, b = number(1.0).requires_grad_(), number(3.0).requires_grad_()
    fun = lambda x, a, n: ((x["u"] - a) ** n).sum() + (x["v"] - b) ** 2
    x = minimize(fun, {"u": np.zeros(2), "v": 0.0}, args=(a, 2)).x
    total = x["u"].sum() + 10 * x["v"]
    np.testing.assert_allclose(torch.stack(torch.autograd.grad(total, (a, b))), [2.0, 10.0])


@pytest.mark.parametrize("x0", [[0, 0], (0, 0), np.zeros(2, int), [0.0, torch.tensor(1.0)]])
def test_numbers_are_a_tensor(x0) -> None:
    x = minimize(lambda x: torch.dot(x, x) - 2 * x.sum(), x0).x
    np.testing.assert_allclose(x, [1.0, 1.0])


def test_numbers_have_the_precision_of_the_function() -> None:
    """Python's own have none: those of an x0 are double next to doubles, and else the default."""
    torch.set_default_dtype(torch.float32)
    m = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    for solve in (
        lambda: root(lambda x: m @ x - b, [0, 0.0]).x,  # a product of two precisions is refused
        lambda: minimize(lambda x: ((m @ x - b) ** 2).sum(), (0.0, 0.0)).x,
        lambda: least_squares(lambda x: (m * x).sum(1) - b, [0.0, 0.0]).x,  # widened
        lambda: fv.scipy.fixed_point(lambda x: x - (m @ x - b) / 4, [0.0, 0.0]),
    ):
        x = solve()
        torch.testing.assert_close(x, torch.linalg.solve(m, b), rtol=1e-6, atol=1e-6)
        (slope,) = torch.autograd.grad(x.sum(), b)
        torch.testing.assert_close(slope, torch.linalg.solve(m.mT, torch.ones_like(b)))
    assert root_scalar(lambda x: x - b[0], bracket=(0.0, 9.0)).root.dtype == torch.float64
    beside = root(lambda x: {"s": x["s"] - 1, "v": x["v"] - b}, {"s": 0.0, "v": 0 * b}).x
    assert beside["s"].dtype == torch.float64
    assert root(lambda x: m.float() @ x - 1, [0.0, 0.0]).x.dtype == torch.float32
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        root(lambda x: torch.ones(3) @ x - b, [0.0, 0.0])


def test_an_objective_of_one_number() -> None:
    """As scipy takes it, of x0 = [0.0] say."""
    solve = lambda a: minimize(lambda x: (x - a) ** 2, [0.0])
    assert solve(2.0).fun.shape == ()
    np.testing.assert_allclose(jacobian(lambda a: solve(a).x, number(2.0)), [1.0])
    found = root_scalar(lambda x: x.reshape(1) - 2, bracket=(0, 5)).root
    assert found.shape == ()
    np.testing.assert_allclose(found, 2.0)


FUN = lambda x: ((x - torch.tensor([1.0, 2.0])) ** 2).sum()
BOUNDS = {
    "sides": (None, torch.tensor([0.5, 5.5])),
    "lists": (None, [0.5, 5.5]),
    "pairs": [(None, 0.5), (None, 5.5)],
    "rows": np.array([[-np.inf, 0.5], [-np.inf, 5.5]]),
    "zip": [*zip([None, None], [0.5, 5.5], strict=True)],
    "Bounds": Bounds(-np.inf, [0.5, 5.5]),
}


@pytest.mark.parametrize("form", BOUNDS)
def test_bounds_in_every_form(form) -> None:
    (lower, upper), feasible = as_sides(BOUNDS[form], torch.zeros(2), "minimize")
    np.testing.assert_array_equal(upper, [0.5, 5.5])
    assert lower is None or (lower == -math.inf).all()
    assert not feasible
    np.testing.assert_allclose(minimize(FUN, torch.zeros(2), bounds=BOUNDS[form]).x, [0.5, 2.0])


def test_derivatives_flow_into_bounds() -> None:
    solve = lambda cap: minimize(FUN, torch.zeros(2), bounds=[(-1, cap), (None, None)]).x
    np.testing.assert_allclose(jacobian(solve, number(0.5)), [1.0, 0.0], atol=1e-12)


def test_derivatives_flow_into_constraints() -> None:
    """At (t / 2, s - t / 2), as long as t holds x below the middle."""

    def solve(s, t):
        limits = [
            NonlinearConstraint(lambda x: x[0] + x[1], s, s),
            {"type": "ineq", "fun": lambda x: t - 2 * x[0]},
        ]
        fun = lambda x: ((x - torch.tensor([2.0, 1.0])) ** 2).sum()
        return minimize(fun, torch.tensor([0.5, 0.5]), constraints=limits).x

    by_both = jacobian(lambda s: solve(s, s / 5), number(1.0))
    np.testing.assert_allclose(by_both, [0.1, 0.9], atol=1e-9)


def test_linear_constraints_are_sorted_by_their_limits() -> None:
    given = [
        LinearConstraint([[1.0, 1.0], [0.0, 1.0]], [1.0, -5.0], [1.0, np.inf]),
        LinearConstraint([[1.0, 0.0]], ub=0.5),
    ]
    equality, inequality = as_functions(given, "minimize")
    x = torch.tensor([0.3, 0.9])
    flat = lambda f: np.concatenate([np.ravel(part) for part in f(x)])
    np.testing.assert_allclose(flat(equality), [0.2])
    np.testing.assert_allclose(sorted(flat(inequality)), [0.2, 5.9])


def _below(cap, x):
    """The point nearest to (2, -1) with x[0] <= cap and x[1] >= 0: limits, and none where it is
    infinite."""
    fun = lambda x: ((x - torch.tensor([2.0, -1.0])) ** 2).sum()
    constraint = NonlinearConstraint(lambda x: x, [-math.inf, 0.0], [cap, math.inf])
    return minimize(fun, x, constraints=constraint).x


@pytest.mark.parametrize(
    "by", [torch.func.jacrev, torch.func.jacfwd, lambda f: partial(jacobian, f)]
)
def test_limits_that_are_differentiated(by) -> None:
    slope = by(lambda cap: _below(cap, torch.tensor([0.1, 0.3])))(number(1.0))
    np.testing.assert_allclose(slope, [1.0, 0.0], atol=1e-9)


def test_limits_in_a_batch_may_be_infinite() -> None:
    caps = torch.tensor([1.0, math.inf])
    solve = lambda cap: _below(cap, torch.tensor([0.1, 0.3]))
    found = torch.func.vmap(solve)(caps)
    np.testing.assert_allclose(found, [[1.0, 0.0], [2.0, 0.0]], atol=1e-6)


def test_sides_of_two_unknowns_are_never_taken_for_pairs() -> None:
    x0 = torch.zeros(1), torch.zeros(1)
    with pytest.raises(TypeError, match="two sides of two numbers, or two pairs"):
        as_sides(((0.0, 0.0), (1.0, 1.0)), x0, "minimize")
    (lower, upper), _ = as_sides(Bounds([0.0, 0.0], [1.0, 1.0]), x0, "minimize")
    assert (*lower, *upper) == (0, 0, 1, 1)


def test_what_the_result_tells() -> None:
    result = minimize(FUN, torch.zeros(2), method="BFGS")
    assert result.message == "Optimization terminated successfully."
    assert bool(result.success)
    assert result.nit > 0
    assert int(result.nhev) == -1
    assert "message='Optimization terminated" in repr(result)
    assert not minimize(lambda x: (x - 3.0) ** 4, 0.0, options={"maxiter": 1}).success


@pytest.mark.parametrize(
    "how",
    [
        {"bracket": (0.0, 5.0)},
        {"bracket": (0.0, 5.0), "method": "toms748"},
        {"x0": 1},
        {"x0": 1.0, "method": "halley"},
        {"x0": 1.0, "x1": 1.5},
    ],
)
def test_root_scalar(how) -> None:
    solve = lambda a: root_scalar(lambda x, a: x**2 - a, args=a, **how).root
    np.testing.assert_allclose(solve(number(4.0)), 2.0, rtol=1e-12)
    np.testing.assert_allclose(jacobian(solve, number(4.0)), 0.25, rtol=1e-12)


def test_a_bracket_has_no_part_in_the_root() -> None:
    a = number(4.0).requires_grad_()
    result = root_scalar(lambda x: x**2 - a, bracket=(a / 4, a))
    assert result.flag == "converged"
    np.testing.assert_allclose(torch.autograd.grad(result.root, a)[0], 0.25)


@pytest.mark.parametrize("method", ["hybr", "lm", "broyden1", "krylov", "df-sane"])
def test_root(method) -> None:
    solve = lambda t: root(lambda x: x + 0.1 * x**3 - t, torch.zeros(2), method=method).x
    np.testing.assert_allclose(jacobian(solve, number(1.1)), np.full(2, 1 / 1.3), rtol=1e-6)


def test_root_takes_pytrees() -> None:
    def solve(radius):
        system = lambda p: {
            "circle": p["x"] ** 2 + p["y"] ** 2 - radius**2,
            "line": p["x"] - p["y"],
        }
        return root(system, {"x": 1.0, "y": 0.5}).x["y"]

    np.testing.assert_allclose(jacobian(solve, number(2.0)), np.sqrt(0.5), rtol=1e-10)


def test_least_squares() -> None:
    t, y = torch.arange(4.0), torch.tensor([2.0, 1.1, 0.4, 0.3])  # so that residuals remain
    start = torch.tensor([1.0, 0.5])
    fit = lambda y: least_squares(lambda x: x[0] * torch.exp(-x[1] * t) - y, start)
    steps = 1e-4 * torch.eye(4)
    difference = torch.stack([(fit(y + d).x - fit(y - d).x) / 2e-4 for d in steps], 1)
    np.testing.assert_allclose(jacobian(lambda y: fit(y).x, y), difference, rtol=1e-5, atol=1e-7)
    result = fit(y)
    # By the envelope theorem: the cost changes by the residuals alone.
    np.testing.assert_allclose(jacobian(lambda y: fit(y).cost, y), -result.fun, atol=1e-6)
    bounded = lambda cap: least_squares(lambda x: (x - 2.0, x - 4.0), 0.1, bounds=(0.0, cap)).x
    np.testing.assert_allclose(jacobian(bounded, number(0.5)), 1.0)


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize(
    ("fun", "text"),
    [
        (lambda x: np.exp(x).sum(), "asks for the numbers of a tensor"),
        (lambda x: math.exp(x), "which returns float"),
        (lambda x: (x**2).item(), "which returns float"),
        (lambda x: x.detach() ** 2, "whose value has no derivative by x"),
    ],
)
def test_a_function_in_numpy_is_told_what_to_write(fun, text) -> None:
    with pytest.raises(TypeError, match=rf"expected a function in PyTorch, got .*\.py:\d.*{text}"):
        minimize(fun, 1.0)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: minimize(FUN, torch.zeros(2), jac=True), TypeError, "jac= is not needed"),
        (lambda: minimize(FUN, torch.zeros(2), method="bogus"), ValueError, "Unknown solver bogus"),
        (lambda: minimize(lambda x: x, torch.zeros(2)), TypeError, r"got shape \(2,\)"),
        (lambda: minimize(lambda x: (x, x), 1.0), TypeError, "return the value alone"),
        (lambda: minimize(lambda _: None, 1.0), TypeError, "got NoneType"),
        (lambda: minimize(lambda x: (x + 1j).sum(), 1.0), TypeError, "real .* got .*complex128"),
        (
            lambda: minimize(FUN, torch.zeros(2), bounds=(torch.zeros(2), torch.ones(2))),
            TypeError,
            "two sides of two numbers, or two",
        ),
        (
            lambda: minimize(FUN, torch.zeros(2), constraints=[3]),
            TypeError,
            r"constraints\[0\]: expected a dict",
        ),
        (
            lambda: root(lambda x: x[:1], torch.zeros(2)),
            StructureError,
            "<lambda> has 1 components for 2 unknowns",
        ),
        (lambda: root_scalar(lambda x: x), ValueError, "neither bracket nor starting point"),
        (lambda: root_scalar(lambda x: x, x0=torch.ones(2)), TypeError, "Many roots at once"),
        (lambda: root_scalar(lambda x: x, bracket=(5.0, 6.0)), ValueError, "different signs"),
        (lambda: least_squares(lambda x: x, 1.0, loss="huber"), TypeError, "expected 'linear'"),
    ],
)
def test_mistakes(call, error, text) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # the compiler's own look
def test_a_program_that_is_compiled_or_recorded() -> None:
    """The compiler leaves them alone, and what records numbers as they are is told."""
    a = torch.tensor([4.0, 9.0], requires_grad=True)

    def lowest(a):
        return minimize(lambda x: (x**3 / 3 - a * x).sum(), torch.ones(2)).x

    solvers = (
        lowest,
        lambda a: least_squares(lambda x: x**2 - a, torch.ones(2)).x,
        lambda a: root(lambda x: x**2 - a, torch.ones(2)).x,
        lambda a: fv.scipy.fixed_point(lambda x: (x + a / x) / 2, torch.ones(2)),
        lambda a: torch.stack(
            [root_scalar(lambda x, k=k: x**2 - k, bracket=(0.0, 9.0)).root for k in a]
        ),
    )
    for solve in solvers:
        program = torch.compile(lambda a, solve=solve: solve(2 * a / 2).sum(), backend="eager")
        torch.testing.assert_close(
            torch.autograd.grad(program(a), a)[0], torch.tensor([1 / 4, 1 / 6])
        )
    with pytest.raises(fv.CaptureError, match="cannot record a solve"):
        torch.func.linearize(lowest, a.detach())


def test_it_is_the_attribute_scipy() -> None:
    assert fv.scipy.minimize is minimize
    with pytest.raises(AttributeError, match=r"'freevars.torch' has no attribute 'numpy'"):
        fv.numpy  # noqa: B018


def test_polishing_ends_on_the_bounds_that_hold_x() -> None:
    """An interior-point method keeps a distance from them, which the other components feel."""

    def solve(a, **how):
        bowl = lambda x: (x[0] - 3 * a) ** 2 + (x[1] - a) ** 2 + x[0] * x[1]
        x0 = torch.zeros(2, dtype=torch.float64)
        options = {"method": "trust-constr", "bounds": (None, 1.0)}
        return fv.scipy.minimize(bowl, x0, **options, **how).x

    a = torch.tensor(1.0, dtype=torch.float64)
    assert solve(a, polish=False)[0] < 1.0
    np.testing.assert_allclose(solve(a), [1.0, 0.5], rtol=1e-14)
    np.testing.assert_allclose(torch.func.jacrev(solve)(a), [0.0, 1.0], atol=1e-12)
    many = torch.stack([a, 1.1 * a])
    np.testing.assert_allclose(torch.func.vmap(solve)(many), [[1.0, 0.5], [1.0, 0.6]], rtol=1e-14)
