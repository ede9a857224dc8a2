"""Differential equations: the adjoint equation and forward sensitivities against closed forms, and
against torchdiffeq's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.integrate
import torch
from torch import Tensor

import freevars.torch as fv
from freevars.errors import NotASolutionError, StructureError
from freevars.torch._compat import pytree
from tests.torch.rules.test_integral import TRANSFORMATIONS

f = torch.func
F64 = torch.float64
ARGS = tuple(torch.tensor(x, dtype=F64) for x in (1.3, [0.5, 0.2], [0.1, 0.6, 1.0]))
WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=F64)


def rk4(field: Any, y0: Tensor, ts: Tensor, steps: int = 8) -> Tensor:
    ys = [y0]
    for t0, h in zip(ts[:-1], ts.diff() / steps, strict=True):
        y = ys[-1]
        for k in range(steps):
            t = t0 + k * h
            k1 = field(t, y)
            k2 = field(t + h / 2, y + h / 2 * k1)
            k3 = field(t + h / 2, y + h / 2 * k2)
            k4 = field(t + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * (k2 + k3) + k4)
        ys.append(y)
    return torch.stack(ys)


def oscillator(solve: Any, w: Tensor, y0: Tensor, ts: Tensor) -> Tensor:
    ys = solve(lambda t, y: torch.stack([y[1], -(w**2) * y[0]]), y0, ts)
    return (ys[:, 0] * WEIGHTS[: len(ts)]).sum()


def exact(w: Tensor, y0: Tensor, ts: Tensor) -> Tensor:
    t = ts - ts[0]
    return ((y0[0] * torch.cos(w * t) + y0[1] / w * torch.sin(w * t)) * WEIGHTS[: len(ts)]).sum()


SLOW = {"reverse over reverse", "forward over reverse", "vmap", "vmap of the captured"}


@pytest.mark.parametrize("reverse", ["adjoint", "sensitivities"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(t, marks=[pytest.mark.slow] if t in SLOW else []) for t in TRANSFORMATIONS],
)
def test_equals_the_closed_form(name, reverse) -> None:
    transform, solve = TRANSFORMATIONS[name], fv.odeint(rk4, reverse=reverse)
    got = transform(lambda *args: oscillator(solve, *args), *ARGS)
    torch.testing.assert_close(got, transform(exact, *ARGS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "ts",
    [[1.0, 0.6, 0.1], [0.4], [0.1, 0.1, 0.8], [0.8, 0.8]],
    ids=["back", "one", "twice", "still"],
)
def test_times(ts) -> None:
    """Decreasing, one alone, repeated; and the derivative by each of them."""
    args = (*ARGS[:2], torch.tensor(ts, dtype=F64))
    got = f.grad(lambda *args: oscillator(fv.odeint(rk4), *args), (0, 1, 2))(*args)
    torch.testing.assert_close(got, f.grad(exact, (0, 1, 2))(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ts", [[0.1, 0.1, 0.8], [0.8, 0.8]], ids=["twice", "still"])
def test_times_that_are_equal_move_in_a_second_derivative(ts) -> None:
    """Nothing is solved between them, and the way from one to the other has derivatives still."""
    args = (*ARGS[:2], torch.tensor(ts, dtype=F64))

    def second(fun):
        slopes = f.grad(fun, (0, 1, 2))
        return f.grad(lambda *a: sum(g.square().sum() for g in slopes(*a)), (0, 1, 2))(*args)

    got = second(lambda *args: oscillator(fv.odeint(rk4), *args))
    torch.testing.assert_close(got, second(exact), rtol=1e-4, atol=1e-4)


def test_a_pytree_with_a_complex_state() -> None:
    def euler(field, y0, ts, n=300):
        h, y = (ts[-1] - ts[0]) / n, y0
        for k in range(n):
            slope = field(ts[0] + k * h, y)
            y = tuple(a + h * b for a, b in zip(y, slope, strict=True))
        return tuple(torch.stack([a, b]) for a, b in zip(y0, y, strict=True))

    solve, n = fv.odeint(euler), torch.tensor([1, 2])
    start = (torch.tensor([1.0 + 0.5j, 0.3j]).to(torch.complex128), torch.tensor(2.0, dtype=F64))

    def program(c):
        field = lambda t, y: (c * n * y[0], -c.abs() * y[1])
        z, u = solve(field, start, torch.tensor([0.0, 1.0], dtype=F64))
        return (z[1].abs() ** 2).sum() + u[1]

    def closed(c):
        z = start[0] * torch.exp(c * n)
        return (z.abs() ** 2).sum() + start[1] * torch.exp(-c.abs())

    c = torch.tensor(0.3 - 0.4j, dtype=torch.complex128)
    torch.testing.assert_close(f.grad(program)(c), f.grad(closed)(c), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("reverse", ["adjoint", "sensitivities"])
def test_a_complex_state_moved_by_one_real_number(reverse) -> None:
    """Side by side in one vector, the pair of a complex number begins at an odd place."""
    solve = fv.odeint(rk4, reverse=reverse)
    start, ts = torch.tensor(1 + 0.5j).to(torch.complex128), torch.tensor([0.0, 0.7], dtype=F64)
    w = torch.tensor(1.3, dtype=F64)
    got = f.grad(lambda w: solve(lambda t, y: 1j * w * y, start, ts)[-1].imag)(w)
    want = f.grad(lambda w: (start * torch.exp(0.7j * w)).imag)(w)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("marks", ["an alias", "its argument"])
def test_a_field_that_differentiates_by_its_state(marks) -> None:
    """As Hamiltonian and continuous normalizing flows do, in the way of torchdiffeq's examples."""
    k = torch.tensor(2.0, dtype=F64, requires_grad=True)

    def field(t, y):
        with torch.enable_grad():
            if marks == "its argument":
                y.requires_grad_()
            elif not y.requires_grad:
                y = y.detach().requires_grad_()
            energy = (y[1] ** 2 + k * y[0] ** 2) / 2
            (slope,) = torch.autograd.grad(energy, y, create_graph=True)
        return torch.stack([slope[1], -slope[0]])

    y0, ts = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0.0, 0.6, 1.0], dtype=F64)
    ts.requires_grad_()
    fv.odeint(rk4)(field, y0, ts)[-1, 0].backward()
    w = 2.0**0.5
    torch.testing.assert_close(float(k.grad), -np.sin(w) / (2 * w), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(float(ts.grad[-1]), -w * np.sin(w), rtol=1e-4, atol=1e-4)
    assert not y0.requires_grad


def test_like_torchdiffeq_with_its_adjoint() -> None:
    """A closure over weights, with no module around it."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    torch.manual_seed(0)
    weights = [(0.5 * torch.randn(3, 3, dtype=F64)).requires_grad_() for _ in range(2)]
    y0, ts = torch.ones(3, dtype=F64), torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    field = lambda t, y: torch.tanh(weights[0] @ y) @ weights[1] * torch.cos(t)
    options = {"rtol": 1e-9, "atol": 1e-9, "method": "dopri5"}
    plain = torchdiffeq.odeint(field, y0, ts, **options)
    adjoint = fv.odeint(torchdiffeq.odeint)(field, y0, ts, **options)
    assert torch.equal(plain, adjoint)
    expected = torch.autograd.grad((plain**2).sum(), weights)
    torch.testing.assert_close(
        torch.autograd.grad((adjoint**2).sum(), weights), expected, rtol=1e-6, atol=1e-8
    )


def test_scipy_is_a_solver() -> None:
    def solve(field, y0, ts, method="DOP853"):
        out = scipy.integrate.solve_ivp(
            lambda t, y: field(t, torch.tensor(y)).numpy(),
            (float(ts[0]), float(ts[-1])),
            y0.numpy(),
            method,
            t_eval=ts.numpy(),
            rtol=1e-9,
            atol=1e-11,
        )
        return torch.tensor(out.y.T)

    inputs = [t.clone().requires_grad_() for t in ARGS]
    got = torch.autograd.grad(oscillator(fv.odeint(solve), *inputs), inputs)
    torch.testing.assert_close(got, f.grad(exact, (0, 1, 2))(*ARGS), rtol=1e-6, atol=1e-7)


def decaying(rate: Tensor, **options: Any) -> Tensor:
    """Backwards it grows by exp(40)."""
    ts = torch.tensor([0.0, 1.0], dtype=F64)
    field = lambda t, y: -rate * (y - torch.cos(t))
    return fv.odeint(rk4, **options)(field, torch.zeros((), dtype=F64), ts, steps=40)[-1]


def test_a_backward_solve_that_loses_the_state_is_refused() -> None:
    rate = torch.tensor(40.0, dtype=F64)
    with pytest.raises(NotASolutionError, match='reverse="sensitivities"'):
        f.grad(decaying)(rate)
    assert f.grad(lambda r: decaying(r, on_failure="nan"))(rate).isnan()
    with pytest.warns(UserWarning, match="the state differs"):
        assert f.grad(lambda r: decaying(r, on_failure="warn"))(rate).isnan()
    h = 1e-3
    difference = (decaying(rate + h) - decaying(rate - h)) / (2 * h)
    forwards = f.jvp(decaying, (rate,), (torch.ones_like(rate),))[1]
    torch.testing.assert_close(forwards, difference, rtol=1e-5, atol=0)
    got = f.grad(lambda r: decaying(r, reverse="sensitivities"))(rate)
    torch.testing.assert_close(got, forwards, rtol=1e-9, atol=0)


def test_a_coarse_solver_is_refused_and_a_plain_one_is_not() -> None:
    def euler(field, y0, ts, n=4):
        h, y = (ts[-1] - ts[0]) / n, y0
        for k in range(n):
            y = y + h * field(ts[0] + k * h, y)
        return torch.stack([y0, y])

    one = torch.ones((), dtype=F64)

    def slope(n, **options):
        solve = fv.odeint(euler, **options)
        return f.grad(
            lambda a: solve(lambda t, y: a * y, one, torch.arange(2.0).double(), n=n)[-1]
        )(one)

    with pytest.raises(NotASolutionError, match=r"up to 1\.0e-02 is accepted"):
        slope(4)
    np.testing.assert_allclose(slope(200), np.exp(1.0), rtol=1e-2)
    np.testing.assert_allclose(slope(4, tol=0.5), np.exp(1.0), rtol=0.5)
    assert slope(4, check=False) == slope(4, tol=0.5)


def test_a_component_that_is_zero_whenever_it_is_seen() -> None:
    """After whole periods only the velocity is not zero."""

    def end(w):
        field = lambda t, y: torch.stack([y[1], -(w**2) * y[0]])
        y0, ts = torch.tensor([0.0, 1.0], dtype=F64), torch.arange(3.0, dtype=F64)
        return fv.odeint(rk4)(field, y0, ts, steps=20)[-1, 0]

    # of sin(2 w) / w
    got = f.grad(end)(torch.tensor(2 * np.pi, dtype=F64))
    np.testing.assert_allclose(got, 1 / np.pi, rtol=2e-2)


def test_many_cotangents_at_once_are_refused_by_name() -> None:
    rate = torch.tensor(0.5, dtype=F64, requires_grad=True)
    y0 = torch.ones(2, dtype=F64)
    ys = fv.odeint(rk4)(lambda t, y: -rate * y, y0, torch.arange(2.0, dtype=F64))
    with pytest.raises(NotImplementedError, match="rk4: many cotangents at once"):
        torch.autograd.grad(ys[-1], rate, torch.eye(2, dtype=F64), is_grads_batched=True)


def test_an_option_is_a_tensor_and_part_of_the_states_is_asked() -> None:
    """Forward mode gives an option that does not move no tangent, a backward pass a part that
    nobody asks for no cotangent."""

    def program(rate: Tensor, part: str) -> Tensor:
        def solver(field: Any, y0: Any, ts: Tensor, steps: Tensor) -> Any:
            rows = [y0]
            for _ in range(int(steps)):
                h = (ts[1] - ts[0]) / steps
                step = lambda y, slope, h=h: y + h * slope
                rows.append(pytree.tree_map(step, rows[-1], field(ts[0], rows[-1])))
            return pytree.tree_map(lambda *ys: torch.stack(ys), y0, rows[-1])

        field = lambda t, y: {"u": rate * torch.ones_like(y["u"]), "v": 3 * rate + 0 * y["v"]}
        y0 = {"u": torch.zeros(2, dtype=F64), "v": torch.zeros((), dtype=F64)}
        ts = torch.tensor([0.0, 2.0], dtype=F64)
        steps = torch.tensor(4.0, dtype=F64)
        return fv.odeint(solver)(field, y0, ts, steps=steps)[part][-1].sum()

    rate = torch.tensor(0.7, dtype=F64, requires_grad=True)
    for part, slope in (("u", 4.0), ("v", 6.0)):
        of = lambda rate, part=part: program(rate, part)
        assert float(torch.autograd.grad(of(rate), rate)[0]) == pytest.approx(slope)
        assert float(f.jacfwd(of)(rate.detach())) == pytest.approx(slope)


def test_what_is_refused() -> None:
    solve, ts = fv.odeint(rk4), torch.tensor([0.0, 1.0])
    with pytest.raises(StructureError, match=r"y0\['n'\]: expected a real or complex tensor"):
        solve(lambda t, y: y, {"n": torch.tensor(1)}, ts)
    with pytest.raises(StructureError, match="ts: expected a vector"):
        solve(lambda t, y: y, torch.ones(()), torch.tensor(2.0))
    with pytest.raises(StructureError, match="the field: expected a value like y0"):
        solve(lambda t, y: torch.stack([y, y]), torch.ones(()), ts)
    with pytest.raises(StructureError, match=r"the shapes \(\), got None"):
        solve(lambda t, y: None, torch.ones(()), ts)
    with pytest.raises(StructureError, match="with a leading axis over ts"):
        fv.odeint(lambda field, y0, ts: y0)(lambda t, y: y, torch.ones(()), ts)
    with pytest.raises(StructureError, match="in the dtypes of y0"):
        fv.odeint(lambda f, y0, ts: rk4(f, y0, ts).double())(lambda t, y: y, torch.ones(()), ts)
    with pytest.raises(StructureError, match=r"got \['ndarray'\]"):
        fv.odeint(lambda field, y0, ts: np.ones(2))(lambda t, y: y, torch.ones(()), ts)
    backwards = fv.odeint(lambda field, y0, ts: rk4(lambda t, y: field(y, t), y0, ts))
    with pytest.raises(StructureError, match=r"tfirst=False\) as field\(y, t\)"):
        backwards(lambda y, t: -y, torch.ones(2), ts)
