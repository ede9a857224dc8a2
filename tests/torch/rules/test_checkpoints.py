"""A rule within a checkpoint: its solver runs once in each pass, and nothing is kept between."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from freevars.torch import argmin, fixed_point, root
from freevars.torch._compat import Saved, checkpointing
from tests.torch.explicit import fresh

f = torch.func
F64 = torch.float64
SAVED = [torch.ops.aten.mv.default, torch.ops.aten.exp.default]
WAYS = {
    "plain": {},
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, SAVED)},
}
runs = 0


def counted(solver: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(solver)
    def one(*args: Any) -> Any:
        global runs
        runs += 1
        return solver(*args)

    return one


@fixed_point
@counted
def iterate(fun: Any, x0: Tensor) -> Tensor:
    return functools.reduce(lambda x, _: fun(x), range(80), x0)


@root
@counted
def by_autograd(fun: Any, x0: Tensor) -> Tensor:
    x = x0
    for _ in range(30):
        x = x.detach().requires_grad_()
        value = fun(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        x = x - value / slope
    return x.detach()


@argmin
@counted
def by_torch_func(fun: Any, x0: Tensor) -> Tensor:
    for _ in range(20):
        x0 = x0 - torch.linalg.solve(f.hessian(fun)(x0), f.grad(fun)(x0))
    return x0


def contraction(w: Tensor, b: Tensor) -> Tensor:
    return iterate(lambda x: torch.tanh(0.3 * w @ x / len(b) ** 0.5 + b), torch.zeros_like(b))


def equations(w: Tensor, b: Tensor) -> Tensor:
    return by_autograd(lambda x: x**3 * torch.exp(x) - (w @ b).exp(), torch.ones_like(b))


def minimum(w: Tensor, b: Tensor) -> Tensor:
    return by_torch_func(lambda x: ((x - w @ b) ** 2 + x**4).sum(), torch.zeros_like(b))


def mapped(w: Tensor, b: Tensor) -> Tensor:
    return f.vmap(lambda c: contraction(w, c * b))(b).sum(0)


def in_another(w: Tensor, b: Tensor) -> Tensor:
    def outer(x: Tensor) -> Tensor:
        inner = by_autograd(lambda y: y**3 + y - x**2 - b, torch.ones_like(b))
        return inner + x - 2 - w @ b / 9

    return by_autograd(outer, torch.ones_like(b))


def around_another(w: Tensor, b: Tensor) -> Tensor:
    return checkpoint(contraction, w, b, use_reentrant=False)


def with_one_inside(w: Tensor, b: Tensor) -> Tensor:
    def part(x: Tensor) -> Tensor:
        return torch.tanh(0.3 * w @ x + b)

    return iterate(lambda x: checkpoint(part, x, use_reentrant=False), torch.zeros_like(b))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("layer", "n"),
    [
        *((layer, 3) for layer in (contraction, equations, minimum, mapped, in_another)),
        *((layer, 3) for layer in (around_another, with_one_inside)),
        (contraction, 600),  # by an iteration, whose every step is a product
    ],
)
def test_the_solver_runs_once_in_each_pass(layer, n, way) -> None:
    global runs
    w, b = fresh(n, n), fresh(n)
    runs = 0
    x = layer(w, b)
    without = runs
    right = torch.autograd.grad(x.square().sum(), [w, b])
    runs = 0
    y = checkpoint(layer, w, b, use_reentrant=False, **WAYS[way]).square().sum()
    assert runs == without
    assert not checkpointing()
    for g, expected in zip(torch.autograd.grad(y, [w, b]), right, strict=True):
        torch.testing.assert_close(g, expected)
    assert runs == 2 * without


def test_a_second_pass_over_the_same_graph_and_a_second_derivative() -> None:
    w, b = fresh(3, 3), fresh(3)

    def curvature(layer: Callable[..., Tensor]) -> Tensor:
        y = layer(w, b).square().sum()
        torch.autograd.grad(y, b, retain_graph=True)
        (g,) = torch.autograd.grad(y, b, create_graph=True)
        return torch.autograd.grad(g.square().sum(), w)[0]

    around = functools.partial(checkpoint, equations, use_reentrant=False)
    torch.testing.assert_close(curvature(around), curvature(equations))


@pytest.mark.parametrize("around", [False, True])
def test_nothing_of_the_function_is_kept_between_the_passes(around) -> None:
    made, b = [], fresh(3)

    def layer(b: Tensor) -> Tensor:
        def fun(x: Tensor) -> Tensor:
            value = torch.exp(x / 8 + b)
            made.append(weakref.ref(value.untyped_storage()))
            return value / 8

        return iterate(fun, torch.zeros_like(b))

    x = checkpoint(layer, b, use_reentrant=False) if around else layer(b)
    assert any(ref() is not None for ref in made) != around
    x.sum().backward()
    assert all(ref() is None for ref in made)


def test_what_was_written_to_is_computed_again() -> None:
    b, found = fresh(3), []

    def layer(b: Tensor) -> Tensor:
        with Saved().collecting():
            s = b * 1.0
            square = s * s
            s.mul_(2)  # which the square has saved
            found.extend(torch.autograd.grad(square.sum(), b))
        return b * 1.0

    checkpoint(layer, b, use_reentrant=False)
    torch.testing.assert_close(found, [2 * b.detach()])


@pytest.mark.parametrize("n", [3, 600])
@pytest.mark.parametrize("polish", [False, True])
def test_a_policy_inside_the_function(n, polish) -> None:
    """What a selective checkpoint keeps is for one backward pass; a rule takes many through it."""
    tanh = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.tanh.default])
    a, zero = torch.full((n,), 0.5, dtype=F64, requires_grad=True), torch.zeros(n, dtype=F64)
    solve = fixed_point(iterate.__wrapped__, polish=polish)

    def plain(x: Tensor) -> Tensor:
        return torch.tanh(a * x) + 1

    def kept(x: Tensor) -> Tensor:
        return checkpoint(plain, x, use_reentrant=False, context_fn=tanh)

    found = []
    for fun in (plain, kept):
        x = solve(fun, zero)
        first, again = (torch.autograd.grad(x.sum(), a, retain_graph=True)[0] for _ in range(2))
        (g,) = torch.autograd.grad(x.sum(), a, create_graph=True)
        found.append((first, again, *torch.autograd.grad(g.sum(), a)))
    torch.testing.assert_close(found[1], found[0])
