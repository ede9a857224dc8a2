"""Integrals and differential equations, whose backward pass runs the function again: one that has
changed since the call is refused, modes and random numbers are those of the call, and PyTorch may
run the call again too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import freevars.torch as fv
from freevars.errors import CaptureError, NotASolutionError
from tests.torch.rules.test_integral import gauss
from tests.torch.rules.test_odeint import rk4

F64 = torch.float64
CHANGED = "expected the function as it was when the solver returned"


def at_once(fun: Any, a: Any, b: Any) -> Any:
    """Asks for all points by one `vmap`."""
    t = a + (b - a) * (torch.arange(200, dtype=F64) + 0.5) / 200
    return (b - a) * torch.func.vmap(fun, randomness="same")(t).mean(0)


def over(solve: Any) -> Any:
    """int_0^1 of `fun`."""
    rule = fv.integral(solve)
    return lambda fun: rule(fun, torch.tensor(0.0, dtype=F64), torch.tensor(1.0, dtype=F64))


def along(reverse: Any) -> Any:
    """y(1) with y(0) = 0 and y' = `fun`."""
    rule = fv.odeint(rk4, reverse=reverse)
    ts = torch.tensor([0.0, 1.0], dtype=F64)
    return lambda fun: rule(lambda t, y: fun(t) + 0 * y, ts[:1], ts)[-1, 0]


WAYS = {
    "points": over(gauss),
    "points at once": over(at_once),
    "adjoint": along("adjoint"),
    "sensitivities": along("sensitivities"),
}


@pytest.fixture(params=WAYS)
def solve(request: Any) -> Any:
    return WAYS[request.param]


def slope(x: Tensor, a: Tensor) -> float:
    return float(torch.autograd.grad(x, a)[0])


def test_a_loop_variable(solve) -> None:
    a = torch.tensor(1.0, dtype=F64, requires_grad=True)
    kept = sum(solve(lambda t, k=k: k * a * t**2) for k in (1, 2, 3))
    assert slope(kept, a) == pytest.approx(2, rel=1e-4)
    moved = sum(solve(lambda t: k * a * t**2) for k in (1, 2, 3))
    with pytest.raises(NotASolutionError, match=CHANGED):
        torch.autograd.grad(moved, a)


def test_a_small_change_and_a_change_of_a_constant(solve) -> None:
    """Far below what is accepted of a solver."""
    a, scale = torch.tensor([1.0, 1.0], dtype=F64).requires_grad_(), torch.tensor(1.0, dtype=F64)
    x = solve(lambda t: scale * a[0] * t)
    scale.add_(1e-3)
    with pytest.raises(NotASolutionError, match=CHANGED):
        torch.autograd.grad(x, a)


def test_a_second_derivative(solve) -> None:
    """It runs what the first derivative ran."""
    state = {"k": 1.0}
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    (first,) = torch.autograd.grad(solve(lambda t: state["k"] * a**3 * t), a, create_graph=True)
    assert float(first.detach()) == pytest.approx(6, rel=1e-4)
    (second,) = torch.autograd.grad(first, a, retain_graph=True)
    assert float(second) == pytest.approx(6, rel=1e-4)
    state["k"] = 2.0
    with pytest.raises(NotASolutionError, match=CHANGED):
        torch.autograd.grad(first, a)


def test_the_mode_of_a_module(solve) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.5)).double()
    x = solve(lambda t: net(t[None]).square().sum())
    net.eval()
    with pytest.raises(NotASolutionError, match=CHANGED):
        torch.autograd.grad(x, net[0].weight)


def test_one_mask_for_each_call(solve) -> None:
    torch.manual_seed(0)
    a = torch.ones(64, dtype=F64, requires_grad=True)
    masks = []
    for _ in range(2):
        x = solve(lambda t: (torch.nn.functional.dropout(a, 0.5) * t).sum())
        masks.append(torch.autograd.grad(x, a)[0])
        assert float(masks[-1].sum()) == pytest.approx(float(x.detach()), rel=1e-4)
        assert set(masks[-1].round(decimals=3).tolist()) == {0.0, 1.0}
    assert not torch.allclose(*masks)


@pytest.mark.parametrize("of_the_call", [True, False])
def test_autocast_is_that_of_the_call(of_the_call) -> None:
    torch.manual_seed(0)
    w = torch.randn(16, 16, requires_grad=True)
    v = torch.randn(16)
    ran = []

    def integrand(t: Tensor) -> Tensor:
        out = w @ (t * v)
        ran.append(out.dtype)
        return out.float().sum()

    ends = torch.tensor([0.0, 1.0], dtype=F64)
    with torch.autocast("cpu", enabled=of_the_call):
        x = fv.integral(gauss)(integrand, *ends)
    with torch.autocast("cpu", enabled=not of_the_call):
        torch.autograd.grad(x, w)
    assert set(ran) == {torch.bfloat16 if of_the_call else torch.float32}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_a_checkpoint(solve, use_reentrant) -> None:
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    run = lambda a: solve(lambda t: a**3 * t)
    checkpoint(run, a, use_reentrant=use_reentrant).backward()
    assert float(a.grad) == pytest.approx(6, rel=1e-4)


def test_what_forward_mode_cannot_record_is_refused_by_name(solve) -> None:
    a = torch.tensor(2.0, dtype=F64)
    run = lambda a: solve(lambda t: a**3 * t)
    with pytest.raises(CaptureError, match=r"expected torch.func.jvp .*got torch.func.linearize"):
        torch.func.linearize(run, a)
    jacobian = torch.autograd.functional.jacobian
    with pytest.raises(CaptureError, match=r"expected torch.func.jacfwd .*forward-mode"):
        jacobian(run, a, strategy="forward-mode", vectorize=True)


@pytest.mark.slow
def test_a_program_that_would_lose_the_derivative_is_refused(solve) -> None:
    class Integral(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(2.0, dtype=F64))

        def forward(self, b: Tensor) -> Tensor:
            return solve(lambda t: self.a * b * t)

    module, b = Integral(), torch.tensor(3.0, dtype=F64)
    with pytest.raises(CaptureError, match=r"got one that is being recorded.*torch\.no_grad"):
        torch.export.export(module, (b,))
    module.requires_grad_(False)
    with pytest.raises(CaptureError, match=r"got one that is being recorded.*torch\.no_grad"):
        torch.export.export(module, (b,))
    with torch.no_grad():
        program = torch.export.export(module, (b,)).module()
    assert float(program(2 * b)) == pytest.approx(6, rel=1e-4)
