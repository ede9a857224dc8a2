"""A derivative by what a solver has itself: its options, its object, its closure, its start. A
solution does not depend on it; where the result is none, that is an error and no silent zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from freevars.torch import NotASolutionError, argmin, root

f = torch.func
F64 = torch.float64
ACTIVE, IDLE = 0.2, -3.0  # as a lower bound of the minimum at -0.5


def number(value: float, *, grad: bool = False) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=grad)


def objective(x: Tensor) -> Tensor:
    return (x + 0.5) ** 2


def descent(fun: Any, x0: Tensor, low: Tensor) -> Tensor:
    x = x0
    for _ in range(60):
        x = torch.clamp(x - 0.4 * f.grad(fun)(x), min=low)
    return x


def as_option(low: Tensor) -> Tensor:
    return argmin(descent)(objective, number(1.0), low)


def in_a_container(low: Tensor) -> Tensor:
    solve = argmin(lambda fun, x0, limits: descent(fun, x0, limits["low"]))
    return solve(objective, number(1.0), {"low": low})


def in_the_closure(low: Tensor) -> Tensor:
    return argmin(lambda fun, x0: descent(fun, x0, low))(objective, number(1.0))


class Solver:
    def __init__(self, low: Tensor) -> None:
        self.low = low

    @argmin
    def solve(self, fun: Any, x0: Tensor) -> Tensor:
        return descent(fun, x0, self.low)


def on_the_object(low: Tensor) -> Tensor:
    return Solver(low).solve(objective, number(1.0))


WAYS = {
    "low": as_option,
    r"limits\['low'\]": in_a_container,
    "(?:low)": in_the_closure,
    "self.low": on_the_object,
}


def reverse(run: Callable[[Tensor], Tensor], low: float) -> Tensor:
    t = number(low, grad=True)
    x = run(t)
    assert x.requires_grad
    (g,) = torch.autograd.grad(x + t, t)
    return g - 1


def twice(run: Callable[[Tensor], Tensor], low: float) -> Tensor:
    t = number(low, grad=True)
    (g,) = torch.autograd.grad(run(t) + t**2, t, create_graph=True)
    (h,) = torch.autograd.grad(g, t)
    return h - 2


def dual(run: Callable[[Tensor], Tensor], low: float) -> Tensor:
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        x = run(forward.make_dual(number(low), number(1.0)))
        return forward.unpack_dual(x).tangent


MODES: dict[str, Callable[..., Tensor]] = {
    "reverse": reverse,
    "twice": twice,
    "dual": dual,
    "grad": lambda run, low: f.grad(run)(number(low)),
    "jvp": lambda run, low: f.jvp(run, (number(low),), (number(1.0),))[1],
    "vmap": lambda run, low: f.vmap(f.grad(run))(number(low).expand(2))[0],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WAYS)
def test_an_active_bound_is_no_silent_zero(name: str, mode: str) -> None:
    with pytest.raises(NotASolutionError, match=rf"bound .*is active: .*by {name} .*not zero"):
        MODES[mode](WAYS[name], ACTIVE)
    assert MODES[mode](WAYS[name], IDLE) == 0


@pytest.mark.parametrize("name", WAYS)
def test_a_batch_of_what_the_solver_holds(name: str) -> None:
    x = f.vmap(WAYS[name])(torch.tensor([ACTIVE, IDLE], dtype=F64))
    torch.testing.assert_close(x, torch.tensor([ACTIVE, -0.5], dtype=F64))


def test_directions_of_zero_ask_for_nothing() -> None:
    x, dx = f.jvp(as_option, (number(ACTIVE),), (number(0.0),))
    assert (x, dx) == (ACTIVE, 0)


def test_the_components_on_a_bound_are_named() -> None:
    c = torch.tensor([1.0, -0.5, 2.0], dtype=F64, requires_grad=True)
    solve = argmin(descent)
    x = solve(lambda x: ((x - c) ** 2).sum(), torch.zeros(3, dtype=F64), number(0.25))
    with pytest.raises(NotASolutionError, match=r"stopped at x\[1\] = 0\.25 although"):
        x.sum().backward()
    low = torch.tensor([[0.25], [-3.0]], dtype=F64)
    batch = argmin(descent, batch_dims=1)
    far = {"a": torch.ones(2, 3, dtype=F64)}

    def both(fun: Any, x0: Any, low: Tensor) -> Any:
        return {"a": descent(lambda x: fun({"a": x}).sum(), x0["a"], low)}

    batch = argmin(both, batch_dims=1)
    x = batch(lambda x: ((x["a"] - c) ** 2).sum(1), far, low)["a"]
    x[1].sum().backward()
    with pytest.raises(NotASolutionError, match=r"\(problem 0 of 2\).* x\['a'\]\[0, 1\] = 0\.25 "):
        batch(lambda x: ((x["a"] - c) ** 2).sum(1), far, low)["a"].sum().backward()


def test_a_component_on_a_bound_is_named_under_vmap() -> None:
    def slope(c: Tensor) -> Tensor:
        far = torch.ones(2, dtype=F64)
        return argmin(descent)(lambda x: ((x - c) ** 2).sum(), far, number(0.25)).sum()

    words = r"\(problem 1 of 2\).* stopped at x\[0\] = 0\.25, x\[1\] = 0\.25 although"
    for transform in (f.grad, f.jacfwd):
        with pytest.raises(NotASolutionError, match=words):
            f.vmap(transform(slope))(torch.tensor([1.0, -0.5], dtype=F64))


def test_a_start_that_has_a_history() -> None:
    """Warm starts: no derivative by the start, and the graph before is not walked again."""

    def newton(fun: Any, x0: Tensor) -> Tensor:
        for _ in range(20):
            x0 = x0 - fun(x0) / f.grad(fun)(x0)
        return x0

    solve, a = root(newton), number(4.0, grad=True)
    x = number(1.0)
    for _ in range(3):  # the graph of the step before is gone
        x = solve(lambda x: x**2 - a, 1.5 * x)
        (g,) = torch.autograd.grad(x, a)
        torch.testing.assert_close(g, number(0.25))
    start = number(1.0, grad=True)
    lazy = root(lambda fun, x0: x0 + 1)
    with pytest.raises(NotASolutionError, match="by x0 "):
        lazy(lambda x: x - 4, start).backward()


def test_what_the_solver_holds_and_the_function_reads() -> None:
    a = number(-0.5, grad=True)
    solve = argmin(lambda fun, x0: descent(fun, x0, a - 1))  # moves with a, and is not active
    (g,) = torch.autograd.grad(solve(lambda x: (x - a) ** 2, number(1.0)), a)
    torch.testing.assert_close(g, number(1.0))


def on_its_way(k: Tensor, start: Tensor) -> Tensor:
    """Where x0 x1 = 1 on the line from `start` along (-k, 1)."""
    a, b = start
    half = (a - k * b) / 2
    s = (half - torch.sqrt(half**2 + k * (a * b - 1))) / k
    return torch.stack([a - k * s, b + s])


DERIVATIVES: dict[str, Any] = {
    "jacrev": f.jacrev,
    "jacfwd": f.jacfwd,
    "second": lambda g: f.jacfwd(f.jacrev(g)),
    "vmap": lambda g: lambda k: f.vmap(f.jacrev(g))(torch.stack([k, k]))[1],
    "backward": lambda g: lambda k: torch.autograd.functional.jacobian(g, k),
    "twice": lambda g: lambda k: torch.autograd.functional.hessian(lambda k: g(k)[0], k),
}


@pytest.mark.parametrize("by", DERIVATIVES)
def test_totals_that_turn_with_a_captured_value(by: str) -> None:
    """A reaction of which k of one kind make one of the other keeps x0 + k x1."""
    start = torch.tensor([2.0, 1.0], dtype=F64)

    def solved(k: Tensor) -> Tensor:
        plain = torch.tensor(0.5, dtype=F64)
        solve = root(lambda fun, x0: on_its_way(plain, start), conserved=lambda x: x[0] + k * x[1])
        rate = lambda x: (x[0] * x[1] - 1) * torch.stack([-k, torch.ones_like(k)])
        out: Tensor = solve(rate, start)
        return out

    k = torch.tensor(0.5, dtype=F64)
    expected = DERIVATIVES[by](lambda k: on_its_way(k, start))(k)
    torch.testing.assert_close(DERIVATIVES[by](solved)(k), expected)
