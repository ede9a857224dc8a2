"""Krylov methods: what they say they have solved is solved, by as few products as that takes."""

import math

import pytest
import torch
from torch import Tensor

from freevars.torch._rules import krylov
from freevars.torch._rules.krylov import conjugate_gradients, gmres

F64 = torch.float64
METHODS = [conjugate_gradients, gmres]


class Counted:
    """A matrix by its products."""

    def __init__(self, a: Tensor) -> None:
        self.a, self.count = a, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        return self.a @ v

    def residual(self, u: Tensor, b: Tensor) -> float:
        """In double precision, relative to b."""
        return self.left(u, b) / float(b.to(F64).norm())

    def backward_error(self, u: Tensor, b: Tensor) -> float:
        """The residual relative to what a product adds up."""
        norm = float(torch.linalg.matrix_norm(self.a.to(F64), 2))
        return self.left(u, b) / (norm * float(u.to(F64).norm()))

    def left(self, u: Tensor, b: Tensor) -> float:
        return float((self.a.to(F64) @ u.to(F64) - b.to(F64)).norm())


def contraction(n: int, dtype: torch.dtype, *, symmetric: bool, rate: float = 0.4) -> Tensor:
    a = rate * torch.randn(n, n, dtype=dtype) / n**0.5
    return torch.eye(n, dtype=dtype) + (a @ a.T if symmetric else a)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n", [1, 40, 300])
def test_a_well_conditioned_system_takes_a_product_more_than_its_steps(n, dtype, method) -> None:
    torch.manual_seed(n)
    a = Counted(contraction(n, dtype, symmetric=method is conjugate_gradients))
    b = torch.randn(n, dtype=dtype)
    relative = torch.finfo(dtype).eps ** 0.75
    u, found = method(a, b, relative, 1000)
    assert found
    assert a.residual(u, b) <= relative
    if n == 1:
        assert a.count == 2
        return
    steps = a.count - (2 if method is gmres else 1)  # the residual, and whether a basis is needed
    assert method(a, b, relative, steps)[1]
    assert not method(a, b, relative, steps - 1)[1]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1, -1, 2.0**20, -(2.0**-20)])
def test_a_quick_contraction_of_any_scale_takes_no_basis(scale, dtype, monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(krylov, "_arnoldi", None)
    a = Counted(scale * contraction(300, dtype, symmetric=False, rate=0.1))
    b = torch.randn(300, dtype=dtype)
    relative = torch.finfo(dtype).eps ** 0.75
    u, found = gmres(a, b, relative, 1000)
    assert found
    assert a.residual(u, b) <= 1.01 * relative
    assert a.count == math.ceil(-math.log10(relative))  # a digit each


def test_a_contraction_that_slows_down_goes_on_with_a_basis() -> None:
    torch.manual_seed(0)
    n = 300
    rates = torch.full((n,), 0.01, dtype=F64)
    rates[:5] = torch.linspace(0.9, 0.99, 5, dtype=F64)
    a = Counted(torch.diag(1 - rates))
    b = torch.ones(n, dtype=F64)
    b[:5] = 1e-4
    u, found = gmres(a, b, 1e-12, 1000)
    assert found
    assert a.residual(u, b) <= 1e-12
    assert a.count <= 12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("digits", [2, 3, 4, 8, 12])
def test_what_is_found_is_found_where_rounding_matters(digits, dtype, method) -> None:
    torch.manual_seed(0)
    n = 30
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64))
    a = Counted((q * torch.logspace(0, -digits, n, dtype=F64) @ q.T).to(dtype))
    b = torch.randn(n, dtype=dtype)
    eps = torch.finfo(dtype).eps
    u, found = method(a, b, eps**0.75, 200)
    small = a.residual(u, b) <= 1.1 * eps**0.75
    # Or as small as a factorisation leaves it.
    as_rounding = a.backward_error(u, b) <= 10 * eps and a.residual(u, b) <= eps**0.5
    assert not found or small or as_rounding
    assert found or digits > (3 if dtype == F64 else 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16])
def test_products_that_round_more_than_their_dtype_do_not_pass_for_a_solution(
    coarse, dtype, method
) -> None:
    torch.manual_seed(0)
    n = 40
    eye = torch.eye(n, dtype=dtype)  # with which one step ends the recurrence
    b = torch.randn(n, dtype=dtype)
    relative = torch.finfo(dtype).eps ** 0.75
    symmetric = method is conjugate_gradients
    for a in (eye, *(contraction(n, dtype, symmetric=symmetric, rate=r) for r in (0.1, 0.4))):
        assert method(lambda v, a=a: a @ v, b, relative, 200)[1]
        assert not method(lambda v, a=a: a @ v.to(coarse).to(dtype), b, relative, 200)[1]


def test_conjugate_gradients_give_up_where_a_matrix_is_not_positive() -> None:
    n = 20
    a = Counted(torch.diag(torch.linspace(-1, 1, n, dtype=F64)))
    b = torch.ones(n, dtype=F64)
    _, found = conjugate_gradients(a, b, 1e-12, 100)
    assert not found
    assert a.count <= n + 1
    assert gmres(a, b, 1e-12, 100)[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["zero", "projection", "nilpotent", "nan", "inf"])
def test_a_singular_system_is_not_found(kind, method) -> None:
    n = 20
    matrices = {
        "zero": torch.zeros(n, n),
        "projection": torch.eye(n) - torch.diag(torch.eye(n)[0]),
        "nilpotent": torch.diag(torch.ones(n - 1), 1),
        "nan": torch.full((n, n), float("nan")),
        "inf": torch.eye(n) * float("inf"),
    }
    _, found = method(Counted(matrices[kind]), torch.ones(n), 1e-4, 100)
    assert not found
