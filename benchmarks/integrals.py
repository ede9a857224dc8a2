"""Gradients of integrals and of solutions of differential equations, in both hosts.

The baselines are written by hand: Leibniz' rule, and the adjoint of the same library with explicit
arguments. What a check costs shows in the row that leaves it out. Peers run where they are
installed.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.experimental import ode
from torch import Tensor, nn

import freevars.jax as fv
import freevars.torch as fvt
from benchmarks._peers import installed
from benchmarks._table import Row, seconds
from benchmarks._timing import alternate

TITLE = "integrals: gradients of integrals and of differential equations"

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)
TS = np.linspace(0.0, 5.0, 11)
TOLERANCES = {"rtol": 1e-6, "atol": 1e-8}


def gauss(f: Any, a: Any, b: Any) -> Any:
    values = jax.vmap(f)((a + b) / 2 + (b - a) / 2 * NODES)
    return jax.tree.map(lambda v: (b - a) / 2 * jnp.tensordot(WEIGHTS, v, 1), values)


def integrand(t: Any, w: Any) -> Any:
    return jnp.sum(jnp.sin(jnp.arange(1, w.size + 1) * w * t))


@jax.custom_vjp
def integral_by_hand(w: Any) -> Any:
    return gauss(lambda t: integrand(t, w), 0.0, 1.0)


integral_by_hand.defvjp(
    lambda w: (integral_by_hand(w), w),
    lambda w, g: (gauss(lambda t: g * jax.grad(integrand, 1)(t, w), 0.0, 1.0),),
)


def of_integrals() -> Iterator[Row]:
    w = jnp.linspace(0.1, 1.0, 20)
    hand = jax.jit(jax.grad(integral_by_hand))
    for name, how, target in (
        ("with its check", {}, 3.0),
        ("check=False", {"check": False}, 1.3),
    ):
        solve: Any = fv.integral(gauss, takes="array", **how)
        ours = jax.jit(
            jax.grad(lambda w, solve=solve: solve(lambda t: integrand(t, w)[None], 0.0, 1.0)[0])
        )
        np.testing.assert_allclose(ours(w), hand(w), rtol=1e-6)
        yield _row(f"a rule of 64 nodes, 20 parameters, jit, {name}", target, hand, ours, w)


def field(y: Any, t: Any, w: Any) -> Any:
    return jnp.tanh(w @ y) * jnp.cos(t)


def of_equations() -> Iterator[Row]:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)) / 3)
    y0, ts = jnp.ones(8), jnp.asarray(TS)

    def gradient(last: Callable[[Any], Any]) -> Any:
        return jax.jit(jax.grad(lambda w: jnp.sum(last(w) ** 2)))

    def explicit(w: Any) -> Any:
        return ode.odeint(field, y0, ts, w, **TOLERANCES)[-1]

    solve = fv.odeint(functools.partial(ode.odeint, **TOLERANCES), tfirst=False)
    hand = gradient(explicit)
    ours = gradient(lambda w: solve(lambda y, t: field(y, t, w), y0, ts)[-1])
    np.testing.assert_allclose(ours(w), hand(w), rtol=1e-4)
    yield _row("jax.experimental.ode, jit, adjoint", 1.5, hand, ours, w)
    if installed("diffrax"):
        yield from _by_diffrax(w, y0, ts, gradient)


def _by_diffrax(w: Any, y0: Any, ts: Any, gradient: Any) -> Iterator[Row]:
    import diffrax

    def run(f: Any, y0: Any, ts: Any, args: Any = None, **how: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(f),
            diffrax.Tsit5(),
            ts[0],
            ts[-1],
            None,
            y0,
            args,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(**TOLERANCES),
            **how,
        ).ys

    def by(adjoint: Any) -> Any:
        explicit = lambda t, y, w: field(y, t, w)  # noqa: E731
        return gradient(lambda w: run(explicit, y0, ts, w, adjoint=adjoint)[-1])

    solve = fv.odeint(lambda f, y0, ts: run(lambda t, y, _: f(t, y), y0, ts))
    hand = by(diffrax.BacksolveAdjoint())
    recorded = by(diffrax.RecursiveCheckpointAdjoint())
    ours = gradient(lambda w: solve(lambda t, y: field(y, t, w), y0, ts)[-1])
    np.testing.assert_allclose(ours(w), recorded(w), rtol=1e-3)
    yield _row(
        "diffrax, jit, against BacksolveAdjoint",
        1.5,
        hand,
        ours,
        w,
        {"RecursiveCheckpointAdjoint": recorded},
    )


class Field(nn.Module):
    """What torchdiffeq's adjoint takes: a module, since it looks for parameters."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.w @ y) * torch.cos(t)


def of_equations_in_torch() -> Iterator[Row]:
    if not installed("torchdiffeq"):
        return
    import torchdiffeq

    start = torch.tensor(np.random.default_rng(0).normal(size=(8, 8)) / 3)
    module, w = Field(start), start.clone().requires_grad_()
    y0, ts = torch.ones(8, dtype=torch.float64), torch.tensor(TS)
    solve: Any = fvt.odeint(functools.partial(torchdiffeq.odeint, **TOLERANCES))

    def by_module(run: Any) -> Any:
        total = run(module, y0, ts, **TOLERANCES)[-1].square().sum()
        return torch.autograd.grad(total, module.w)[0]

    def ours() -> Any:
        ys = solve(lambda t, y: torch.tanh(w @ y) * torch.cos(t), y0, ts)
        return torch.autograd.grad(ys[-1].square().sum(), w)[0]

    hand = functools.partial(by_module, torchdiffeq.odeint_adjoint)
    recorded = functools.partial(by_module, torchdiffeq.odeint)
    torch.testing.assert_close(ours(), recorded(), rtol=1e-3, atol=1e-5)
    timing = alternate(hand, ours, recorded, budget=4.0)
    yield Row(
        "torchdiffeq, against odeint_adjoint of a module",
        timing.ratios[1],
        1.5,
        *map(seconds, timing.seconds[:2]),
        (("odeint, recorded", timing.ratios[2]),),
    )


def rows() -> Iterator[Row]:
    with jax.enable_x64(True):
        yield from of_integrals()
        yield from of_equations()
    yield from of_equations_in_torch()


def _row(
    name: str, target: float, hand: Any, ours: Any, w: Any, peers: dict[str, Any] | None = None
) -> Row:
    sides = [hand, ours, *(peers or {}).values()]
    timing = alternate(*(lambda f=f: jax.block_until_ready(f(w)) for f in sides), budget=3.0)
    base, own, *_ = map(seconds, timing.seconds)
    return Row(
        name,
        timing.ratios[1],
        target,
        base,
        own,
        tuple(zip(peers or {}, timing.ratios[2:], strict=True)),
    )
