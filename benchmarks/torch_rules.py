"""The rules of the PyTorch host, against the same derivative written by hand."""

import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import freevars.torch as fv
from benchmarks._peers import installed
from benchmarks._table import Row, seconds
from benchmarks._timing import alternate
from freevars.torch import closure_convert

TITLE = "PyTorch: rules, forward and backward, one thread"


class Cell(nn.Module):
    """A contraction of 2,048 unknowns: a batch of 32 with 64 features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.spectral_norm(nn.Linear(width, width))
        nn.utils.parametrize.remove_parametrizations(self.inner, "weight")
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        h = torch.tanh(0.6 * self.inner(z) + x)
        return h + 0.1 * self.norm(self.down(torch.nn.functional.gelu(self.up(h))))


def iterate(fun: Any, z: Tensor, tol: float = 1e-4) -> Tensor:
    """To a relative change of 1e-4, as for training."""
    for _ in range(100):
        previous, z = z, fun(z)
        if float((z - previous).norm()) <= tol * float(z.norm()):
            break
    return z


def hook_by_hand(cell: Cell, x: Tensor, z0: Tensor, tol: float = 1e-4) -> Tensor:
    """The usual deep-equilibrium layer: the adjoint iteration in a hook."""
    with torch.no_grad():
        z = iterate(lambda z: cell(z, x), z0)
    out = cell(z, x)
    leaf = z.clone().requires_grad_()
    f = cell(leaf, x)

    def solve(g: Tensor) -> Tensor:
        return iterate(lambda u: torch.autograd.grad(f, leaf, u, retain_graph=True)[0] + g, g, tol)

    out.register_hook(solve)
    return out


def equations(x: Tensor, a: Tensor) -> Tensor:
    first = x[..., 0] ** 2 + x[..., 1] - a[..., 0]
    return torch.stack([first, x[..., 1] ** 3 - x[..., 0] + a[..., 1]], -1)


def newton(fun: Any, x: Tensor) -> Tensor:
    """For a batch of problems with two unknowns each."""
    for _ in range(8):
        x = x.detach().requires_grad_()
        r = fun(x)
        rows = [torch.autograd.grad(r[..., i].sum(), x, retain_graph=True)[0] for i in range(2)]
        x = (x - torch.linalg.solve(torch.stack(rows, -2), r)).detach()
    return x


def batch_by_hand(a: Tensor, equations: Any = equations) -> Tensor:
    x = newton(lambda x: equations(x, a.detach()), torch.ones_like(a)).requires_grad_()
    f = equations(x, a)
    rows = [torch.autograd.grad(f[:, i].sum(), x, retain_graph=True)[0] for i in range(2)]
    u = torch.linalg.solve(torch.stack(rows, -2).mT, torch.ones_like(x))
    return torch.autograd.grad(f, a, -u)[0]


def by_torchdeq(cell: Cell, x: Tensor, z0: Tensor) -> Tensor:
    """The same layer by torchdeq, which solves the adjoint equation in a hook as well."""
    import torchdeq

    options: dict[str, Any] = {"ift": True}
    for pass_ in "fb":  # forward, backward
        options |= {f"{pass_}_solver": "fixed_point_iter", f"{pass_}_max_iter": 100}
        options |= {f"{pass_}_tol": 1e-4, f"{pass_}_stop_mode": "rel"}
    found: Tensor = torchdeq.get_deq(**options)(lambda z: cell(z, x), z0)[0][-1]
    return found


def by_torchopt(a: Tensor) -> Tensor:
    """All problems as one by torchopt, which solves the system by conjugate gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about what it uses of PyTorch
        import torchopt

        @torchopt.diff.implicit.custom_root(equations, argnums=1)
        @torch.enable_grad()
        def solve(x0: Tensor, a: Tensor) -> Tensor:
            return newton(lambda x: equations(x, a.detach()), x0)

        return torch.autograd.grad(solve(torch.ones_like(a), a).sum(), a)[0]


def rows() -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        yield from equilibria()
        yield from batches()
    finally:
        torch.set_num_threads(threads)


def equilibria() -> Iterator[Row]:
    cell, x, z0 = Cell(64), torch.randn(32, 64), torch.zeros(32, 64)
    for name, check in (("with its check", True), ("check=False", False)):
        layer = fv.fixed_point(iterate, check=check)

        def ours(layer: Any = layer) -> object:
            z = layer(lambda z: cell(z, x), z0)
            return torch.autograd.grad(z.square().sum(), list(cell.parameters()))

        def by_hand(tol: float = 1e-4) -> object:
            z = hook_by_hand(cell, x, z0, tol)
            return torch.autograd.grad(z.square().sum(), list(cell.parameters()))

        def as_closely(by_hand: Any = by_hand) -> object:
            closure_convert(lambda z: cell(z, x), z0)
            return by_hand(torch.finfo(z0.dtype).eps ** 0.75)

        def peer() -> object:
            z = by_torchdeq(cell, x, z0)
            return torch.autograd.grad(z.square().sum(), list(cell.parameters()))

        peers = {"by hand, solved as closely, and a conversion": as_closely}
        if installed("torchdeq"):
            peers["torchdeq"] = peer
        yield _row(f"deep equilibrium of 2,048 unknowns, {name}", 2.0, by_hand, ours, peers)


def batches() -> Iterator[Row]:
    a = (torch.rand(256, 2, dtype=torch.float64) + 0.5).requires_grad_()
    solve = fv.root(newton, batch_dims=1)

    def batch() -> object:
        found = solve(lambda x: equations(x, a), torch.ones_like(a))
        return torch.autograd.grad(found.sum(), a)

    def vmapped() -> object:
        def one(a: Tensor) -> Any:
            return solve(lambda x: equations(x, a[None]), torch.ones(1, 2, dtype=a.dtype))

        return torch.autograd.grad(torch.func.vmap(one)(a).sum(), a)

    def mapped() -> object:
        return batch_by_hand(a, torch.func.vmap(equations))

    hand = functools.partial(batch_by_hand, a)
    others = {"torchopt": lambda: by_torchopt(a)} if installed("torchopt") else {}
    yield _row("256 problems of 2 unknowns, batch_dims=1", 3.0, hand, batch, others)
    floor = {"by hand, the function mapped": mapped}
    yield _row("the same, under torch.func.vmap", 3.0, hand, vmapped, floor)


def _row(name: str, target: float, by_hand: Any, ours: Any, others: Mapping[str, Any]) -> Row:
    """`others`: libraries, and what has to be done in any case."""
    timing = alternate(by_hand, ours, *others.values())
    hand, own, *_ = (seconds(s) for s in timing.seconds)
    peers = tuple(zip(others, timing.ratios[2:], strict=True))
    return Row(name, timing.ratios[1], target, hand, own, peers)
