"""GMRES: what it says it has solved is solved, by as few products as that takes."""

import pytest
import torch
from torch import Tensor

from freevars.torch._rules.krylov import gmres

F64 = torch.float64


class Counted:
    """A matrix by its products."""

    def __init__(self, a: Tensor) -> None:
        self.a, self.count = a, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        return self.a @ v

    def residual(self, u: Tensor, b: Tensor) -> float:
        """In double precision."""
        left = self.a.to(F64) @ u.to(F64) - b.to(F64)
        return float(left.norm() / b.norm())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n", [1, 40, 300])
def test_a_well_conditioned_system_takes_a_product_more_than_its_basis(n, dtype) -> None:
    torch.manual_seed(n)
    a = Counted(torch.eye(n, dtype=dtype) + 0.4 * torch.randn(n, n, dtype=dtype) / n**0.5)
    b = torch.randn(n, dtype=dtype)
    relative = torch.finfo(dtype).eps ** 0.75
    u, found = gmres(a, b, relative, 1000)
    assert found
    assert a.residual(u, b) <= relative
    steps = a.count - 1  # and the residual
    assert gmres(a, b, relative, steps)[1]
    assert not gmres(a, b, relative, steps - 1)[1]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("digits", [2, 4, 8, 12])
def test_what_is_found_is_found_where_rounding_matters(digits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    n = 30
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64))
    a = Counted((q * torch.logspace(0, -digits, n, dtype=F64) @ q.T).to(dtype))
    b = torch.randn(n, dtype=dtype)
    relative = torch.finfo(dtype).eps ** 0.75
    u, found = gmres(a, b, relative, 200)
    assert not found or a.residual(u, b) <= 1.1 * relative
    assert found or dtype != F64 or digits > 2


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16])
def test_products_that_round_more_than_their_dtype_do_not_pass_for_a_solution(
    coarse, dtype
) -> None:
    torch.manual_seed(0)
    n = 40
    eye = torch.eye(n, dtype=dtype)  # with which one step ends the recurrence
    b = torch.randn(n, dtype=dtype)
    relative = torch.finfo(dtype).eps ** 0.75
    for a in (eye, eye + 0.4 * torch.randn(n, n, dtype=dtype) / n**0.5):
        assert gmres(lambda v, a=a: a @ v, b, relative, 200)[1]
        assert not gmres(lambda v, a=a: a @ v.to(coarse).to(dtype), b, relative, 200)[1]


@pytest.mark.parametrize("kind", ["zero", "projection", "nilpotent", "nan", "inf"])
def test_a_singular_system_is_not_found(kind: str) -> None:
    n = 20
    matrices = {
        "zero": torch.zeros(n, n),
        "projection": torch.eye(n) - torch.diag(torch.eye(n)[0]),
        "nilpotent": torch.diag(torch.ones(n - 1), 1),
        "nan": torch.full((n, n), float("nan")),
        "inf": torch.eye(n) * float("inf"),
    }
    _, found = gmres(Counted(matrices[kind]), torch.ones(n), 1e-4, 100)
    assert not found
