"""`linprog` and `fixed_point` of `freevars.torch.scipy` against closed forms."""

import numpy as np
import pytest
import torch

from freevars.errors import FreevarsError, NotASolutionError
from freevars.torch.scipy import fixed_point, linprog

jacobian = torch.autograd.functional.jacobian


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def _plan(gain, matrix, hours, cap):
    """At ((hours - m1 cap) / m0, cap)."""
    return linprog(-gain, matrix[None], hours[None], bounds=[(0, None), (0, cap)]).x


def test_a_vertex_by_everything_that_is_given() -> None:
    at = tuple(torch.tensor(x) for x in ([2.0, 9.0], [1.0, 2.0], 8.0, 3.0))
    np.testing.assert_allclose(_plan(*at), [2.0, 3.0])
    expected = ([[0, 0], [0, 0]], [[-2, -3], [0, 0]], [1, 0], [-2, 1])
    for ours, right in zip(jacobian(_plan, at), expected, strict=True):
        np.testing.assert_allclose(ours, right, atol=1e-12)


def test_equations() -> None:
    """x + y = total with the dearer one at its lower bound."""

    def solve(total, low):
        cost, row = np.array([1, 2]), [[1.0, 1.0]]
        return linprog(cost, A_eq=row, b_eq=total[None], bounds=(low, None)).x

    total, low = torch.tensor(5.0), torch.tensor(1.0)
    found = torch.func.vmap(torch.func.jacrev(solve, (0, 1)), (0, None))(total[None], low)
    np.testing.assert_allclose(torch.cat(found), [[1.0, 0.0], [-1.0, 1.0]], atol=1e-12)


def test_numbers_in_lists_are_differentiated() -> None:
    """At (cap - cap / 3, 1)."""
    solve = lambda cap: linprog([-1, -2], [[1.0, cap / 3]], [cap], bounds=(0, 1)).x
    cap = torch.tensor(1.2)
    np.testing.assert_allclose(solve(cap), [0.8, 1.0])
    for slope in (torch.func.jacrev(solve), torch.func.jacfwd(solve)):
        np.testing.assert_allclose(slope(cap), [2 / 3, 0.0], atol=1e-12)


def test_more_constraints_than_unknowns_meet() -> None:
    corner = lambda cap: _plan(torch.tensor([1.0, 2.0]), torch.ones(2), torch.tensor(3.0), cap)
    with pytest.raises(FreevarsError, match=r"linprog: .*gradients.* not independent"):
        jacobian(corner, torch.tensor(3.0))


def test_what_is_infeasible_says_so() -> None:
    result = linprog([2.0, 3.0], [[-1.0, -1.0]], [-3.0], bounds=(0, 1))
    assert not result.success
    assert "infeasible" in result.message
    assert result.x.isnan().all()
    b = torch.tensor([-1.0], requires_grad=True)
    with pytest.raises(NotASolutionError, match="a value that is not finite"):
        linprog([2.0, 3.0], A_eq=[[1.0, 1.0]], b_eq=b).x.sum().backward()
    with pytest.raises(TypeError, match="both A_ub and b_ub"):
        linprog([2.0, 3.0], [[1.0, 1.0]])


@pytest.mark.parametrize("method", ["del2", "iteration"])
def test_fixed_point(method) -> None:
    solve = lambda a: fixed_point(lambda x, a: a * torch.cos(x), 0.5, args=a, method=method)
    a = torch.tensor(1.0, requires_grad=True)
    assert torch.autograd.gradcheck(solve, a, rtol=1e-4)
    x, a = solve(a).detach(), a.detach()
    np.testing.assert_allclose(torch.func.jacfwd(solve)(a), torch.cos(x) / (1 + torch.sin(x)))
