"""A first derivative comes from what was recorded at the solution; the rest is compared with it."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from freevars.torch import (
    CaptureError,
    NotASolutionError,
    StructureError,
    argmin,
    closure_convert,
    fixed_point,
    root,
)
from tests.torch.explicit import fresh

f = torch.func
F64 = torch.float64
ONES = torch.ones(2, dtype=F64)


@fixed_point
def iterate(fun: Any, x0: Tensor) -> Tensor:
    return functools.reduce(lambda x, _: fun(x), range(80), x0)


@root
def newton(fun: Any, x0: Tensor) -> Tensor:
    x = x0
    for _ in range(30):
        x = x - torch.linalg.solve(f.jacrev(fun)(x), fun(x))
    return x


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=F64)


def test_the_function_does_not_run_in_the_backward_pass() -> None:
    a, runs = fresh(3), 0

    def fun(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return x**3 + x - a

    x = newton(fun, zeros(3))
    before = runs
    for _ in range(2):
        (g,) = torch.autograd.grad(x.sum(), a, retain_graph=True)
    assert runs == before
    torch.testing.assert_close(g, 1 / (3 * x.detach() ** 2 + 1))
    torch.autograd.grad(x.sum(), a, create_graph=True)
    assert runs > before


@pytest.mark.parametrize("nested", [False, True])
def test_nor_does_it_under_vmap(nested) -> None:
    """Once for the whole batch, to any of a loop's variables; higher orders compare."""
    a, b, runs, power = fresh(2, 3, 2), fresh(2), 0, 3

    def one(a: Tensor) -> Tensor:
        def fun(x: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            return x**power + x * b.exp() - a

        return newton(fun, zeros(2))

    def solve() -> Tensor:
        return f.vmap(f.vmap(one))(a) if nested else f.vmap(one)(a[0])

    def exact(x: Tensor, power: int) -> tuple[Tensor, Tensor]:
        slope = power * x ** (power - 1) + b.detach().exp()
        return 1 / slope, (-x * b.detach().exp() / slope).reshape(-1, 2).sum(0)

    xs = [solve()]
    power = 5
    xs.append(solve())
    before = runs
    got = torch.autograd.grad(sum(x.sum() for x in xs), [a, b], retain_graph=True)
    assert runs == before
    wanted = [exact(x.detach(), p) for x, p in zip(xs, (3, 5), strict=True)]
    by_a = sum(w for w, _ in wanted)
    torch.testing.assert_close(got[0] if nested else got[0][0], by_a)
    torch.testing.assert_close(got[1], sum(w for _, w in wanted))
    again = torch.autograd.grad(xs[1].sum(), [a, b], create_graph=True)
    assert runs > before
    torch.testing.assert_close(again[1], wanted[1][1])
    with pytest.raises(NotASolutionError, match="as it was when the solver returned"):
        torch.autograd.grad(xs[0].sum(), [a, b], create_graph=True)


def test_loops_with_one_backward_pass_at_the_end() -> None:
    b, data = number(1.0), [zeros(()) + k for k in (1, 2, 3)]
    weights = [number(1.0), number(4.0)]
    xs = [iterate(lambda x: x / 2 + k * b, zeros(())) for k in range(1, 4)]
    for d in data:
        xs.append(iterate(lambda x: x / 2 + d * b, zeros(())))  # noqa: PERF401
    assert float(torch.autograd.grad(sum(xs), b)[0]) == pytest.approx(24)
    xs = []
    for w in weights:
        xs.append(newton(lambda x: x**2 - w, torch.ones(1, dtype=F64)))
    got = torch.autograd.grad(sum(xs), weights)
    assert [float(g) for g in got] == pytest.approx([0.5, 0.25])


class Conditioned(nn.Module):
    """Keeps its input, its mode and a buffer, and is called twice before the backward pass."""

    scale: Tensor
    given: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3).double()
        self.register_buffer("scale", torch.ones(1, dtype=F64))

    def forward(self, z: Tensor) -> Tensor:
        factor = 0.5 if self.training else 0.1
        return factor * torch.tanh(self.linear(z) * 0.3 + self.given * self.scale)


def test_state_that_moves_between_the_passes() -> None:
    cell, inputs = Conditioned(), [fresh(3), fresh(3)]

    def run(solve: Any) -> Any:
        total = 0
        for k, given in enumerate(inputs):
            cell.given = given
            cell.scale = torch.full((1,), k + 1.0, dtype=F64)
            cell.train(k == 0)
            total = total + solve(cell, zeros(3)).square().sum()
        return torch.autograd.grad(total, [*inputs, *cell.parameters()])

    torch.testing.assert_close(run(iterate), run(iterate.__wrapped__), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("batched", [False, True])
def test_a_small_constant_is_as_it_was_and_a_large_one_raises_the_error_of_pytorch(batched) -> None:
    for n, works in ((4, True), (100_000, False)):
        b, c = fresh(n), torch.full((n,), 2.0, dtype=F64)
        one = lambda b: iterate(lambda x: x / 2 + b * c, zeros(n))
        x = f.vmap(one)(b[None]) if batched else one(b)
        c.fill_(7)
        if works:
            torch.testing.assert_close(torch.autograd.grad(x.sum(), b)[0], torch.full_like(b, 4))
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(x.sum(), b)
    w = fresh(3)
    x = iterate(lambda x: x / 2 + w**2, zeros(3))
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(x.sum(), w)


def test_modes_are_those_of_the_forward_pass() -> None:
    linear, seen = nn.Linear(2, 2), []

    class Cast(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    def cell(z: Tensor) -> Tensor:
        return 0.3 * Cast.apply(linear(z)).float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = iterate(cell, torch.zeros(2))
    seen.clear()
    torch.autograd.grad(z.sum(), linear.bias)
    assert not seen


@pytest.mark.parametrize("batched", [False, True])
def test_what_is_evaluated_again_runs_under_the_autocast_of_the_call(batched) -> None:
    def solve(a: Tensor) -> Tensor:
        def cell(x: Tensor) -> Tensor:
            return (0.5 if torch.is_autocast_enabled("cpu") else 0.25) * x + a**3

        return iterate(cell, torch.zeros(a.shape, dtype=F64))

    run = f.vmap(solve) if batched else solve
    for on, scale in ((True, 0.5), (False, 0.25)):
        a = fresh(2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            x, (value, pull) = run(a), f.vjp(run, a.detach())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not on):
            (first,) = torch.autograd.grad(x.sum(), a, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), a)
            pulled = pull(torch.ones_like(value))[0]
        torch.testing.assert_close(first, 3 * a**2 / (1 - scale))
        torch.testing.assert_close(second, 6 * a / (1 - scale))
        torch.testing.assert_close(pulled, first.detach())


def test_a_function_without_a_second_derivative_and_its_check() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3 + x - b

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Any:
            (x,) = ctx.saved_tensors
            return (3 * x**2 + 1) * g, -g

    for n in (5, 600):
        b = torch.linspace(1, 2, n, dtype=F64).requires_grad_()
        x = root(lambda fun, x0: x0)(lambda x: Cube.apply(x, b), torch.full((n,), 3.0, dtype=F64))
        with pytest.raises(NotASolutionError, match="did not converge"):
            torch.autograd.grad(x.sum(), b)
        solved = b.detach().clone()
        for _ in range(60):
            solved = solved - (solved**3 + solved - b.detach()) / (3 * solved**2 + 1)
        x = root(lambda fun, x0: solved)(lambda x: Cube.apply(x, b), zeros(n))
        (g,) = torch.autograd.grad(x.sum(), b)
        torch.testing.assert_close(g, 1 / (3 * solved**2 + 1))


CHANGES: dict[str, Any] = {
    "a value": (1.0, 2.0, lambda x, a, k: x - k * a),
    "the sign of a zero": (0.0, -0.0, lambda x, a, k: x - a + torch.full_like(x, k).atan2(-ONES)),
    "only a derivative": (1.0, 2.0, lambda x, a, k: x - a - k * (a - a.detach())),
}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_evaluated_again_is_compared_with_what_was_recorded(name, batched) -> None:
    before, after, fun = CHANGES[name]
    solve = root(lambda fun, x0: x0 - fun(x0))
    a, k = fresh(2), [before]

    def solved(a: Tensor) -> Tensor:
        return solve(lambda x: fun(x, a, k[0]), zeros(2))

    x = f.vmap(solved)(a[None]) if batched else solved(a)
    (right,) = torch.autograd.grad(x.sum(), a, create_graph=True)
    k[0] = after
    (first,) = torch.autograd.grad(x.sum(), a, retain_graph=True)
    torch.testing.assert_close(first, right.detach())  # as recorded
    with pytest.raises(NotASolutionError, match=r"then (and is|has changed by) .* now"):
        torch.autograd.grad(x.sum(), a, create_graph=True)


def test_dropout_draws_once_for_each_solve() -> None:
    b, drop = number(1.0), nn.Dropout(0.5)
    torch.manual_seed(0)
    ones = torch.ones(8, dtype=F64)
    xs = [iterate(lambda x: x / 2 + drop(ones) * b, zeros(8)) for _ in range(3)]
    for x in xs:
        assert set(x.detach().tolist()) <= {0.0, 4.0}  # one mask from the first step to the last
        again = [torch.autograd.grad(x.sum(), b, retain_graph=True)[0] for _ in range(2)]
        torch.testing.assert_close(again, [x.detach().sum()] * 2)
    assert len({tuple(x.tolist()) for x in xs}) == 3
    following = torch.rand(1)
    torch.manual_seed(0)
    for _ in range(3):
        drop(ones)
    assert torch.equal(following, torch.rand(1))  # as if each solve had drawn once
    strict = fixed_point(iterate.__wrapped__, rng="error")
    with pytest.raises(TypeError, match="without randomness"):
        strict(lambda x: x / 2 + drop(ones) * b, zeros(8))


def test_a_first_derivative_flows_into_whatever_the_graph_reaches() -> None:
    """A hook on a captured tensor sees the gradient, a derived tensor passes it on, and
    `.backward()` accumulates where it should."""
    leaf, seen = fresh(3), []
    derived = leaf.exp()
    derived.register_hook(seen.append)
    x = argmin(lambda fun, x0: derived.detach())(lambda x: ((x - derived) ** 2).sum(), zeros(3))
    x.sum().backward()
    torch.testing.assert_close(leaf.grad, leaf.detach().exp())
    assert len(seen) == 1


def test_a_second_derivative_where_one_captured_tensor_is_computed_from_another() -> None:
    a = fresh(3)
    derived = a.exp()
    x = newton(lambda x: x**3 + x * derived - a, zeros(3))
    exact = lambda a: f.vmap(lambda a: newton(lambda x: x**3 + x * a.exp() - a, zeros(1))[0])(a)
    for inputs in (a, derived):
        assert torch.autograd.grad(x.sum(), inputs, create_graph=True)[0].shape == (3,)
    (g,) = torch.autograd.grad(x.sum(), a, create_graph=True)
    (gg,) = torch.autograd.grad((g * ONES[0]).square().sum(), a)
    torch.testing.assert_close(
        gg, f.grad(lambda a: f.grad(lambda a: exact(a).sum())(a).square().sum())(a.detach())
    )


def test_transforms_of_torch_func_inside_beside_constants() -> None:
    """What keeps constants as they are must not be in the way of a transform."""
    w = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)
    c = torch.tensor([1.0, 2.0], dtype=torch.float64)

    @root
    def newton(fun: Any, x0: Tensor) -> Tensor:
        for _ in range(3):
            x0 = x0 - torch.linalg.solve(torch.func.jacrev(fun)(x0), fun(x0))
        return x0

    def slope(x: Tensor) -> Any:
        return torch.func.grad(lambda y: (w * y**2 + (y - c) ** 2 / 2).sum())(x)

    x = newton(slope, torch.zeros(2, dtype=torch.float64))
    (g,) = torch.autograd.grad(x.sum(), w)
    assert torch.allclose(x, c / (2 * w + 1))
    assert torch.allclose(g, -2 * c / (2 * w + 1) ** 2)


def test_statistics_of_the_batch_that_nothing_keeps() -> None:
    """What the refusal of a batch norm in train mode says to do, and that it is right."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(2, dtype=F64)
    norm.weight.data.fill_(0.2)
    x, before = torch.randn(4, 2, dtype=F64), norm.running_mean.clone()

    def total(weight: Tensor) -> Tensor:
        def fun(z: Tensor) -> Tensor:
            return x + weight * nn.functional.batch_norm(z.sin(), None, None, training=True)

        return (iterate(fun, zeros(4, 2)) ** 2).sum()

    def by_module() -> Tensor:
        return (iterate(lambda z: x + norm(z.sin()), zeros(4, 2)) ** 2).sum()

    with pytest.raises(CaptureError, match="track_running_stats = False") as refused:
        by_module()
    assert "norm.num_batches_tracked" in str(refused.value)
    norm.track_running_stats = False
    (g,) = torch.autograd.grad(by_module(), norm.weight)
    weight, h = norm.weight.detach(), 1e-5
    steps = h * torch.eye(2, dtype=F64)
    differences = [float(total(weight + s) - total(weight - s)) / (2 * h) for s in steps]
    assert g.tolist() == pytest.approx(differences, rel=1e-6)
    assert torch.equal(norm.running_mean, before)


def halves(scale: Tensor) -> Any:
    return lambda z: (scale * z).tanh() / 2 + scale


def test_a_result_may_be_written_to() -> None:
    """As what the last operation of a layer returns: a residual connection, in place."""
    scale = fresh(2)
    plain = iterate(halves(scale), zeros(2))
    written = iterate(halves(scale), zeros(2))
    written += scale
    written.mul_(3)
    right = torch.autograd.grad((3 * (plain + scale)).sum(), scale)[0]
    torch.testing.assert_close(torch.autograd.grad(written.sum(), scale)[0], right)


def test_what_was_made_in_inference_mode_may_be_given() -> None:
    scale = fresh(2)

    @fixed_point
    def solve(fun: Any, x0: Tensor, *args: Tensor) -> Tensor:
        return functools.reduce(lambda x, _: fun(x, *args), range(80), x0)

    def slope(x0: Tensor, given: Tensor) -> Tensor:
        x = solve(lambda x, c: torch.nn.functional.linear(x, torch.diag(scale) / 3) + c, x0, given)
        return torch.autograd.grad(x.sum(), scale)[0]

    with torch.inference_mode():
        made = zeros(2), ONES.clone()
    assert torch.equal(slope(*made), slope(zeros(2), ONES))


def test_a_result_of_the_precision_of_autocast_says_how_to_cast_it() -> None:
    net = nn.Linear(2, 2)
    with torch.autocast("cpu"):
        with pytest.raises(StructureError, match=r"got bfloat16\[2\]. Cast it: .to\(torch.float32"):
            iterate(lambda x: net(x) / 4, torch.zeros(2))
        x = iterate(lambda x: (net(x) / 4).to(torch.float32), torch.zeros(2))
    x.sum().backward()
    assert net.weight.grad is not None


def test_a_solver_may_differentiate_by_its_start_in_inference_mode() -> None:
    @root
    def by_autograd(fun: Any, x0: Tensor) -> Tensor:
        x = x0
        for _ in range(8):
            x = x.detach().requires_grad_()
            value = fun(x)
            x = x - value / torch.autograd.grad(value.sum(), x)[0]
        return x.detach()

    with torch.inference_mode():
        x = by_autograd(lambda x: x**2 - 4, ONES.clone())
    torch.testing.assert_close(x.clone(), 2 * ONES)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_is_named() -> None:
    scale = fresh(2)

    def layer(x0: Tensor) -> Tensor:
        return iterate(lambda z: checkpoint(halves(scale), z, use_reentrant=True), x0)

    converted, _ = closure_convert(layer, zeros(2))
    for x in (layer(zeros(2)), converted(zeros(2), fresh(2))):
        with pytest.raises(CaptureError, match=r"iterate: .* Call checkpoint with use_reentrant="):
            x.sum().backward()


@pytest.mark.parametrize("batched", [False, True])
def test_the_pullback_of_vjp_may_run_when_its_transform_is_over(batched) -> None:
    u, w = fresh(2).exp().detach().requires_grad_(), fresh(3, 2).exp().detach()

    def solve(w: Tensor) -> Tensor:
        return newton(lambda x: u * x**2 - w, ONES)

    w = w if batched else w[0]
    x, pullback = f.vjp(f.vmap(solve) if batched else solve, w)
    (g,) = pullback(torch.ones_like(x))
    torch.testing.assert_close(g, 0.5 * (u * w) ** -0.5)  # x = sqrt(w / u)
    (by_u,) = torch.autograd.grad(g.sum(), u)
    torch.testing.assert_close(by_u, (-0.25 * u**-1.5 * w**-0.5).reshape(-1, 2).sum(0).detach())
