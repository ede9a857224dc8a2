"""A solution that is converged loosely: good where its derivative is the same along the step."""

from typing import Any

import pytest
import torch
from torch import Tensor

from freevars.torch import NotASolutionError, argmin, fixed_point, root

F32, F64 = torch.float32, torch.float64


def returning(x: Tensor) -> Any:
    """A solver that has found `x`."""
    return lambda fun, x0: x


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


@pytest.mark.parametrize("n", [150, 520])
def test_many_components_that_one_direction_hardly_moves(n: int) -> None:
    torch.manual_seed(1)
    mixing = (3 * torch.randn(n, n, dtype=F64) / n**0.5).requires_grad_()
    signs = torch.randn(n, dtype=F64).sign()

    def loss(z: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-signs * (mixing @ z)).sum() + z @ z / 2

    def newton(fun: Any, z: Tensor) -> Tensor:
        slope = torch.func.grad(fun)
        for _ in range(8):
            z = z - torch.linalg.solve(torch.func.jacfwd(slope)(z), slope(z))
        return z

    def total(x: Tensor) -> Tensor:
        found = argmin(returning(x))(loss, torch.zeros(n, dtype=F64))
        return torch.autograd.grad(found.abs().sum(), mixing)[0]

    exact = newton(loss, torch.zeros(n, dtype=F64)).detach()
    nearly = exact * (1 + 5e-4 * (2 * torch.rand(n, dtype=F64) - 1))
    right = total(exact)
    assert float((total(nearly) - right).abs().max()) <= 2e-3 * float(right.abs().max())


@pytest.mark.parametrize(("dtype", "certain"), [(F32, 5e-4), (F64, 5e-5)])
def test_a_component_that_moves_less_than_its_derivative(
    dtype: torch.dtype, certain: float
) -> None:
    """Of tanh(z): its derivative, 1 - tanh(z)^2, changes by twice as much as z does."""

    def slope(z: float, off: float, create_graph: bool = False) -> float:  # noqa: FBT001, FBT002
        t = torch.tensor(z, dtype=dtype, requires_grad=True)
        x = torch.stack([t.detach() * (1 + off), t.detach().tanh()])
        equations = lambda x: torch.stack([x[0] - t, x[1] - x[0].tanh()])
        found = root(returning(x))(equations, torch.zeros(2, dtype=dtype))
        return float(torch.autograd.grad(found[1], t, create_graph=create_graph)[0].detach())

    for z in (1.0, 4.0):
        right = 1 / torch.tensor(z, dtype=F64).cosh().square().item()
        for off in (certain, 2e-3):
            assert abs(slope(z, off) / right - 1) < 2e-2
            assert abs(slope(z, off, create_graph=True) / right - 1) < 2e-2
    with pytest.raises(NotASolutionError, match="the derivative changes by"):
        slope(4.0, 8e-3)
    with pytest.raises(NotASolutionError, match="the derivative changes by"):
        slope(4.0, 8e-3, create_graph=True)


def test_near_a_triple_root() -> None:
    """The derivative by what holds it there is the same along the step; that by what splits it, of
    3e7, is found as 1e4."""
    by = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.0, 1e-12)]

    def slopes(x: float) -> Any:
        x_ = torch.tensor(x, dtype=F64)
        return torch.autograd.grad(root(returning(x_))(lambda x: (x - by[0]) ** 3 - by[1], x_), by)

    torch.testing.assert_close(
        slopes(1 + 1e-4), tuple(torch.tensor(v, dtype=F64) for v in (1.0, 1e8 / 3))
    )
    with pytest.raises(NotASolutionError, match="the derivative changes by"):
        slopes(1.005)


def test_of_a_batch_each_problem_by_itself() -> None:
    a = torch.tensor([1.0, 4.0, 9.0], dtype=F64, requires_grad=True)
    off = torch.tensor([0.0, 3e-3, 0.0], dtype=F64)
    for exponent, fine in ((1, True), (20, False)):
        x = (a.detach() ** (1 / exponent) * (1 + off))[:, None]
        solve = root(returning(x), batch_dims=1)
        found = solve(lambda x, e=exponent: x**e - a[:, None], torch.ones(3, 1, dtype=F64))
        (others,) = torch.autograd.grad(found[[0, 2]].sum(), a, retain_graph=True)
        assert float(others[1]) == 0
        if fine:
            right = torch.ones(3, dtype=F64)
            torch.testing.assert_close(torch.autograd.grad(found.sum(), a)[0], right)
        else:
            with pytest.raises(NotASolutionError, match=r"problem 1 of 3.*changes by"):
                torch.autograd.grad(found.sum(), a)


def test_the_function_is_not_run_again() -> None:
    a = torch.tensor(8.0, dtype=F64, requires_grad=True)
    runs = 0

    def fun(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return x**3 - a

    x = root(returning(torch.tensor(2.0 * (1 + 2e-3), dtype=F64)))(fun, torch.tensor(1.0).double())
    before = runs
    (g,) = torch.autograd.grad(x, a)
    assert runs == before
    assert abs(float(g) * 12 - 1) < 1e-2


def test_where_the_change_cannot_be_known_a_step_has_to_be_certain() -> None:
    a = torch.tensor(8.0, dtype=F64, requires_grad=True)

    def slope(off: float) -> float:
        x = torch.tensor(2.0 * (1 + off), dtype=F64)
        found = root(returning(x))(lambda x: Cube.apply(x) - a, torch.ones_like(x))
        return float(torch.autograd.grad(found, a)[0])

    assert abs(slope(5e-5) * 12 - 1) < 1e-3
    with pytest.raises(NotASolutionError, match=r"up to 1\.2e-04 is accepted\. Let it run"):
        slope(2e-3)


def wave(t: Tensor, height: Tensor, off: float) -> Tensor:
    """height cos(2000 t), found by way of a t that is off."""
    nearly = t.detach() * (1 + off)
    x = torch.stack([nearly, height.detach() * (2000 * nearly).cos()])
    equations = lambda x: torch.stack([x[0] - t, x[1] - height * (2000 * x[0]).cos()])
    return root(returning(x))(equations, torch.zeros_like(x))[1]


def test_a_step_is_looked_at_though_it_is_small() -> None:
    one = torch.tensor(1.0, dtype=F64)
    t = one.clone().requires_grad_()
    (g,) = torch.autograd.grad(wave(t, one, 1e-7), t)
    assert abs(float(g) / (-2000 * (2000 * one).sin()).item() - 1) < 1e-3
    with pytest.raises(NotASolutionError, match=r"the derivative changes by .* a step of 1\.5e-08"):
        torch.autograd.grad(wave(t, one, 5e-5), t)


def test_the_imaginary_part_of_what_it_is_by() -> None:
    one = torch.tensor(1.0, dtype=F64)
    c = torch.tensor(1 + 1j, requires_grad=True, dtype=torch.complex128)
    with pytest.raises(NotASolutionError, match="the derivative changes by"):
        torch.autograd.grad(wave(one, c.imag, 1e-3), c)


def test_hooks_run_once_and_what_they_do_is_not_compared() -> None:
    seen: list[float] = []

    def hook(g: Tensor) -> Tensor:
        seen.append(float(g))
        return g.detach()

    t, one = torch.tensor([1.0, 1.0], dtype=F64)
    t.requires_grad_().register_hook(hook)
    torch.autograd.grad(wave(t, one, 1e-7), t)
    assert len(seen) == 1
    with pytest.raises(NotASolutionError, match=r"up to 1\.2e-04 is accepted\. Let it run"):
        torch.autograd.grad(wave(t, one, 1e-3), t)
    assert len(seen) == 1


def tf32(a: Tensor, b: Tensor) -> Tensor:
    """A product in ten bits, as a GPU may compute it; its derivatives are, too."""
    return a.half().float() @ b.half().float()


def autocast(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return a @ b


@pytest.mark.parametrize("product", [tf32, autocast])
@pytest.mark.parametrize("shape", [(20,), (32, 64)], ids=["dense", "matrix-free"])
def test_what_coarse_arithmetic_leaves_is_accepted(product: Any, shape: tuple[int, ...]) -> None:
    """And what a solver left beyond that is not."""
    torch.manual_seed(0)
    weights = torch.randn(shape[-1], shape[-1])
    weights = (weights * 0.9 / torch.linalg.matrix_norm(weights, 2)).requires_grad_()
    inputs = torch.randn(shape)

    def iterate(fun: Any, z: Tensor) -> Tensor:
        for _ in range(150):
            z = fun(z)
        return z

    def slope(solver: Any, product: Any) -> Tensor:
        layer = lambda z: torch.tanh(product(z, weights) + inputs)
        z = fixed_point(solver)(layer, torch.zeros_like(inputs))
        return torch.autograd.grad((z**3).sum(), weights)[0]

    right = slope(iterate, torch.matmul)
    exact = iterate(lambda z: torch.tanh(z @ weights + inputs), torch.zeros_like(inputs)).detach()
    for solver in (iterate, returning(exact)):
        error = torch.linalg.norm(slope(solver, product) - right)
        assert float(error) < 1e-2 * float(torch.linalg.norm(right))
        with pytest.raises(NotASolutionError, match="did not converge"):
            slope(lambda fun, z, solver=solver: 1.05 * solver(fun, z), product)
