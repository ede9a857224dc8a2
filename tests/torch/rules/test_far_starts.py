"""A solution is measured by its own size, wherever the solver came from; one that is zero but for
errors, by how far it came."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from freevars.torch import NotASolutionError, argmin, root

F32, F64 = torch.float32, torch.float64
PRECISIONS = pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])


def slope(
    fun: Callable[[Tensor, Tensor], Tensor],
    found: float,
    by: float,
    dtype: torch.dtype,
    rule: Any = root,
    *,
    n: int = 0,
) -> float:
    """dx/da, of a solver that comes from 1 and returns `found`."""
    shape = (n,) if n else ()
    a = torch.full(shape, by, dtype=dtype, requires_grad=True)
    x = rule(lambda fun, x0: torch.full(shape, found, dtype=dtype))(
        lambda x: fun(x, a), torch.ones(shape, dtype=dtype)
    )
    (g,) = torch.autograd.grad(x.sum(), a)
    return float(g.reshape(-1)[0])


@PRECISIONS
@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("n", [0, 3, 520])
def test_a_tiny_root_that_is_off(n: int, size: float, dtype: torch.dtype) -> None:
    square = lambda x, a: x**2 - a
    got = slope(square, size, size**2, dtype, n=n)
    assert abs(got * 2 * size - 1) < 1e-3
    for factor in (0.3, 1.2, 4.0):
        with pytest.raises(NotASolutionError, match="did not converge"):
            slope(square, factor * size, size**2, dtype, n=n)


@PRECISIONS
def test_a_linear_equation_whose_derivative_depends_on_x(dtype: torch.dtype) -> None:
    fun = lambda x, a: a * x - 1e-9
    assert abs(slope(fun, 1e-9, 1.0, dtype) / -1e-9 - 1) < 1e-3
    for found in (3e-9, 1e-7):
        with pytest.raises(NotASolutionError):
            slope(fun, found, 1.0, dtype)


def objective(x: Tensor, a: Tensor) -> Tensor:
    return ((x - a) ** 2 + (x - a) ** 4).sum()


ZEROS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": (root, lambda x, a: 2 * (x - a)),
    "odd": (root, lambda x, a: torch.sin(2 * x) - 2 * a),
    "rounded": (root, lambda x, a: torch.exp(2 * (x - a)) - 1),
    "argmin": (argmin, objective),
}


@PRECISIONS
@pytest.mark.parametrize("n", [0, 3, 520])
@pytest.mark.parametrize("name", ZEROS)
def test_a_root_of_zero_but_for_errors(name: str, n: int, dtype: torch.dtype) -> None:
    rule, fun = ZEROS[name]
    for left in (1e-8, -3e-8, 0.0):
        assert abs(slope(fun, left, 0.0, dtype, rule, n=n) - 1) < 1e-3


def test_under_torch_func_and_twice() -> None:
    def x(a: Tensor, left: float) -> Tensor:
        solve = root(lambda fun, x0: torch.tensor(left, dtype=F64))
        return solve(lambda x: torch.exp(x) - 1 - a, torch.ones((), dtype=F64))

    zero = torch.zeros((), dtype=F64)
    assert abs(float(torch.func.grad(x)(zero, 1e-9)) - 1) < 1e-6
    assert abs(float(torch.func.grad(torch.func.grad(x))(zero, 1e-9)) + 1) < 1e-6
    with pytest.raises(NotASolutionError):
        torch.func.grad(x)(zero + 1e-5, 3e-5)


def test_a_function_that_cannot_be_differentiated_twice() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    assert slope(lambda x, a: Once.apply(x) - a, 5e-9, 1e-8, F64) == 0.5
    with pytest.raises(NotASolutionError):
        slope(lambda x, a: Once.apply(x) - a, 6e-9, 1e-8, F64)
