"""Minima with constraints in PyTorch."""

from typing import Any

import numpy as np
import pytest
import torch

import freevars.torch as fv
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

F64 = torch.float64


class Host(RuleHost):
    def numpy(self, x):
        return x.detach().numpy() if isinstance(x, torch.Tensor) else x

    def on_host(self, solver, **options):
        return solver


def _array(values):
    return torch.as_tensor(np.asarray(values, dtype="float64"))


HOST = Host(
    xp=torch,
    fv=fv,
    array=_array,
    grad=torch.func.grad,
    jacobian=torch.func.jacrev,
    loop=None,
    tree_map=None,
)
MINIMIZE = fv.argmin(active_set(HOST))


def _backward(f, t, order):
    """The derivative of the sum of sines, of an order."""
    t = t.clone().requires_grad_()
    out = f(t).sin().sum()
    for k in range(order):
        (out,) = torch.autograd.grad(out, t, create_graph=k + 1 < order)
    return out


TRANSFORMATIONS = {
    "value": lambda f, t: f(t),
    "backward": lambda f, t: _backward(f, t, 1),
    "second": lambda f, t: _backward(f, t, 2),
    "jvp": lambda f, t: torch.func.jvp(f, (t,), (torch.ones_like(t),))[1],
    "func_grad": lambda f, t: torch.func.grad(lambda t: f(t).sum())(t),
}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_equals_the_closed_form(problem, transformation) -> None:
    transform, t = TRANSFORMATIONS[transformation], torch.tensor(T, dtype=F64)
    got = transform(lambda t: problem.solve(HOST, MINIMIZE, t), t)
    expected = transform(lambda t: problem.exact(HOST, t), t)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


def test_a_result_beside_its_bounds_in_any_units() -> None:
    t = torch.tensor(T, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(beside_bounds(HOST, t), t)
    torch.testing.assert_close(slope, torch.ones((), dtype=F64))


@pytest.mark.parametrize("bend", [0.0, 1.0])
def test_what_a_solver_leaves_of_zero_is_no_size(bend) -> None:
    t = torch.tensor(1.0, dtype=F64, requires_grad=True)
    for left in LEFT if bend else LEFT[:-1]:
        assert torch.autograd.grad(all_at_zero(HOST, left, bend, t), t)[0] == 2.0
    for size in (1e-6, 1e-10, 1e-14):
        (slope,) = torch.autograd.grad(free_and_small(HOST, size, t), t)
        torch.testing.assert_close(slope, torch.tensor(2.0, dtype=F64))


def test_a_batch_of_problems() -> None:
    """A box that each problem has for itself, and one equation in each."""

    def project(fun, x0, bounds, equality):
        low, high = bounds
        price = torch.zeros(len(x0), 1, dtype=F64)
        for _ in range(200):  # of the dual: the objective is |x - a|^2 / 2
            x = torch.clamp(x0 - torch.func.grad(lambda x: fun(x).sum())(x0) - price, low, high)
            price = price + equality(x)[:, None] / 2
        return x

    solve = fv.argmin(project, batch_dims=1)
    a = torch.tensor([[0.5, 0.4, -2.0], [0.2, 0.3, 0.1]], dtype=F64, requires_grad=True)
    x = solve(
        lambda x: ((x - a) ** 2).sum(1) / 2,
        torch.zeros(2, 3, dtype=F64),
        bounds=(0.0, 1.0),
        equality=lambda x: x.sum(1) - 1,
    )
    torch.testing.assert_close(
        x.detach(), torch.tensor([[0.55, 0.45, 0.0], [1 / 3, 13 / 30, 7 / 30]], dtype=F64)
    )
    (by_a,) = torch.autograd.grad(x[:, 0].sum(), a)
    expected = torch.tensor([[1 / 2, -1 / 2, 0.0], [2 / 3, -1 / 3, -1 / 3]], dtype=F64)
    torch.testing.assert_close(by_a, expected)


@pytest.mark.parametrize("refused", REFUSED, ids=lambda r: r.name)
def test_what_is_refused(refused) -> None:
    def slope(**options):
        t = torch.tensor(1.0, dtype=F64, requires_grad=True)
        return torch.autograd.grad(refused.solve(HOST, options, t), t)[0]

    with pytest.raises(getattr(fv, refused.error), match=refused.text):
        slope()
    assert slope(on_failure="nan").isnan()


def test_a_refusal_under_vmap_is_in_the_words_of_the_constraints() -> None:
    """And names the problem; each element has a bound of its own."""

    @fv.argmin
    def outside(fun: Any, x0: Any, bounds: Any) -> Any:
        return bounds[0] - 1

    def slope(low: torch.Tensor) -> torch.Tensor:
        x0 = torch.zeros(2, dtype=F64)
        return outside(lambda x: ((x - low) ** 2).sum(), x0, bounds=(low * x0 + low, None)).sum()

    lows = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    words = r"outside \(problem 0 of 3\): the result violates the lower bound of x\[0\]"
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(fv.NotASolutionError, match=words):
            torch.func.vmap(transform(slope))(lows)


def test_one_sided() -> None:
    """At the degenerate point, the bound stays active."""
    t = torch.tensor(1.0, dtype=F64, requires_grad=True)
    x = REFUSED[1].solve(HOST, {"one_sided": True}, t)
    assert torch.autograd.grad(x, t)[0] == 1.0


@pytest.mark.parametrize("options", [{}, {"one_sided": True}], ids=str)
@pytest.mark.parametrize(("side", "goal", "slope"), FIXED)
def test_the_side_that_holds_a_fixed_component_moves_it(side, goal, slope, options) -> None:
    t = torch.tensor(1.0, dtype=F64, requires_grad=True)
    assert torch.autograd.grad(fixed_by(HOST, options, side, goal, t), t)[0] == slope


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("n", [6, 600])
def test_the_system_of_a_constrained_minimum_is_not_symmetric(n, own) -> None:
    """Beside the gradient stand a sum that is kept and the bounds of every third component: forward
    mode takes products with the system and not with its transpose."""
    rng = np.random.default_rng(0)
    half = rng.normal(size=(n, n)) / n**0.5
    hessian, b = half @ half.T + 2 * np.eye(n), rng.normal(size=n)
    on_bound = np.arange(n) % 3 == 0
    system, right = np.zeros((n + 1, n + 1)), np.append(b, 0.3)
    system[:n, :n], system[n, :n] = hessian, 1
    system[:n, n] = -1
    system[:n][on_bound] = np.eye(n + 1)[:n][on_bound]
    right[:n][on_bound] = 0.0
    lower = np.where(on_bound, 0.0, -np.inf)
    exact = np.linalg.solve(system, right)
    b[on_bound] = (hessian @ exact[:n] - exact[n])[on_bound] - 1  # pulls towards the bound
    q, x, low = _array(hessian), _array(exact[:n]), _array(lower)

    def applied(operator, b):
        rows = [operator.matvec(e) for e in torch.eye(n + 1, dtype=F64)]
        return torch.linalg.solve(torch.stack(rows, 1), b)

    options = {"linear_solve": applied} if own else {}
    minimize = fv.argmin(lambda fun, x0, bounds, equality: x, **options)

    def found(b):
        return minimize(
            lambda x: x @ q @ x / 2 - b @ x,
            torch.zeros(n, dtype=F64),
            bounds=(low, None),
            equality=lambda x: x.sum() - 0.3,
        )

    w = torch.arange(n, dtype=F64).cos()
    moved = torch.cat([torch.where(_array(on_bound) > 0, 0, w), torch.zeros(1, dtype=F64)])
    expected = torch.linalg.solve(_array(system), moved)[:n]
    _, tangent = torch.func.jvp(found, (_array(b),), (w,))
    torch.testing.assert_close(tangent, expected)


def test_bounds_have_derivatives() -> None:
    top = torch.tensor([0.5, 2.0], dtype=F64, requires_grad=True)
    x = MINIMIZE(lambda x: ((x - 1) ** 2).sum(), torch.zeros(2, dtype=F64), bounds=(None, top))
    assert torch.autograd.grad(x.sum(), top)[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"bounds": 3.0}, TypeError, "bounds: expected a pair"),
        ({"equality": 3.0}, TypeError, "equality: expected a function of x, whose result is 0"),
        ({"bounds": (torch.zeros(3), None)}, StructureError, "bounds: expected each side like x0"),
        ({"inequality": lambda x: x > 0}, StructureError, "to return real or complex tensors, got"),
        ({"inequality": lambda x: x + 0j}, StructureError, "inequality: complex numbers have no"),
    ],
)
def test_mistakes(given, error, text) -> None:
    with pytest.raises(error, match=text):
        MINIMIZE(lambda x: (x**2).sum(), torch.zeros(2), **given)


@pytest.mark.slow
def test_a_degenerate_component_is_found_wherever_it_is():
    """From inside its bound, at the distance that an interior-point method leaves; of those that
    are not degenerate, none is refused."""
    n = 100

    def derivative(x, upper, goal):
        t = torch.tensor(1.0, dtype=F64, requires_grad=True)
        solve = fv.argmin(lambda fun, x0, bounds: x)
        found = solve(
            lambda x: ((x - t * goal) ** 2).sum(), torch.ones(n, dtype=F64), bounds=(0.0, upper)
        )
        return float(torch.autograd.grad(found.sum(), t)[0])

    one = torch.ones(n, dtype=F64)
    for unit in torch.eye(n, dtype=F64):
        with pytest.raises(NotASolutionError, match="is reached with a multiplier of zero"):
            derivative(one - 1e-5 * unit, 3 - 2 * unit, one)
        assert derivative(one, 3 - 2 * unit, one + unit) == pytest.approx(n - 1)


def test_constraints_are_evaluated_as_often_for_many_rows_as_for_few() -> None:
    def evaluations(rows: int) -> int:
        count = 0
        matrix = torch.eye(rows, 12, dtype=F64)
        a = torch.ones(12, dtype=F64, requires_grad=True)

        def equality(x):
            nonlocal count
            count += 1
            return matrix @ (x - a)

        solve = fv.argmin(lambda fun, x0, *, equality: a.detach() * (torch.arange(12) < rows))
        x = solve(lambda x: x @ x / 2, torch.zeros(12, dtype=F64), equality=equality)
        (found,) = torch.autograd.grad(x.sum(), a)
        assert torch.allclose(found, (torch.arange(12) < rows).to(F64))
        return count

    assert evaluations(12) == evaluations(1)


@pytest.mark.parametrize("default", [torch.float32, F64])
def test_the_precision_is_that_of_x0(default) -> None:
    """Whatever the default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for dtype in (torch.float32, F64):
            t, x0 = torch.tensor(1.5, dtype=dtype), torch.tensor([0.5, 0.5], dtype=dtype)
            solve = fv.argmin(polish=True)(lambda fun, x0, inequality: x0)
            of = lambda t, solve=solve, x0=x0: solve(
                lambda x: ((x - t) ** 2).sum(), x0, inequality=lambda x: t - 0.5 - x.sum()
            )
            expected = torch.tensor([0.5, 0.5], dtype=dtype)
            torch.testing.assert_close(torch.func.jacrev(of)(t), expected)
            torch.testing.assert_close(torch.func.jacfwd(of)(t), expected)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("nothing", [lambda x: [], lambda x: x["u"][:0]])
def test_no_constraints_are_none(nothing) -> None:
    t = torch.tensor(1.5, dtype=F64, requires_grad=True)
    solve = fv.argmin(lambda fun, x0, equality, inequality: {"u": t.detach().expand(2)})
    x = solve(
        lambda x: ((x["u"] - t) ** 2).sum(),
        {"u": torch.zeros(2, dtype=F64)},
        equality=nothing,
        inequality=nothing,
    )
    torch.testing.assert_close(torch.autograd.grad(x["u"].sum(), t)[0], 2 + 0 * t.detach())


def test_a_bound_is_named_by_its_path_and_its_problem() -> None:
    t = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    solve = fv.argmin(batch_dims=1)(lambda fun, x0, bounds: {"u": (t.detach(),)})
    x = solve(
        lambda x: (x["u"][0] - t) ** 2, {"u": (torch.ones(2, dtype=F64),)}, bounds=(0.0, None)
    )
    where = r"\(problem 1 of 2\): degenerate: the lower bound of x\['u'\]\[0\]\[1\] is reached"
    with pytest.raises(NotASolutionError, match=where):
        torch.autograd.grad(x["u"][0].sum(), t)


def test_a_constraint_that_is_no_tensor() -> None:
    with pytest.raises(StructureError, match="inequality expected <lambda> to return real"):
        MINIMIZE(lambda x: (x**2).sum(), torch.zeros(2), inequality=lambda x: 1.0)


@pytest.mark.parametrize(("shape", "batch_dims"), [((2, 0), 0), ((3, 0), 1), ((0, 3), 1)])
def test_no_unknowns_or_no_problems(shape, batch_dims) -> None:
    solve = fv.argmin(batch_dims=batch_dims)(lambda fun, x0, bounds, equality, inequality: x0)
    axes = tuple(range(batch_dims, 2))

    def solved(t):
        return solve(
            lambda x: (t * x**2).sum(axes),
            torch.zeros(shape, dtype=F64),
            bounds=(-t, None),
            equality=lambda x: [x[..., :0], t + x[..., :0]],
            inequality=lambda x: x + t,
        )

    t = torch.tensor(2.0, dtype=F64)
    assert torch.func.jacfwd(solved)(t).shape == shape
    assert torch.func.jacfwd(torch.func.jacfwd(solved))(t).shape == shape
    t.requires_grad_()
    assert torch.autograd.grad(solved(t).sum(), t)[0] == 0


def test_two_equations_and_no_inequality() -> None:
    t = torch.tensor(1.0, dtype=F64, requires_grad=True)
    solve = fv.argmin(lambda fun, x0, equality, inequality: t.detach() * torch.ones(3, dtype=F64))
    x = solve(
        lambda x: (x**2).sum(),
        torch.zeros(3, dtype=F64),
        equality=lambda x: torch.stack([x[0] - t, x[1] + x[2] - 2 * t]),
        inequality=lambda x: x[:0],
    )
    torch.testing.assert_close(torch.autograd.grad(x.sum(), t)[0], 3 + 0 * t.detach())
