"""With the packages that people use: a plain closure gets its gradients there too."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freevars.torch import Closure, argmin, closure_convert, fixed_point, root
from tests.torch.explicit import fresh, same

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore")  # these packages' own, at import


def close(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_torchdiffeq() -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    w, y0 = fresh(2, 2), fresh(2)
    net = nn.Linear(2, 2).double()
    t = torch.linspace(0, 1, 4, dtype=F64)

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(w @ y) * t.cos() + net(y)

    tight = {"rtol": 1e-9, "atol": 1e-10}
    inputs = [w, y0, *net.parameters()]
    expected = torch.autograd.grad((torchdiffeq.odeint(field, y0, t, **tight) ** 2).sum(), inputs)

    f = Closure(field, t[0], y0)
    y = torchdiffeq.odeint_adjoint(f, y0, t, adjoint_params=f.values, **tight)
    close(torch.autograd.grad((y**2).sum(), inputs), expected)

    converted, hoisted = closure_convert(field, t[0], y0)
    y = torchdiffeq.odeint_adjoint(
        lambda t, y: converted(t, y, *hoisted), y0, t, adjoint_params=hoisted, **tight
    )
    close(torch.autograd.grad((y**2).sum(), inputs), expected)

    # What it is about: the same call with the plain closure loses them, silently.
    y = torchdiffeq.odeint_adjoint(field, y0, t, adjoint_params=(), **tight)
    assert torch.autograd.grad((y**2).sum(), w, allow_unused=True) == (None,)


class Diffusion(nn.Module):
    """What torchsde integrates: the drift is a function argument, the noise is small."""

    noise_type = "diagonal"
    sde_type = "stratonovich"

    def __init__(self, drift: Any) -> None:
        super().__init__()
        self.drift = drift

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drift(t, y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * torch.ones_like(y)


def test_torchsde() -> None:
    torchsde = pytest.importorskip("torchsde")
    w, y0, t = fresh(2), torch.ones(1, 2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)

    def drift(t: Tensor, y: Tensor) -> Tensor:
        return -w.exp() * y

    def total(integrate: Any, drift: Any, **options: Any) -> Tensor:
        noise = torchsde.BrownianInterval(0.0, 1.0, size=(1, 2), dtype=F64, entropy=3)
        step = {"bm": noise, "method": "midpoint", "dt": 1 / 64}
        y: Tensor = integrate(Diffusion(drift), y0, t, **step, **options)
        return y[-1].sum()

    # The same adjoint, where the user has found and named the captured value.
    named = total(torchsde.sdeint_adjoint, drift, adjoint_params=(w,))
    expected = torch.autograd.grad(named, w)
    through_the_steps = torch.autograd.grad(total(torchsde.sdeint, drift), w)
    torch.testing.assert_close(expected, through_the_steps, rtol=1e-2, atol=0)
    converted, hoisted = closure_convert(drift, t[0], y0)
    by_hand = lambda t, y: converted(t, y, *hoisted)
    ours = total(torchsde.sdeint_adjoint, by_hand, adjoint_params=hoisted)
    close(torch.autograd.grad(ours, w), expected)
    f = Closure(drift, t[0], y0)
    again = total(torchsde.sdeint_adjoint, f, adjoint_params=f.values)
    close(torch.autograd.grad(again, w), expected)

    # The same call with the plain closure loses it, silently.
    assert not total(torchsde.sdeint_adjoint, drift).requires_grad


def objective(x: Tensor, w: Tensor) -> Tensor:
    return ((x - w.sin()) ** 2).sum() + (x**4).sum()


def newton(fun: Any, x0: Tensor) -> Tensor:
    x = x0
    for _ in range(40):
        x = x - torch.linalg.solve(torch.func.hessian(fun)(x), torch.func.grad(fun)(x))
    return x


def test_torchopt() -> None:
    torchopt = pytest.importorskip("torchopt")
    w, x0 = fresh(3), torch.zeros(3, dtype=F64)
    converted, hoisted = closure_convert(lambda x: objective(x, w), x0)

    @torchopt.diff.implicit.custom_root(torch.func.grad(converted), argnums=1)
    def solve(x0: Tensor, h: Tensor) -> Tensor:
        return newton(lambda x: converted(x, h), x0)

    theirs = torch.autograd.grad(solve(x0, *hoisted).sum(), w)
    ours = torch.autograd.grad(argmin(newton)(lambda x: objective(x, w), x0).sum(), w)
    close(ours, theirs)

    # The same with the plain closure loses it, silently.
    @torchopt.diff.implicit.custom_root(lambda x, y: torch.func.grad(plain)(x) + 0 * y, argnums=1)
    def lossy(x0: Tensor, y: Tensor) -> Tensor:
        return newton(plain, x0)

    plain = lambda x: objective(x, w)
    lost = lossy(x0, fresh(3))
    close([lost], [newton(plain, x0)])
    assert torch.autograd.grad(lost.sum(), w, allow_unused=True) == (None,)

    # One of its optimisers as the solver, on a module as the objective.
    net = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 1)).double()

    @argmin
    def adam(fun: Any, x0: Tensor) -> Tensor:
        x = x0.clone().requires_grad_()
        optimizer = torchopt.Adam([x], lr=0.05)
        for _ in range(800):
            optimizer.zero_grad()
            fun(x).backward()
            optimizer.step()
        return x

    def energy(x: Tensor) -> Tensor:
        return net(x).square().sum() + (x**2).sum()

    parameters = list(net.parameters())
    got = torch.autograd.grad(adam(energy, x0).sum(), parameters, allow_unused=True)
    expected = torch.autograd.grad(argmin(newton)(energy, x0).sum(), parameters, allow_unused=True)
    close(got, expected)
    assert all(p.grad is None for p in parameters)


def test_xitorch() -> None:
    optimize = pytest.importorskip("xitorch.optimize")
    w, x0 = fresh(3).detach().abs().requires_grad_(), torch.zeros(3, dtype=F64)

    def residual(y: Tensor) -> Tensor:
        return y**3 + y * w - 1

    converted, hoisted = closure_convert(residual, x0)

    def explicit(y: Tensor, *values: Tensor) -> Tensor:  # it takes functions only
        return converted(y, *values)

    y = optimize.rootfinder(explicit, x0, params=hoisted, f_tol=1e-12)
    (theirs,) = torch.autograd.grad(y.sum(), w)
    expected = -y / (3 * y**2 + w)
    close([theirs], [expected.detach()])

    @root
    def solve(fun: Any, x0: Tensor) -> Tensor:
        return optimize.rootfinder(lambda y: fun(y), x0, f_tol=1e-12)

    close(torch.autograd.grad(solve(residual, x0).sum(), w), [theirs])
    # The same call with the plain closure loses it.
    assert not optimize.rootfinder(residual, x0, f_tol=1e-12).requires_grad


def test_torchdeq() -> None:
    torchdeq = pytest.importorskip("torchdeq")
    w, x, z0 = (fresh(4, 4) * 0.2).detach().requires_grad_(), fresh(2, 4), fresh(2, 4, grad=False)

    def layer(z: Tensor) -> Tensor:
        return torch.tanh(z @ w + x)

    options = {"f_solver": "fixed_point_iter", "f_max_iter": 200, "f_tol": 1e-13}
    deq = torchdeq.get_deq(
        ift=True, b_solver="fixed_point_iter", b_max_iter=200, b_tol=1e-13, **options
    )
    expected = torch.autograd.grad(deq(layer, z0)[0][-1].square().sum(), (w, x))

    @fixed_point
    def equilibrium(fun: Any, z0: Tensor) -> Tensor:
        return torchdeq.get_deq(**options)(fun, z0)[0][-1]

    close(torch.autograd.grad(equilibrium(layer, z0).square().sum(), (w, x)), expected)

    # Its own rule finds captured values in its backward pass, but loses a part of the second
    # derivative, silently. Ours is that of the unrolled iteration.
    def unrolled(z: Tensor) -> Tensor:
        for _ in range(100):
            z = layer(z)
        return z

    def twice(solution: Tensor) -> Any:
        grads = torch.autograd.grad(solution.square().sum(), (w, x), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (w, x))

    true = twice(unrolled(z0))
    close(twice(equilibrium(layer, z0)), true)
    assert not torch.allclose(twice(deq(layer, z0)[0][-1])[0], true[0], rtol=0.01)


def test_dataloader_and_module() -> None:
    """A model and its data, as an objective reads them."""
    net = nn.Linear(3, 1).double()
    data = torch.utils.data.TensorDataset(fresh(12, 3, grad=False), fresh(12, 1, grad=False))
    loader = torch.utils.data.DataLoader(data, batch_size=4)

    def loss(scale: Tensor) -> Tensor:
        return sum((net(x) * scale - y).square().sum() for x, y in loader)  # type: ignore[return-value]

    f = Closure(loss, torch.ones((), dtype=F64), hoist="differentiable")
    assert len(f.values) == 2
    scale = fresh()
    inputs = [scale, *net.parameters()]
    got = torch.autograd.grad(f(scale), inputs)
    same(got, torch.autograd.grad(loss(scale), inputs))
