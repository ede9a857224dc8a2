"""What `implicit` and `least_squares` add to the rules: conditions of the user's own."""

import pytest
import torch
from torch import nn

import freevars.torch as fv
from freevars.errors import NotASolutionError, StructureError

F64 = torch.float64


def _newton(fun, x0):
    for _ in range(12):
        x0 = x0 - torch.linalg.solve(torch.func.jacrev(fun)(x0), fun(x0))
    return x0


N = 9


def _boundary_value_problem(field, u):
    """u'' = field(u) at inner points, u(0) = 0 and u(1) = 1."""
    ends = torch.cat([torch.zeros(1, dtype=F64), u, torch.ones(1, dtype=F64)])
    return (ends[2:] - 2 * ends[1:-1] + ends[:-2]) * (N + 1) ** 2 - field(u)


@fv.implicit(_boundary_value_problem)
def _shoot(field, u0):
    """By the slope at 0, which is found by the secant method."""

    def end(slope):
        u = [torch.zeros((), dtype=F64), slope / (N + 1)]
        for _ in range(N):
            u.append(2 * u[-1] - u[-2] + field(u[-1]) / (N + 1) ** 2)
        return torch.stack(u)

    before, now = torch.tensor(0.0, dtype=F64), torch.tensor(1.0, dtype=F64)
    for _ in range(12):
        miss, miss_now = end(before)[-1] - 1, end(now)[-1] - 1
        if abs(float(miss_now)) < 1e-13:
            break
        before, now = now, now - miss_now * (now - before) / (miss_now - miss)
    return end(now)[1:-1] + 0 * u0


def test_a_boundary_value_problem_that_the_solver_states_otherwise() -> None:
    def solve(a):
        return _shoot(lambda u: a * u**3, torch.zeros(N, dtype=F64)).sum()

    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(solve(a), a)
    h = 1e-4
    difference = (solve(a.detach() + h) - solve(a.detach() - h)) / (2 * h)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=0)
    assert torch.autograd.gradgradcheck(solve, (a,), rtol=1e-4, atol=1e-6)


def test_a_derivative_flows_into_what_the_condition_alone_reads() -> None:
    shift = nn.Linear(2, 2, dtype=F64)
    solve = fv.implicit(lambda fun, x: fun(x) - shift(torch.ones(2, dtype=F64)))(
        lambda fun, x0: _newton(lambda x: fun(x) - shift(torch.ones(2, dtype=F64)), x0)
    )
    x = solve(lambda x: 2 * x, torch.zeros(2, dtype=F64))
    x.sum().backward()
    torch.testing.assert_close(shift.bias.grad, torch.full((2,), 0.5, dtype=F64))


def test_the_condition_draws_what_the_function_drew() -> None:
    a = torch.ones(50, dtype=F64, requires_grad=True)
    drop = nn.Dropout()
    solve = fv.implicit(lambda fun, x: x - fun(x))(lambda fun, x0: fun(x0))
    torch.manual_seed(3)
    x = solve(lambda x: drop(a) + 0 * x, torch.zeros(50, dtype=F64))
    (slope,) = torch.autograd.grad(x.sum(), a)
    torch.testing.assert_close(slope, x.detach())


def test_many_problems_of_least_squares_at_once() -> None:
    def steps(fun, x0):
        for _ in range(30):
            x0 = x0 - torch.func.grad(lambda x: (fun(x) ** 2).sum() / 2)(x0) / 5
        return x0

    solve = fv.least_squares(steps, batch_dims=1)
    a = torch.arange(6.0, dtype=F64).reshape(3, 2).requires_grad_()
    x = solve(lambda x: torch.cat([x - a, 2 * (x - 1)], 1), torch.zeros(3, 2, dtype=F64))
    torch.testing.assert_close(x.detach(), (a.detach() + 4) / 5)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), a)[0], torch.full_like(a, 0.2))


def test_complex_residuals() -> None:
    c = torch.tensor([1.0 + 2.0j], requires_grad=True)
    solve = fv.least_squares(lambda fun, x0: x0 - fun(x0).real)
    x = solve(lambda x: x - c, torch.zeros(1))
    assert torch.autograd.grad(x.sum(), c)[0].tolist() == [1.0]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: fv.implicit(3), TypeError, r"expected a function condition\(fun, x\), got 3"),
        (lambda: fv.implicit(lambda fun, x: x, argument=3), TypeError, "argument: expected"),
        (lambda: fv.implicit(lambda fun, x: x, tolerance=3), TypeError, "implicit: expected the"),
        (
            lambda: fv.implicit(lambda fun, x: x[:1])(_newton)(lambda x: x, torch.ones(2)),
            StructureError,
            "<lambda> has 1 components for 2 unknowns",
        ),
        (
            lambda: fv.least_squares(_newton)(lambda x: "r", torch.ones(2)),
            StructureError,
            "least_squares expected <lambda> to return real or complex tensors, got 'r'",
        ),
    ],
)
def test_mistakes(make, error, text) -> None:
    with pytest.raises(error, match=text):
        make()


def test_no_solution_is_refused() -> None:
    a = torch.tensor([1.0], requires_grad=True)
    solve = fv.implicit(lambda fun, x: fun(x))(lambda fun, x0: x0)
    with pytest.raises(NotASolutionError, match="did not converge"):
        torch.autograd.grad(solve(lambda x: x - a, torch.tensor([9.0])).sum(), a)
