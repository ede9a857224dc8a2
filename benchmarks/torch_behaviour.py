"""The compatibility matrix of PyTorch, for ``benchmarks.behaviour``.

Every cell solves x^2 = a for the x above zero, by a function that captures a. Not here: printing.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import freevars.torch as fv
from benchmarks._peers import installed

Solve = Callable[[Callable[[Tensor], Tensor]], Tensor]
A = 2.0
D1, D2 = 0.5 * A**-0.5, -0.25 * A**-1.5
X0 = torch.ones((), dtype=torch.float64)


def chord(fun: Any, x: Tensor) -> Tensor:
    """Newton's method with one slope for all steps, so that it takes no derivatives itself."""
    for _ in range(30):
        x = x - fun(x) / 3
    return x


def detached(fun: Any, x: Tensor) -> Tensor:
    """As a solver of a library does it, with its result off the graph."""
    return chord(fun, x).detach()


class _Rule(torch.autograd.Function):
    """The implicit rule by hand, of which the function argument is no tensor."""

    @staticmethod
    def forward(fun: Any, x0: Tensor) -> Tensor:
        return detached(fun, x0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        del ctx
        return None, torch.zeros_like(g)


_ours = fv.root(detached)
ROWS: dict[str, Solve] = {
    "freevars": lambda fun: _ours(fun, X0),
    "autograd.Function": lambda fun: _Rule.apply(fun, X0),
}
if installed("torchopt"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchopt

    def _custom_root(fun: Any) -> Tensor:
        rule = torchopt.diff.implicit.custom_root(lambda x, y: fun(x) + 0 * y, argnums=1)
        zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
        return rule(lambda x0, _: chord(fun, x0))(X0, zero)

    ROWS["torchopt custom_root"] = _custom_root
if installed("torchdeq"):
    import torchdeq

    _deq = torchdeq.get_deq(
        ift=True,
        f_solver="fixed_point_iter",
        b_solver="fixed_point_iter",
        f_max_iter=100,
        b_max_iter=100,
        f_tol=1e-12,
        b_tol=1e-12,
    )

    def _equilibrium(fun: Any) -> Tensor:
        step = lambda x: x - fun(x) / 3  # noqa: E731
        return _deq(step, X0.reshape(1, 1))[0][-1].reshape(())

    ROWS["torchdeq"] = _equilibrium
ROWS["unrolled"] = lambda fun: chord(fun, X0)


def plain(solve: Solve) -> Callable[[Tensor], Tensor]:
    return lambda a: solve(lambda x: x**2 - a)


def _a() -> Tensor:
    return torch.tensor(A, dtype=torch.float64, requires_grad=True)


def _grad(f: Callable[[Tensor], Tensor], order: int = 1) -> Tensor:
    a = _a()
    value = f(a)
    for _ in range(order):
        (value,) = torch.autograd.grad(value, a, create_graph=order > 1)
    return value


def _backward(f: Callable[[Tensor], Tensor]) -> Tensor | None:
    a = _a()
    f(a).backward()
    return a.grad


def _forward_mode(f: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        a = torch.autograd.forward_ad.make_dual(_a().detach(), torch.ones_like(_a()))
        tangent = torch.autograd.forward_ad.unpack_dual(f(a)).tangent
        return torch.zeros(()) if tangent is None else tangent


def measured(measure: Callable[[Solve], Any]) -> Callable[[Solve], Any]:
    """As a NumPy value; what has no derivative counts as zero."""

    def as_numpy(solve: Solve) -> Any:
        value = measure(solve)
        return 0.0 if value is None else value.detach().numpy()

    return as_numpy


_ROOTS = torch.tensor([1.0, A], dtype=torch.float64)
Column = tuple[Any, Callable[[Solve], Any]]
_COLUMNS: dict[str, Column] = {
    "value": (A**0.5, lambda s: plain(s)(_a().detach())),
    "backward()": (D1, lambda s: _backward(plain(s))),
    "autograd.grad": (D1, lambda s: _grad(plain(s))),
    "checkpoint": (
        D1,
        lambda s: _grad(lambda a: checkpoint(plain(s), a, use_reentrant=False)),
    ),
    "create_graph, twice": (D2, lambda s: _grad(plain(s), 2)),
    "forward_ad": (D1, lambda s: _forward_mode(plain(s))),
    "func.grad": (D1, lambda s: torch.func.grad(plain(s))(_a().detach())),
    "func.jvp": (
        D1,
        lambda s: torch.func.jvp(plain(s), (_a().detach(),), (torch.ones_like(_a()),))[1],
    ),
    "vmap(grad)": (
        0.5 * _ROOTS.numpy() ** -0.5,
        lambda s: torch.func.vmap(torch.func.grad(plain(s)))(_ROOTS),
    ),
    "func.hessian": (D2, lambda s: torch.func.hessian(plain(s))(_a().detach())),
    "in itself": (0.25 * A**-0.75, lambda s: _grad(lambda a: plain(s)(plain(s)(a)))),
}
COLUMNS = {name: (expected, measured(f)) for name, (expected, f) in _COLUMNS.items()}
