"""Gradients of a quadratic program in PyTorch, against its Karush-Kuhn-Tucker system by hand.

    min x^T Q x / 2 + c^T x   with   A x = b,  G x <= h

Clarabel solves it for both sides; cvxpylayers and qpth are peers where they are installed, and have
solvers of their own. All gradients are compared before anything is timed.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import clarabel
import numpy as np
import scipy.sparse
import torch
from torch import Tensor

import freevars.torch as fv
from benchmarks._peers import installed
from benchmarks._table import Row, seconds
from benchmarks._timing import alternate

TITLE = "PyTorch: the gradient of a quadratic program of 8 unknowns, by all that states it"

N, EQUAL, LESS = 8, 2, 6
MANY = 64
ACTIVE = 1e-6  # a multiplier above it


def program(seed: int) -> list[Tensor]:
    """Q, c, A, b, G, h; about half of the inequalities hold as equations."""
    rng = np.random.default_rng(seed)
    root, x = rng.normal(size=(N, N)) + 2 * np.eye(N), rng.normal(size=N)
    a, g = rng.normal(size=(EQUAL, N)), rng.normal(size=(LESS, N))
    h = g @ x + 0.3 * rng.uniform(size=LESS)
    parts = (root.T @ root, 3 * rng.normal(size=N), a, a @ x, g, h)
    return [torch.tensor(part) for part in parts]


def solve(q: Tensor, c: Tensor, a: Tensor, b: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, Any]:
    """x, and the multipliers of the rows of A and G."""
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    rows = scipy.sparse.csc_matrix(torch.cat([a, g]).numpy())
    upper = scipy.sparse.triu(scipy.sparse.csc_matrix(q.numpy())).tocsc()
    cones = [clarabel.ZeroConeT(EQUAL), clarabel.NonnegativeConeT(LESS)]
    right = torch.cat([b, h]).numpy()
    found = clarabel.DefaultSolver(upper, c.numpy(), rows, right, cones, settings).solve()
    return torch.tensor(np.array(found.x)), torch.tensor(np.array(found.z))


class ByHand(torch.autograd.Function):
    """The adjoint of the system of the active rows, with the multipliers that Clarabel returns."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        x, z = solve(*parts)
        ctx.save_for_backward(x, z, *parts)
        return x

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        x, z, q, _, a, _, g, _ = ctx.saved_tensors
        active = torch.cat([torch.ones(EQUAL, dtype=torch.bool), z[EQUAL:] > ACTIVE])
        rows = torch.cat([a, g])[active]
        zero = torch.zeros(len(rows), len(rows), dtype=x.dtype)
        system = torch.cat([torch.cat([q, rows.T], 1), torch.cat([rows, zero], 1)])
        right = torch.cat([-cotangents[0], zero[0]])
        u = torch.linalg.solve(system, right)
        v = torch.zeros_like(z)
        v[active] = u[N:]
        by_rows = torch.outer(v, x) + torch.outer(z, u[:N])
        by_q = torch.outer(u[:N], x)
        return by_q, u[:N], by_rows[:EQUAL], -v[:EQUAL], by_rows[EQUAL:], -v[EQUAL:]


@fv.argmin
def by_clarabel(fun: Any, x0: Tensor, *, equality: Any, inequality: Any, parts: Any) -> Tensor:
    del fun, x0, equality, inequality  # the matrices say the same
    return solve(*parts)[0]


def ours(q: Tensor, c: Tensor, a: Tensor, b: Tensor, g: Tensor, h: Tensor) -> Tensor:
    return by_clarabel(
        lambda x: x @ q @ x / 2 + c @ x,
        torch.zeros(N, dtype=c.dtype),
        equality=lambda x: a @ x - b,
        inequality=lambda x: h - g @ x,
        parts=tuple(t.detach() for t in (q, c, a, b, g, h)),
    )


# --- Many programs at once ------------------------------------------------------------------------


def solve_each(*parts: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum and the multipliers of each program of a batch, one after the other."""
    found = [solve(*one) for one in zip(*parts, strict=True)]
    xs, zs = zip(*found, strict=True)
    return torch.stack(xs), torch.stack(zs)


class EachByHand(torch.autograd.Function):
    """The same for a batch: rows that are not active are rows of the identity."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        x, z = solve_each(*parts)
        ctx.save_for_backward(x, z, *parts)
        return x

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        x, z, q, _, a, _, g, _ = ctx.saved_tensors
        active = (z > ACTIVE).to(x.dtype)
        active[:, :EQUAL] = 1
        rows = torch.cat([a, g], 1) * active[..., None]
        upper = torch.cat([q, rows.mT], 2)
        system = torch.cat([upper, torch.cat([rows, torch.diag_embed(1 - active)], 2)], 1)
        u = torch.linalg.solve(system, torch.cat([-cotangents[0], torch.zeros_like(z)], 1))
        u, v = u[:, :N], u[:, N:] * active
        by_rows = v[..., None] * x[:, None] + z[..., None] * u[:, None]
        by_q = u[..., None] * x[:, None]
        return by_q, u, by_rows[:, :EQUAL], -v[:, :EQUAL], by_rows[:, EQUAL:], -v[:, EQUAL:]


@fv.argmin(batch_dims=1)
def each_by_clarabel(fun: Any, x0: Tensor, *, equality: Any, inequality: Any, parts: Any) -> Tensor:
    del fun, x0, equality, inequality
    return solve_each(*parts)[0]


def ours_each(q: Tensor, c: Tensor, a: Tensor, b: Tensor, g: Tensor, h: Tensor) -> Tensor:
    def times(m: Tensor, x: Tensor) -> Tensor:
        return (m @ x[..., None])[..., 0]

    return each_by_clarabel(
        lambda x: (x * times(q, x)).sum(1) / 2 + (c * x).sum(1),
        torch.zeros_like(c),
        equality=lambda x: times(a, x) - b,
        inequality=lambda x: h - times(g, x),
        parts=tuple(t.detach() for t in (q, c, a, b, g, h)),
    )


# --- All of them ----------------------------------------------------------------------------------


def peers() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    if installed("qpth") and installed("cvxpy"):  # which it imports
        from qpth.qp import QPFunction

        yield (
            "qpth",
            lambda q, c, a, b, g, h: QPFunction(verbose=-1, eps=1e-13, maxIter=50)(
                q, c, g, h, a, b
            ).reshape(c.shape),
        )
    if installed("cvxpylayers"):
        import cvxpy as cp
        from cvxpylayers.torch import CvxpyLayer

        shapes = ((N, N), N, (EQUAL, N), EQUAL, (LESS, N), LESS)
        x, parts = cp.Variable(N), [cp.Parameter(shape) for shape in shapes]
        root, c, a, b, g, h = parts
        cost = cp.Minimize(cp.sum_squares(root @ x) / 2 + c @ x)
        layer = CvxpyLayer(cp.Problem(cost, [a @ x == b, g @ x <= h]), parts, [x])
        how = {"eps": 1e-10, "max_iters": 100_000}
        # It takes a root of Q, and no Q that varies.
        yield (
            "cvxpylayers",
            lambda q, *rest: layer(torch.linalg.cholesky(q).mT, *rest, solver_args=how)[0],
        )


def gradient(solver: Callable[..., Tensor], parts: list[Tensor]) -> list[Tensor]:
    leaves = [part.clone().requires_grad_() for part in parts]
    total = torch.sin(solver(*leaves)).sum()
    found = list(torch.autograd.grad(total, leaves))
    found[0] = (found[0] + found[0].mT) / 2  # Q is symmetric
    return found


def row(case: str, parts: list[Tensor], solvers: dict[str, Callable[..., Tensor]]) -> Row:
    """The first of the solvers is the baseline, the second one ours."""
    sides = [lambda f=f: gradient(f, parts) for f in solvers.values()]
    timing = alternate(*sides, budget=4.0)
    base, own, *_ = map(seconds, timing.seconds)
    told = tuple(zip(list(solvers)[2:], timing.ratios[2:], strict=True))
    return Row(case, timing.ratios[1], 10.0, base, own, told)


def rows() -> Iterator[Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers', about themselves
        others = dict(peers())
        programs = [program(seed) for seed in range(MANY)]
        batch = [torch.stack(parts) for parts in zip(*programs, strict=True)]
        one = {"by hand": ByHand.apply, "freevars": ours, **others}
        each = {"by hand": EachByHand.apply, "freevars": ours_each, **others}
        expected = [gradient(ByHand.apply, parts) for parts in programs]
        for solver in one.values():
            for parts, right in zip(programs[:20], expected, strict=False):
                _compare(gradient(solver, parts), right)
        for solver in each.values():
            _compare(gradient(solver, batch), map(torch.stack, zip(*expected, strict=True)))
        yield row("one program, forward and backward", programs[0], one)
        yield row(f"{MANY} programs in a batch, batch_dims=1", batch, each)


def _compare(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for got, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4)
