"""What PyTorch itself gets wrong, in small, and that the rules stand where it does.

When one of these fails because PyTorch has mended it, the workaround that it names may go.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from freevars.torch import root
from tests.torch.explicit import fresh, same

f = torch.func
F64 = torch.float64


def rule(backward: Any) -> Any:
    """sin, as a custom Function with this backward body."""

    class Sine(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return backward(*ctx.saved_tensors, g)

    return Sine.apply


def by_pullback_of_pullback(x: Tensor, g: Tensor) -> Tensor:
    """J g as the derivative of u -> J^T u, both by `torch.func.vjp`."""
    _, pullback = f.vjp(torch.sin, x)
    _, again = f.vjp(lambda u: pullback(u)[0], torch.zeros_like(g))
    return again(g)[0]


def by_grad_of_grad(x: Tensor, g: Tensor) -> Tensor:
    """The same by `torch.func.grad`, as in `_implicit.jvp`: no pullback outlives its level."""

    def transposed(u: Tensor) -> Tensor:
        return f.grad(lambda x: (x.sin() * u).sum())(x)

    return f.grad(lambda u: (transposed(u) * g).sum())(torch.zeros_like(g))


def test_a_nested_pullback_trips_an_internal_assert_under_jacrev() -> None:
    x = fresh(3, grad=False)
    broken = rule(by_pullback_of_pullback)
    same(f.grad(lambda x: broken(x).sum())(x), x.cos())  # one transform: fine
    for transform in (f.jacrev, lambda g: lambda x: f.vmap(f.jacrev(g))(x[None])):
        with pytest.raises(RuntimeError, match="INTERNAL ASSERT FAILED"):
            transform(broken)(x)


def test_the_same_without_a_pullback_that_is_called_at_another_level() -> None:
    x = fresh(3, grad=False)
    sound = rule(by_grad_of_grad)
    same(f.jacrev(sound)(x), torch.diag(x.cos()))
    same(f.vmap(f.jacrev(sound))(x[None]), torch.diag(x.cos())[None])


def test_the_rules_stand_under_jacrev() -> None:
    x0 = torch.ones(3, dtype=F64)
    solve = root(lambda fun, x0: x0 - fun(x0) / 2)
    a = fresh(3, grad=False)
    same(f.jacrev(lambda a: solve(lambda x: 2 * x - a.sin(), x0))(a), torch.diag(a.cos() / 2))
    twice = f.jacrev(f.jacrev(lambda a: solve(lambda x: 2 * x - a.sin(), x0).sum()))(a)
    same(twice, torch.diag(-a.sin() / 2))


# --- torch.linalg.solve, forward over forward

M = torch.tensor([[3.0, 1.0, 0.0], [0.5, 2.0, 0.3], [0.2, 0.1, 4.0]], dtype=F64)
V = torch.tensor([1.0, 2.0, -1.0], dtype=F64)


def by_solve(t: Tensor) -> Tensor:
    return torch.linalg.solve(M * t.cos(), V * t.exp())


def by_rule(t: Tensor) -> Tensor:
    @root
    def solver(fun: Any, x0: Tensor) -> Tensor:
        at_zero = fun(torch.zeros_like(x0))
        return torch.linalg.solve(f.jacfwd(fun)(x0), -at_zero)

    return solver(lambda x: M * t.cos() @ x - V * t.exp(), torch.zeros(3, dtype=F64))


def exact(t: Tensor) -> Tensor:
    return (torch.linalg.inv(M) @ V) * t.exp() / t.cos()


def test_solve_is_wrong_forward_over_forward_and_the_rules_are_right() -> None:
    t = torch.tensor(0.4, dtype=F64)
    orders: list[Any] = [
        lambda g: f.jacfwd(f.jacfwd(g))(t),
        lambda g: f.jacfwd(f.jacfwd(f.jacfwd(g)))(t),
        lambda g: f.jvp(lambda t: f.jvp(g, (t,), (t,))[1], (t,), (t,))[1],
        lambda g: f.jacfwd(f.jacrev(g))(t),
    ]
    for order in orders:
        torch.testing.assert_close(order(by_rule), order(exact), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(orders[0](by_solve), orders[0](exact), rtol=1e-3)
    assert torch.allclose(orders[3](by_solve), orders[3](exact), rtol=1e-9)
