"""The linear systems of the rules and what is said about them: batches, totals, units, options."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import freevars.torch as fv
from freevars.torch import (
    CaptureError,
    NotASolutionError,
    SingularError,
    StructureError,
    argmin,
    fixed_point,
    root,
)
from freevars.torch._rules.derivative import Derivative
from tests.torch.explicit import fresh

f = torch.func
F64 = torch.float64


def returning(x: Tensor) -> Any:
    """A solver that has found `x`."""
    return lambda fun, x0: x


def equations(x: Tensor, a: Tensor) -> Tensor:
    return torch.stack(
        [x[..., 0] ** 2 + x[..., 1] - a[..., 0], x[..., 1] ** 3 - x[..., 0] + a[..., 1]], -1
    )


def newton_of_a_batch(fun: Any, x0: Tensor) -> Tensor:
    x = x0
    while True:
        x = x.detach().requires_grad_()
        r = fun(x)
        rows = [torch.autograd.grad(r[..., i].sum(), x, retain_graph=True)[0] for i in range(2)]
        step = torch.linalg.solve(torch.stack(rows, -2), r)
        x = (x - step).detach()
        if float(step.detach().abs().max()) < 1e-14:  # it looks at its data
            return x


def newton_of_one(fun: Any, x0: Tensor) -> Tensor:
    for _ in range(12):
        x0 = x0 - torch.linalg.solve(f.jacrev(fun)(x0), fun(x0))
    return x0


# --- batches


def test_a_batch_is_one_solve_with_small_blocks() -> None:
    a = (torch.rand(3, 4, 2, dtype=F64) + 0.5).requires_grad_()
    runs = 0

    def fun(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return equations(x, a)

    x = root(newton_of_a_batch, batch_dims=2)(fun, torch.ones(3, 4, 2, dtype=F64))
    one = lambda a: root(newton_of_one)(lambda x: equations(x, a), torch.ones(2, dtype=F64))
    weights = torch.rand(3, 4, 2, dtype=F64)
    (g,) = torch.autograd.grad((x * weights).sum(), a, create_graph=True)
    (gg,) = torch.autograd.grad(g.square().sum(), a)
    each = torch.stack([one(row) for row in a.reshape(12, 2)]).reshape(3, 4, 2)
    (h,) = torch.autograd.grad((each * weights).sum(), a, create_graph=True)
    (hh,) = torch.autograd.grad(h.square().sum(), a)
    torch.testing.assert_close([x, g, gg], [each, h, hh])
    assert runs < 40


@pytest.mark.parametrize("solver", [newton_of_one, newton_of_a_batch])
def test_vmap_runs_a_solver_once_where_it_can(solver: Any) -> None:
    runs = 0

    def counted(fun: Any, x0: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return solver(fun, x0)  # type: ignore[no-any-return]

    batched = solver is newton_of_a_batch
    rule = root(counted, batch_dims=1) if batched else root(counted)

    def solve(a: Tensor) -> Tensor:
        if batched:
            x = rule(lambda x: equations(x, a[None]), torch.ones(1, 2, dtype=F64))
            return x[0]  # type: ignore[no-any-return]
        return rule(lambda x: equations(x, a), torch.ones(2, dtype=F64))  # type: ignore[no-any-return]

    a = (torch.rand(5, 2, dtype=F64) + 0.5).requires_grad_()
    x = f.vmap(solve)(a)
    assert runs == 1
    one = lambda a: root(newton_of_one)(lambda x: equations(x, a), torch.ones(2, dtype=F64))
    each = torch.stack([one(row) for row in a])
    got, want = (torch.autograd.grad(y.square().sum(), a)[0] for y in (x, each))
    torch.testing.assert_close([x, got], [each, want])
    torch.testing.assert_close(
        f.vmap(f.jacrev(solve))(a.detach()), f.vmap(f.jacfwd(solve))(a.detach())
    )


def test_a_member_that_was_not_found_matters_where_it_has_a_share() -> None:
    a = torch.tensor([1.0, 4.0, 9.0], dtype=F64, requires_grad=True)
    found = torch.tensor([[1.0], [2.0], [7.0]], dtype=F64)
    x = root(returning(found), batch_dims=1)(
        lambda x: x**2 - a[:, None], torch.ones(3, 1, dtype=F64)
    )
    (g,) = torch.autograd.grad(x[:2].sum(), a, retain_graph=True)
    torch.testing.assert_close(g, torch.tensor([0.5, 0.25, 0.0], dtype=F64))
    with pytest.raises(NotASolutionError, match=r"problem 2 of 3.*did not converge"):
        torch.autograd.grad(x.sum(), a)
    x = root(returning(found), batch_dims=1, on_failure="nan")(
        lambda x: x**2 - a[:, None], torch.ones(3, 1, dtype=F64)
    )
    (g,) = torch.autograd.grad(x.sum(), a)
    assert g[:2].tolist() == pytest.approx([0.5, 0.25])
    assert g[2].isnan()


def _kinked(x: Tensor, a: Tensor) -> Tensor:
    """Its root follows a, and at x = 1 nothing does while a < 1."""
    return 3 * x - 1 + torch.relu(a - x)


FORWARD = {
    "jvp": lambda g, a: f.jvp(g, (a,), (torch.ones_like(a),))[1],
    "jacfwd": lambda g, a: f.jacfwd(g)(a),
    "vmap": lambda g, a: f.vmap(f.jacfwd(g))(a[None])[0],
    "forward over reverse": lambda g, a: f.jvp(f.grad(lambda a: g(a).sum()), (a,), (a,))[1],
}


@pytest.mark.parametrize("by", FORWARD)
def test_forward_mode_asks_for_a_solution_where_nothing_moves(by: str) -> None:
    """As reverse mode does: 0 is the derivative of a solution alone."""
    solve, a = root(returning(torch.tensor(1.0, dtype=F64))), torch.tensor(0.5, dtype=F64)
    start = torch.tensor(0.0, dtype=F64)
    with pytest.raises(NotASolutionError, match="did not converge"):
        FORWARD[by](lambda a: solve(lambda x: _kinked(x, a), start), a)
    found = root(returning(torch.tensor(1 / 3, dtype=F64)))
    zero = FORWARD[by](lambda a: found(lambda x: _kinked(x, a), start), a * 0)
    assert zero.tolist() == 0


def test_problems_that_are_not_independent_are_refused() -> None:
    a = fresh(3)
    x = root(returning(a.detach()[:, None]), batch_dims=1)(
        lambda x: x - x.mean() - a[:, None] + a.mean(), torch.ones(3, 1, dtype=F64)
    )
    with pytest.raises(StructureError, match="independent"):
        torch.autograd.grad(x.sum(), a)


@pytest.mark.parametrize(("shape", "batch_dims"), [((2, 0), 0), ((3, 0), 1), ((0, 3), 1)])
@pytest.mark.parametrize("rule", [root, fixed_point, argmin, fv.least_squares])
def test_no_unknowns_or_no_problems(rule: Any, shape: Any, batch_dims: int) -> None:
    functions = {argmin: lambda x: (x**2).sum(tuple(range(batch_dims, 2)))}
    fun = functions.get(rule, lambda x: x / 2)
    solve = rule(returning(torch.zeros(shape, dtype=F64)), batch_dims=batch_dims)
    solved = lambda t: solve(lambda x: t * fun(x), torch.zeros(shape, dtype=F64))
    t = torch.tensor(2.0, dtype=F64)
    assert f.jacfwd(solved)(t).shape == shape
    assert f.jacfwd(f.jacfwd(solved))(t).shape == shape
    assert f.vmap(f.grad(lambda t: solved(t).sum()))(t.expand(3)).tolist() == [0.0, 0.0, 0.0]
    t.requires_grad_()
    assert torch.autograd.grad(solved(t).sum(), t)[0] == 0


def test_wrong_batches() -> None:
    with pytest.raises(StructureError, match="begin with the same 2 axes"):
        root(returning(torch.ones(3)), batch_dims=2)(lambda x: x, torch.ones(3))
    with pytest.raises(StructureError, match=r"real tensor of shape \[3\]"):
        argmin(returning(torch.ones(3)), batch_dims=1)(lambda x: x.sum(), torch.ones(3, 2))
    with pytest.raises(ValueError, match="batch_dims"):
        root(newton_of_one, batch_dims=-1)


# --- units


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_units_change_nothing(dtype: torch.dtype) -> None:
    e = 4 if dtype is torch.float32 else 12
    m = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=dtype)
    exact = torch.linalg.solve(m, torch.tensor([1.0, -2.0], dtype=dtype))
    for rows, columns in ((1.0, 1.0), (10.0**e, 1.0), (1.0, 10.0**-e)):
        r = torch.tensor([rows, 1 / rows], dtype=dtype)
        c = torch.tensor([columns, 1 / columns], dtype=dtype)
        t = torch.tensor(1.0, dtype=dtype, requires_grad=True)
        right = torch.tensor([1.0, -2.0], dtype=dtype)
        fun = lambda x, t=t, r=r, c=c: r * (m @ (c * x) - t * right)
        x = root(returning(exact / c))(fun, torch.zeros(2, dtype=dtype))
        (g,) = torch.autograd.grad((c * x).sum(), t)
        torch.testing.assert_close(g, exact.sum())
        for off in ((1.3, 1.0), (1.0, 1.3)):
            moved = exact / c * torch.tensor(off, dtype=dtype)
            x = root(returning(moved))(fun, torch.zeros(2, dtype=dtype))
            with pytest.raises(NotASolutionError, match="did not converge"):
                torch.autograd.grad((c * x).sum(), t)


def test_a_solver_that_stops_early_is_caught_however_small_x_is() -> None:
    a = torch.tensor(1e-4, requires_grad=True)
    x = root(lambda fun, x0: x0.clone())(lambda x: x**2 - a, torch.tensor(0.02))
    with pytest.raises(NotASolutionError, match="starting point"):
        torch.autograd.grad(x, a)


@pytest.mark.parametrize("kind", ["root", "argmin", "fixed_point"])
def test_beyond_the_dense_limit(kind: str) -> None:
    """A stiff system where an iteration stalls, and one where it does not; zeros in the cotangent,
    objectives of any size, and a solver that stopped early."""
    n = 600
    k = torch.arange(n)
    t = torch.tensor(1.0, dtype=F64, requires_grad=True)
    second = 2 * torch.eye(n, dtype=F64)
    second[k[1:], k[:-1]] = second[k[:-1], k[1:]] = -1
    matrix = 0.1 * second if kind == "fixed_point" else second * 1e6
    right = torch.ones(n, dtype=F64)
    system = torch.eye(n, dtype=F64) + matrix if kind == "fixed_point" else matrix
    exact = torch.linalg.solve(system, right)
    programs: dict[str, Any] = {
        "root": (root, lambda x: matrix @ x - t * right),
        "argmin": (argmin, lambda x: 1e-9 * (x @ (matrix @ x) / 2 - t * (right @ x))),
        "fixed_point": (fixed_point, lambda x: t * right - matrix @ x),
    }
    decorator, fun = programs[kind]
    x = decorator(returning(exact))(fun, torch.zeros(n, dtype=F64))
    (g,) = torch.autograd.grad(x[n // 2], t)
    torch.testing.assert_close(g, exact[n // 2], rtol=1e-6, atol=0.0)
    x = decorator(returning(exact * 1.2))(fun, torch.zeros(n, dtype=F64))
    with pytest.raises(NotASolutionError, match="did not converge"):
        torch.autograd.grad(x.sum(), t)


class _Crooked(torch.autograd.Function):
    """Its "gradient" is x + 0.3 (x shifted by one), which is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().sum() / 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return g * (x + 0.3 * x.roll(1))


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize(("n", "own"), [(2, True), (5, False), (5, True), (600, False)])
def test_an_objective_whose_backward_pass_is_no_gradient(n: int, own: bool, forward: bool) -> None:  # noqa: FBT001
    """What holds at x is what the backward pass says, and its derivative is not symmetric."""
    eye = torch.eye(n, dtype=F64)
    inverse = torch.linalg.inv(eye + 0.3 * eye.roll(1, 0))
    t, w = torch.linspace(0.5, 1.5, n, dtype=F64), torch.arange(n, dtype=F64).cos()

    def applied(operator: Any, b: Tensor) -> Tensor:
        return torch.linalg.solve(torch.stack([operator(e) for e in eye], 1), b)

    minimize = argmin(returning(inverse @ t), linear_solve=applied if own else None)

    def found(t: Tensor) -> Tensor:
        return minimize(lambda x: _Crooked.apply(x) - x @ t, torch.zeros_like(t))

    if forward:
        with torch.autograd.forward_ad.dual_level():
            dual = found(torch.autograd.forward_ad.make_dual(t, w))
            tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
        torch.testing.assert_close(tangent, inverse @ w)
    else:
        t.requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(found(t) @ w, t)[0], inverse.T @ w)


# --- options


def test_conserved_totals() -> None:
    """A <=> B: the equations keep A + B, and repeat each other."""
    k = torch.tensor(3.0, dtype=F64, requires_grad=True)
    start = torch.tensor([1.5, 0.5], dtype=F64, requires_grad=True)

    def rates(x: Tensor) -> Tensor:
        flow = k * x[0] - x[1]
        return torch.stack([-flow, flow])

    def solver(fun: Any, x0: Tensor) -> Tensor:
        for _ in range(300):
            x0 = x0 + 0.2 * fun(x0)
        return x0

    def exact(k: Tensor, start: Tensor) -> Tensor:
        return torch.stack([start.sum() / (1 + k), start.sum() * k / (1 + k)])

    for options in ({}, {"on_failure": "least_squares"}):
        x = root(solver, **options)(rates, start)
        with pytest.raises(SingularError, match="conserved="):
            torch.autograd.grad(x[0], k)
    solve = root(solver, conserved=lambda x: x.sum())
    x, y = solve(rates, start), exact(k, start)
    torch.testing.assert_close(x, y)
    weights = torch.tensor([1.0, 3.0], dtype=F64)
    got, want = (torch.autograd.grad(z @ weights, (k, start), create_graph=True) for z in (x, y))
    torch.testing.assert_close(got, want)
    second = [torch.autograd.grad(g[0] + g[1].sum(), (k, start)) for g in (got, want)]
    torch.testing.assert_close(*second)
    starts = torch.stack([start, 2 * start]).detach()
    by_start = (lambda s: solve(rates, s), lambda s: exact(k, s))
    each = [f.vmap(f.jacrev(of))(starts) for of in by_start]
    torch.testing.assert_close(*each)
    with pytest.raises(NotASolutionError, match="conserved="):
        root(solver, conserved=lambda x: x.sum())(lambda x: start.detach() * k - x, start)


@pytest.mark.parametrize("n", [2, 600])
def test_least_squares_refuses_what_has_no_solution(n: int) -> None:
    """Pairs of (x - a)^2 + b y: flat in y, at b = 0 alone."""
    a, b = (torch.tensor(t, dtype=F64, requires_grad=True) for t in (0.5, 0.0))
    found = torch.tensor([0.5, 0.0], dtype=F64).repeat(n // 2)
    solve = argmin(returning(found), on_failure="least_squares")

    def at(b: Any) -> Tensor:
        fun = lambda x: ((x[::2] - a) ** 2).sum() + b * x[1::2].sum()
        return solve(fun, torch.zeros(n, dtype=F64))

    (slope,) = torch.autograd.grad(at(0.0) @ found, a)
    torch.testing.assert_close(slope, torch.tensor(n / 4, dtype=F64))
    for asked in ((a, b), (b,)):
        with pytest.raises(SingularError, match="has no solution"):
            torch.autograd.grad(at(b).sum(), asked)


def test_two_equations_that_part_at_zero() -> None:
    """x + y = t and x + y = -t, at t = 0."""
    t = torch.tensor(0.0, dtype=F64, requires_grad=True)
    signs, zero = torch.tensor([-1.0, 1.0], dtype=F64), torch.zeros(2, dtype=F64)
    x = root(returning(zero), on_failure="least_squares")(lambda x: x.sum() + signs * t, zero)
    with pytest.raises(SingularError, match="has no solution"):
        torch.autograd.grad(x.sum(), t)


def test_a_freedom_of_many_directions_is_no_total() -> None:
    """Differences of 300 pairs: the null vectors are zero but for rounding in most places."""
    n, t = 300, torch.tensor(0.5, dtype=F64, requires_grad=True)
    found = torch.tensor([0.75, 0.25], dtype=F64).repeat_interleave(n)
    solve = argmin(returning(found), on_failure="least_squares")
    x = solve(lambda x: ((x[:n] - x[n:] - t) ** 2).sum(), torch.zeros(2 * n, dtype=F64))
    (slope,) = torch.autograd.grad(x[0] - 2 * x[-1], t)
    torch.testing.assert_close(slope, torch.tensor(1.5, dtype=F64))


def test_two_constraints_at_one_place_that_may_move_apart() -> None:
    a, b = (torch.tensor(1.0, dtype=F64, requires_grad=True) for _ in range(2))

    @argmin(on_failure="least_squares")
    def solve(fun: Any, x0: Tensor, *, inequality: Any) -> Tensor:
        return torch.ones_like(x0)

    def nearest(a: Tensor, b: Tensor) -> Tensor:
        limits = lambda x: torch.stack([a - x[0], b - x[0]])
        x0 = torch.zeros(1, dtype=F64)
        return solve(lambda x: ((x - 3) ** 2).sum(), x0, inequality=limits)[0]

    (slope,) = torch.autograd.grad(nearest(a, a), a)
    torch.testing.assert_close(slope, torch.tensor(1.0, dtype=F64))
    with pytest.raises(SingularError, match="not independent"):
        torch.autograd.grad(nearest(a, b), (a, b))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_fixed_point_whose_equations_cancel_is_singular(dtype) -> None:
    """x = t P x with columns of P that sum to 1: what is left of 1 - P is rounding, at t = 1."""
    torch.manual_seed(0)
    for n in [1, 2, 3, 20] * 10:
        p = torch.rand(n, n, dtype=F64) ** 4
        p = p / p.sum(0)
        x = torch.linalg.matrix_power(p, 1 << 12).sum(1).to(dtype)
        p = p.to(dtype)
        for t, b in ((0.9, 0.1 * x), (1.0, 0 * x)):
            by = torch.tensor(t, dtype=dtype, requires_grad=True)
            found = fixed_point(returning(x))(lambda x: by * (p @ x) + b, 2 * x)
            if t == 1:
                with pytest.raises(SingularError, match="is singular"):
                    torch.autograd.grad(found.sum(), by)
            else:  # of the sum s of x, which is (0.1 s) / (1 - t)
                slope = torch.autograd.grad(found.sum(), by)[0]
                torch.testing.assert_close(slope, 10 * n + 0 * slope, rtol=1e-4, atol=0)


def test_polish_and_tol() -> None:
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    rough = returning(torch.tensor(1.4, dtype=F64))
    for options, error in (({}, True), ({"tol": 0.1}, False), ({"polish": True}, False)):
        x = root(rough, **options)(lambda x: x**2 - a, torch.tensor(1.0, dtype=F64))
        if error:
            with pytest.raises(NotASolutionError, match="did not converge"):
                torch.autograd.grad(x, a)
        else:
            (g,) = torch.autograd.grad(x, a)
            torch.testing.assert_close(g, 0.5 / x.detach())
    assert abs(float(x.detach()) - 2**0.5) < 1e-4  # polished
    with pytest.raises(ValueError, match="tol"):
        root(rough, tol=-1.0)


def test_no_polish_by_a_step_that_leads_away() -> None:
    """Newton's method for arctan(x) diverges from 2 and converges from 0.5; beyond 3 there is no
    value."""
    start = torch.tensor([0.5, 2.0, 3.5], dtype=F64)
    solve = root(returning(start), polish=True, batch_dims=1)
    x = solve(lambda x: torch.where(x < 3, torch.atan(x), torch.nan), start)
    step = torch.atan(start[0]) * (1 + start[0] ** 2)
    torch.testing.assert_close(x, torch.stack([start[0] - step, start[1], start[2]]))


def test_no_polish_by_a_step_that_leads_nowhere() -> None:
    """The second problem has a singular system and its step is not finite; the step of the third
    leads out of what has a Cholesky factor."""
    start = torch.tensor([[2.0], [3.0], [0.04]], dtype=F64)

    def fun(x: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(x[..., None])[..., 0]
        return torch.cat([factor[:1] - 2, 0 * factor[1:2] + 1, factor[2:] + 1])

    solve = root(lambda fun, x0: x0.clone(), polish=True, batch_dims=1)
    torch.testing.assert_close(solve(fun, start), start)
    two = solve(lambda x: fun(torch.cat([x, start[2:]]))[:2], start[:2])
    first = start[0] - 2 * start[0].sqrt() * (start[0].sqrt() - 2)
    torch.testing.assert_close(two, torch.stack([first, start[1]]))


def test_the_operator_of_a_linear_solve() -> None:
    m = torch.tensor([[3.0, 1.0, 0.0], [0.5, 2.0, 1.0], [0.0, 1.0, 4.0]], dtype=F64)
    a, seen = fresh(3), []

    def own(operator: Any, b: Tensor) -> Tensor:
        seen.append(operator)
        whole = operator.as_matrix()
        torch.testing.assert_close(operator.matvec(b), whole @ b)
        torch.testing.assert_close(operator(b), whole @ b)
        torch.testing.assert_close(operator.rmatvec(b), whole.T @ b)
        torch.testing.assert_close(operator.diagonal(), whole.diagonal())
        return torch.linalg.solve(whole, b)

    exact = torch.linalg.solve(m, a.detach())
    x = root(returning(exact), linear_solve=own)(lambda x: m @ x - a, torch.zeros(3, dtype=F64))
    (g,) = torch.autograd.grad(x[0], a)
    torch.testing.assert_close(g, torch.linalg.inv(m)[0])
    assert not seen[0].symmetric
    assert seen[0].structure().shape == (3,)
    with pytest.raises(TypeError, match="linear_solve"):
        root(newton_of_one, linear_solve=3)


def test_a_linear_solve_of_ones_own_counts_by_each_vector() -> None:
    torch.manual_seed(0)
    n = 600
    a = torch.eye(n, dtype=F64) + 0.3 * torch.randn(n, n, dtype=F64) / n**0.5
    b = torch.ones(n, dtype=F64, requires_grad=True)
    share = 1.0

    def own(operator: Any, b: Tensor) -> Tensor:
        return share * torch.linalg.solve(operator.as_matrix(), b)

    solver = root(lambda fun, x0: torch.linalg.solve(a, b.detach()), linear_solve=own)
    x = solver(lambda x: a @ x - b, torch.zeros(n, dtype=F64))
    inverse = torch.linalg.inv(a)
    for i in range(2):
        (row,) = torch.autograd.grad(x[i], b, retain_graph=True)
        torch.testing.assert_close(row, inverse[i])
    share = 0.9
    with pytest.raises(SingularError, match=r"residual of 1\.0e-01"):
        torch.autograd.grad(x[2], b, retain_graph=True)
    share = 1.0
    (row,) = torch.autograd.grad(x[3], b)
    torch.testing.assert_close(row, inverse[3])


def test_a_contraction_is_checked_along_one_direction(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    n = 600
    m = 0.1 * torch.randn(n, n, dtype=F64) / n**0.5
    b = torch.randn(n, dtype=F64, requires_grad=True)
    transposed, count = Derivative.transposed, 0

    def counted(self: Derivative, u: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return transposed(self, u)

    def iterate(fun: Any, x: Tensor) -> Tensor:
        for _ in range(12):
            x = fun(x)
        return x

    monkeypatch.setattr(Derivative, "transposed", counted)
    counts = []
    for check in (True, False):
        count = 0
        x = fixed_point(iterate, check=check)(lambda x: m @ x + b, torch.zeros(n, dtype=F64))
        (grad,) = torch.autograd.grad(x.sum(), b)
        torch.testing.assert_close(grad, torch.linalg.inv(torch.eye(n, dtype=F64) - m).sum(0))
        counts.append(count)
    assert counts[0] <= counts[1] + 3


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n", [40, 1000])
def test_a_slow_part_counts_even_where_nothing_hears_of_it(n, dtype) -> None:
    """A gate that is still shut lets nothing through but its own derivative, which is what stands
    behind it."""
    gate = torch.zeros((), dtype=dtype, requires_grad=True)
    rate = torch.finfo(dtype).eps ** 0.5 / 4

    def step(x: Tensor) -> Tensor:
        quick, slow = x[:-1], x[-1:]
        return torch.cat([0.05 * quick.roll(1) + 1 + gate * slow, slow + rate * (1 - slow)])

    def iterate(fun: Any, x: Tensor) -> Tensor:
        for _ in range(15):
            x = fun(x)
        return x

    x0 = torch.zeros(n, dtype=dtype)
    x = fixed_point(iterate)(step, x0)
    for _ in range(2):
        for part in (x[0], x[-1], x[:-1].sum()):
            with pytest.raises(NotASolutionError):
                torch.autograd.grad(part, gate, retain_graph=True)
    x0[-1] = 1
    (grad,) = torch.autograd.grad(fixed_point(iterate)(step, x0)[0], gate)
    torch.testing.assert_close(grad, torch.tensor(1 / 0.95, dtype=dtype))


def _sums(operator: Any, b: Tensor) -> Tensor:
    u = b
    for _ in range(60):
        u = u + b - operator(u)
    return u


@pytest.mark.parametrize(("n", "problems", "own"), [(600, 5, None), (4, 5000, _sums)])
def test_of_many_problems_by_products_each_has_a_verdict(n, problems, own) -> None:
    torch.manual_seed(0)
    m = 0.3 * torch.randn(n, n, dtype=F64) / n**0.5
    c = torch.randn(problems, n, dtype=F64, requires_grad=True)

    def stops_early_in_one(fun: Any, x: Tensor) -> Tensor:
        for _ in range(60):
            x = fun(x)
        return torch.where(torch.arange(problems)[:, None] == 3, 0.9 * x, x)

    solve = fixed_point(stops_early_in_one, batch_dims=1, linear_solve=own)
    x = solve(lambda x: torch.tanh(x @ m) + c, torch.zeros_like(c))
    (grad,) = torch.autograd.grad(x[2].sum(), c, retain_graph=True)
    inner = m * (1 - torch.tanh(x[2] @ m) ** 2)  # of what the tanh is of, by x
    torch.testing.assert_close(grad[2], torch.linalg.inv(torch.eye(n, dtype=F64) - inner).sum(1))
    assert not grad[3].any()
    with pytest.raises(NotASolutionError, match=rf"problem 3 of {problems}\)"):
        torch.autograd.grad(x.sum(), c)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("seed", range(12))
def test_an_accepted_derivative_of_a_contraction_is_right(seed, dtype) -> None:
    """Quick and slow directions, which hear of each other or not; errors of any size in some."""
    torch.manual_seed(seed)
    n = 520
    k = int(torch.randint(1, n, ()))
    rate, near_one, error = (10.0 ** -torch.rand(3, dtype=F64) * torch.tensor([0.3, 1, 1])).tolist()
    m = rate * torch.randn(n, n, dtype=F64) / n**0.5
    if seed % 3:
        m[k:] = 0
        m[k:, k:] = torch.eye(n - k, dtype=F64) * (1 - near_one**4)
    if seed % 3 == 1:
        m[:k, k:] = 0
    b = torch.randn(n, dtype=F64)

    def step(x: Tensor, t: Tensor) -> Tensor:
        return m.to(x) @ x + 0.2 * rate * torch.tanh(x).roll(1) + b.to(x) * t

    t, x = torch.ones(n, dtype=F64), torch.zeros(n, dtype=F64)
    eye = torch.eye(n, dtype=F64)
    for _ in range(30):
        a = eye - f.jacrev(step)(x, t)
        x = x + torch.linalg.solve(a, step(x, t) - x)
    wrong = torch.where(torch.arange(n) >= (k if seed % 2 else 0), error**4 * x, 0)
    stopped = (x + wrong * torch.randn(n, dtype=F64)).to(dtype)
    weights = torch.stack([torch.ones(n, dtype=F64), torch.randn(n, dtype=F64), eye[0], eye[-1]])
    expected = torch.linalg.solve(a.mT, weights.mT).mT * b

    t = t.to(dtype).requires_grad_()
    found = fixed_point(lambda fun, x0: stopped)(lambda x: step(x, t), torch.zeros_like(stopped))
    for weight, right in zip(weights, expected, strict=True):
        try:
            (grad,) = torch.autograd.grad(found, t, weight.to(dtype), retain_graph=True)
        except (NotASolutionError, SingularError):
            assert error**4 > torch.finfo(dtype).eps ** 0.5
        else:
            assert float((grad.to(F64) - right).abs().max() / right.abs().max()) < 0.05


def test_a_linear_solve_of_ones_own_in_a_batch() -> None:
    """It is written for one problem, and may read a tensor of which each has its own."""

    def solved(a: Tensor, step: Tensor) -> Tensor:
        def richardson(operator: Any, b: Tensor) -> Tensor:
            u = torch.zeros_like(b)
            for _ in range(40):
                u = u + step * (b - operator(u))
            return u

        solve = root(lambda fun, x0: a.sqrt(), linear_solve=richardson)
        return solve(lambda x: x**2 - a, torch.ones_like(a))

    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    steps = 0.8 / (2 * a.sqrt())
    expected = torch.diag_embed(0.5 / a.sqrt())
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(torch.func.vmap(transform(solved))(a, steps), expected)
    one = torch.func.vmap(torch.func.jacrev(solved), (0, None))(a, steps[0])
    torch.testing.assert_close(one[0], expected[0])
    zero = torch.func.grad(lambda step: solved(a[0], step).sum())(steps[0])
    assert zero.tolist() == [0, 0]


def _direct(operator: Any, b: Tensor) -> Tensor:
    return torch.linalg.solve(operator.as_matrix(), b)


@pytest.mark.parametrize("vmapped", [False, True])
@pytest.mark.parametrize(("n", "own"), [(3, None), (600, None), (3, _direct)])
def test_nothing_waits_for_a_collection_of_garbage(n: int, own: Any, vmapped: bool) -> None:  # noqa: FBT001
    """What a derivative was computed with is freed with its graph, without a circle."""
    made = []

    @fixed_point(linear_solve=own)
    def iterate(fun: Any, x0: Tensor) -> Tensor:
        for _ in range(60):
            x0 = fun(x0)
        return x0

    def solution(a: Tensor) -> Tensor:
        def fun(x: Tensor) -> Tensor:
            sin = x.sin()
            made.append(weakref.ref(sin))  # the graph holds it, for the derivative of its square
            return 0.3 * sin**2 + a

        return iterate(fun, torch.zeros(n, dtype=F64))

    def derivative() -> None:
        a = torch.linspace(0.1, 1, 2 * n, dtype=F64).reshape(2, n).requires_grad_()
        x = f.vmap(solution)(a) if vmapped else solution(a[0])
        torch.autograd.grad(x.sum(), a)

    gc.disable()
    try:
        derivative()
        assert made
        assert [ref() for ref in made if ref() is not None] == []
    finally:
        gc.enable()


def test_the_old_vmap_of_forward_mode_is_refused() -> None:
    a = torch.tensor(4.0, dtype=torch.float64)
    solve = root(lambda fun, x0: x0)
    with pytest.raises(CaptureError, match=r"torch\.func\.jacfwd"):
        torch.autograd.functional.jacobian(
            lambda a: solve(lambda x: x**2 - a, torch.full_like(a, 2.0)),
            a,
            strategy="forward-mode",
            vectorize=True,
        )


def test_a_linearisation_is_refused() -> None:
    a = torch.tensor(4.0, dtype=F64)
    solve = root(returning(torch.tensor(2.0, dtype=F64)))
    with pytest.raises(CaptureError, match=r"expected torch.func.jvp.*got torch.func.linearize"):
        f.linearize(lambda a: solve(lambda x: x**2 - a, a), a)


@pytest.mark.parametrize("check", [False, True])
def test_a_program_that_would_lose_the_derivative_is_refused(*, check: bool) -> None:
    class Root(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(4.0, dtype=F64))

        def forward(self, x0: Tensor) -> Tensor:
            return newton(lambda x: x**2 - self.a, x0)

    @root(check=check)
    def newton(fun: Any, x0: Tensor) -> Tensor:
        for _ in range(9):
            x0 = x0 - fun(x0) / (2 * x0)
        return x0

    module, x0 = Root(), torch.tensor(1.0, dtype=F64)
    with pytest.raises(CaptureError, match=r"newton: .* export under torch.no_grad"):
        torch.export.export(module, (x0,))
    with pytest.raises(CaptureError, match=r"newton: .* got one that is being recorded"):
        make_fx(f.grad(lambda a: newton(lambda x: x**2 - a, x0)))(module.a.detach())
    a = module.a.detach()
    values = lambda a: newton(lambda x: x**2 - a, torch.ones_like(a))
    # Whoever differentiates the program later would find nothing.
    for program in (values, lambda a: f.vmap(values)(a[None])):
        for mode in ("real", "fake"):
            with pytest.raises(CaptureError, match=r"newton: .* derivative may be asked for"):
                make_fx(program, tracing_mode=mode)(a)
    module.requires_grad_(False)
    with pytest.raises(CaptureError, match=r"newton: .* export under torch.no_grad"):
        torch.export.export(module, (x0,))
    with torch.no_grad():
        program = torch.export.export(module, (x0,)).module()
    torch.testing.assert_close(program(2 * x0), torch.tensor(2.0, dtype=F64))
    # What no input of the program has a part in is a constant of it.
    for same in (lambda b: b * values(a), lambda b: newton(lambda x: x**2 - a, b / 2)):
        program = make_fx(same)(a / 4)
        torch.testing.assert_close(program(a / 4), torch.tensor(2.0, dtype=F64))


def test_the_old_vmap_of_reverse_mode_is_for_first_derivatives() -> None:
    a = torch.tensor(4.0, dtype=torch.float64)
    solve = root(lambda fun, x0: x0)
    fun = lambda a: solve(lambda x: x**2 - a, torch.full_like(a, 2.0))
    exact = torch.tensor(0.25, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.functional.jacobian(fun, a, vectorize=True), exact)
    torch.testing.assert_close(torch.autograd.functional.hessian(fun, a), -exact / 8)
    with pytest.raises(NotImplementedError, match=r"expected torch\.func\.hessian"):
        torch.autograd.functional.hessian(fun, a, vectorize=True)


@pytest.mark.parametrize("start", [torch.ones_like, lambda w: w / 2, lambda w: torch.ones(3).to(w)])
def test_vmap_of_a_solver_whose_start_is_one_of_the_batch(start: Any) -> None:
    w = torch.linspace(0.1, 1.1, 12, dtype=F64).reshape(4, 3)

    def iterate(fun: Any, z: Tensor) -> Tensor:
        for _ in range(60):
            z = fun(z)
        return z

    def solved(w: Tensor, solver: Any) -> Tensor:
        return solver(lambda z: 0.3 * z.cos() * w, start(w))

    expected = f.vmap(f.jacrev(lambda w: solved(w, iterate)))(w)
    rule = fixed_point(iterate)
    for transform in (f.jacrev, f.jacfwd):
        got = f.vmap(transform(lambda w: solved(w, rule)))(w)
        torch.testing.assert_close(got, expected)
    twice = f.vmap(f.vmap(f.jacrev(lambda w: solved(w, rule))))(w.reshape(2, 2, 3))
    torch.testing.assert_close(twice.reshape(4, 3, 3), expected)


@pytest.mark.parametrize("off", [0.0, 0.3])
def test_many_unknowns_in_units_of_their_own(off: float) -> None:
    """The large columns say nothing of the small ones: neither in the check nor in the solve."""
    n = 600
    torch.manual_seed(0)
    unit = 10.0 ** (6 * torch.rand(n, dtype=F64) - 3)
    rows = torch.randn(2 * n, n, dtype=F64) * unit
    y = rows @ (torch.randn(n, dtype=F64) / unit)
    hessian = rows.T @ rows / n + torch.diag(unit**2)
    t = torch.ones((), dtype=F64, requires_grad=True)

    def objective(x: Tensor) -> Tensor:
        return ((rows @ x - t * y) ** 2).sum() / (2 * n) + ((unit * x) ** 2).sum() / 2

    right = torch.linalg.solve(hessian, rows.T @ y / n)  # x is linear in t
    k = int(unit.argmin())
    x = right * (1 + off * torch.linspace(-1, 1, n, dtype=F64))
    found = argmin(returning(x))(objective, torch.zeros(n, dtype=F64))
    if off:
        with pytest.raises(NotASolutionError):
            found[k].backward()
    else:
        found[k].backward()
        torch.testing.assert_close(t.grad, right[k], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("n", "softness"), [(600, 1e-2), (600, 1e-4), (600, 1e-6), (40_000, 1e-2)])
def test_one_soft_unknown_of_many_counts(n, softness, dtype) -> None:
    """It is no unknown in a unit of its own; and beside so many, a mean would not see it."""
    gate = torch.zeros((), dtype=dtype, requires_grad=True)

    def energy(x: Tensor) -> Tensor:
        stiff, soft = x[:-1], x[-1]
        return ((stiff - 1 - gate * soft) ** 2).sum() / 2 + softness * (soft - 1) ** 2 / 2

    for soft, right in ((6e-3, False), (0.9, False), (1.0, True)):
        x = torch.ones(n, dtype=dtype)
        x[-1] = soft
        by = argmin(returning(x))(energy, torch.zeros(n, dtype=dtype))[0]
        if right:
            (grad,) = torch.autograd.grad(by, gate)
            torch.testing.assert_close(grad, torch.ones((), dtype=dtype))
        else:
            with pytest.raises(NotASolutionError):
                torch.autograd.grad(by, gate)


class _Once(torch.autograd.Function):
    """The identity, whose derivative has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clone()


class _Lost(torch.autograd.Function):
    """The same; the derivative of the derivative is lost without a word."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.detach().clone()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("once", [lambda x: x, _Once.apply, _Lost.apply])
@pytest.mark.parametrize("shape", ["stiff", "soft", "softer", "in units", "contraction"])
def test_one_component_of_many_is_far_off(shape: str, once: Any, dtype: torch.dtype) -> None:
    """A mean over all does not see it, and the equation of a soft one is nearly solved."""
    n, k = 40_000, 17
    torch.manual_seed(0)
    x = torch.rand(n, dtype=dtype) + 0.5
    rows = torch.ones(n, dtype=dtype)
    rows[k] = {"soft": 1e-2, "softer": 1e-5}.get(shape, 1.0)
    if shape == "in units":
        rows = 1 + 3 * torch.rand(n, dtype=dtype)
    t = (x + x**3 / 8 + x.roll(1) / 5).requires_grad_()

    def equations(x: Tensor) -> Tensor:
        return once(rows * (x + x**3 / 8 + x.roll(1) / 5 - t))

    def step(x: Tensor) -> Tensor:
        return once(t - x**3 / 8 - x.roll(1) / 5)

    decorate, fun = (fixed_point, step) if shape == "contraction" else (root, equations)

    def derivative(found: Tensor, *, check: bool) -> Tensor:
        solve = decorate(returning(found), check=check)
        return torch.autograd.grad(solve(fun, torch.full_like(x, 0.3)).sum(), t)[0]  # type: ignore[no-any-return]

    noise = torch.randn(n, dtype=dtype)
    for all_off in (0.0, 1e-5):
        found = x * (1 + all_off * noise)
        torch.testing.assert_close(
            derivative(found, check=True), derivative(x, check=False), rtol=1e-3, atol=1e-3
        )
        found[k] = 0.7 * x[k]
        with pytest.raises(NotASolutionError):
            derivative(found, check=True)


@pytest.mark.parametrize("decorate", [root, fixed_point])
@pytest.mark.parametrize(("n", "dtype"), [(700, torch.float32), (700, F64), (8000, torch.float32)])
def test_tensors_of_the_unknown_in_units_of_their_own(n: int, dtype: torch.dtype, decorate) -> None:
    """What is left of the linear system counts in their units: not next to the larger numbers."""
    torch.manual_seed(0)
    x = torch.rand(2 * n, dtype=dtype) + 0.5
    t = (x + x**3 / 8 + x.roll(1) / 5).requires_grad_()
    units = (1e-6, 1e6)

    def split(x: Tensor) -> dict[str, Tensor]:
        parts = (part * unit for part, unit in zip(x.split(n), units, strict=True))
        return dict(zip("ab", parts, strict=True))

    def fun(z: dict[str, Tensor]) -> dict[str, Tensor]:
        x = torch.cat([part / unit for part, unit in zip(z.values(), units, strict=True)])
        rest = x**3 / 8 + x.roll(1) / 5 - t
        if decorate is fixed_point:
            return split(-rest)
        return dict(zip("ab", (x + rest).split(n), strict=True))

    found = decorate(returning(split(x)))(fun, split(x.roll(1)))
    loss = sum((part / unit).sum() for part, unit in zip(found.values(), units, strict=True))
    (grad,) = torch.autograd.grad(loss, t)
    by = lambda u: (1 + 3 * x**2 / 8) * u + u.roll(-1) / 5  # the transposed system
    torch.testing.assert_close(by(grad), torch.ones_like(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e-24, 1e25])
@pytest.mark.parametrize("n", [3, 700])
def test_a_solution_of_any_size_counts_by_itself(n, size) -> None:
    """Though the squares of its components are 0 or infinite in float32."""
    a = torch.tensor(size, requires_grad=True)

    def slope(x: float) -> float:
        solve = fixed_point(returning(torch.full((n,), x)))
        found = solve(lambda x: torch.roll(x, 1) / 2 + a / 2, torch.ones(n))
        return float(torch.autograd.grad(found.sum(), a)[0])

    assert slope(size) == pytest.approx(n, rel=1e-4)
    with pytest.raises(NotASolutionError):
        slope(2 * size)
