"""Integrals: Leibniz' rule against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import torch
from torch import Tensor

import freevars.torch as fv
from freevars.errors import CaptureError, NotASolutionError, StructureError
from freevars.torch._compat import pytree

f = torch.func
F64 = torch.float64
NODES, WEIGHTS = map(torch.tensor, np.polynomial.legendre.leggauss(12))
ARGS = (torch.tensor([0.7, 0.3], dtype=F64), *torch.tensor([0.2, 1.3], dtype=F64))


def gauss(fun: Any, a: Any, b: Any) -> Any:
    """A rule with fixed nodes, for any pytree."""
    values = [
        pytree.tree_map(lambda v, w=w: (b - a) / 2 * w * v, fun((a + b) / 2 + (b - a) / 2 * x))
        for x, w in zip(NODES, WEIGHTS, strict=True)
    ]
    return pytree.tree_map(lambda *each: sum(each[1:], each[0]), *values)


def damped(solve: Any, p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return solve(lambda t: torch.exp(-p[0] * t) * torch.cos(p[1] * t), a, b)


def exact(p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    c = torch.complex(-p[0], p[1])
    return ((torch.exp(c * b) - torch.exp(c * a)) / c).real


def backward(n: int) -> Any:
    def derivative(g: Any, *args: Tensor) -> Any:
        inputs = [t.clone().requires_grad_() for t in args]
        out = g(*inputs)
        for k in range(n):
            grads = torch.autograd.grad(out, inputs, create_graph=k + 1 < n)
            out = sum((x * x.cos()).sum() for x in grads)
        return grads

    return derivative


ALL = (0, 1, 2)
TRANSFORMATIONS: dict[str, Any] = {
    "backward": backward(1),
    "double backward": backward(2),
    "grad": lambda g, *args: f.grad(g, ALL)(*args),
    "jvp": lambda g, *args: f.jvp(g, args, args),
    "reverse over reverse": lambda g, *args: f.jacrev(f.jacrev(g, ALL), ALL)(*args),
    "forward over reverse": lambda g, *args: f.jacfwd(f.grad(g))(*args),
    "vmap": lambda g, p, a, b: f.vmap(f.grad(g, ALL), (None, 0, None))(
        p, torch.stack([a, a / 2]), b
    ),
    "vmap of the captured": lambda g, p, *rest: f.vmap(f.grad(g), (0, None, None))(
        torch.stack([p, p / 2]), *rest
    ),
}


@pytest.mark.parametrize("takes", [None, pytest.param("array", marks=pytest.mark.slow), "pytree"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_equals_the_closed_form(name, takes) -> None:
    transform, solve = TRANSFORMATIONS[name], fv.integral(gauss, takes=takes)
    got = transform(lambda *args: damped(solve, *args), *ARGS)
    torch.testing.assert_close(got, transform(exact, *ARGS), rtol=1e-9, atol=1e-11)


def test_one_integral_for_all_where_the_solver_takes_it() -> None:
    calls = []

    def solver(fun, a, b):
        calls.append(fun)
        return gauss(fun, a, b)

    w = torch.linspace(0.1, 1.0, 7, dtype=F64, requires_grad=True)
    # Twice more, over both halves.
    for takes, expected in ((None, 10), ("array", 4), ("pytree", 4)):
        calls.clear()
        zero = torch.zeros((), dtype=F64)
        total = fv.integral(solver, takes=takes)(lambda t: (w * t).sin().sum(), zero, 1 + zero)
        (got,) = torch.autograd.grad(total, w)
        # d/dw int sin(w t) = int t cos(w t) dt over [0, 1]
        torch.testing.assert_close(got, ((w.cos() + w * w.sin() - 1) / w**2).detach())
        assert len(calls) == expected
        # An integrand that returns a tensor shows that the solver takes these.
        calls.clear()
        each = fv.integral(solver, takes=takes)(lambda t: w * t, zero, 1 + zero)
        torch.autograd.grad(each.sum(), w)
        assert len(calls) == 4


def test_scipy_and_infinite_limits() -> None:
    solve = fv.integral(lambda fun, a, b: torch.tensor(scipy.integrate.quad(fun, a, b)[0]))
    p = torch.tensor([0.7, 0.3], dtype=F64, requires_grad=True)
    total = solve(lambda t: p[1] * torch.exp(-p[0] * t**2), 0.0, np.inf)
    (got,) = torch.autograd.grad(total, p)
    with torch.no_grad():  # sqrt(pi / p0) p1 / 2
        expected = (torch.pi / p[0]).sqrt() * torch.stack([-p[1] / p[0] / 4, 0 * p[0] + 0.5])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)

    def tail(a, b):
        return solve(lambda t: torch.exp(-t) / t, a, b)

    one, infinity = torch.tensor([1.0, torch.inf], dtype=F64)
    assert f.grad(tail, 1)(one, infinity) == 0.0
    assert f.grad(f.grad(tail, 1), 1)(one, infinity) == 0.0
    torch.testing.assert_close(f.grad(tail)(one, infinity), -torch.exp(-one))
    torch.testing.assert_close(f.grad(tail, 1)(one, 2 * one), torch.exp(-2 * one) / 2)


@pytest.mark.parametrize("kind", [int, float, np.float32, np.float64, np.int64])
def test_limits_that_are_numbers(kind) -> None:
    c = torch.tensor(3.0, dtype=F64, requires_grad=True)
    solve = fv.integral(lambda fun, a, b: (b - a) * fun((a + b) / 2))
    solve(lambda t: c * t, kind(0), kind(2)).backward()
    assert c.grad == 2


@pytest.mark.parametrize("infinity", [np.inf, np.float32(np.inf)])
def test_an_infinite_limit_reaches_the_solver_as_a_number(infinity) -> None:
    solve = fv.integral(lambda fun, a, b: fun(a) if b == math.inf else None)
    assert f.grad(lambda c: solve(lambda t: c * torch.exp(-t), 0, infinity))(AT) == 1


def peak(solve, c):
    """Narrower than the nodes of `gauss` are apart."""
    return solve(lambda t: 1 + torch.exp(-(((t - c) / 0.02) ** 2)), *ENDS)


ENDS = torch.tensor([0.0, 1.0], dtype=F64)
AT = torch.tensor(0.4, dtype=F64)


def test_a_derivative_that_the_points_miss_is_refused() -> None:
    solve = fv.integral(gauss)
    with pytest.raises(NotASolutionError, match=r"gauss: .* integrated over both halves"):
        peak(solve, AT.clone().requires_grad_()).backward()
    with pytest.raises(NotASolutionError, match="accept more by the rule's tol="):
        f.jvp(lambda c: peak(solve, c), (AT,), (AT,))
    by_rule = f.grad(lambda c: peak(gauss, c))(AT)
    for how in ({"check": False}, {"tol": 0.5}):
        got = f.grad(lambda c, how=how: peak(fv.integral(gauss, **how), c))(AT)
        torch.testing.assert_close(got, by_rule)
    warning = fv.integral(gauss, on_failure="warn")
    with pytest.warns(UserWarning, match="cannot be trusted"):
        assert f.grad(lambda c: peak(warning, c))(AT).isnan()
    # Each member of a batch has its own verdict; that of the wide peak is good.
    width = torch.tensor([0.02, 2.0], dtype=F64)
    area = lambda c, w: quiet(lambda t: torch.exp(-(((t - c) / w) ** 2)), *ENDS)
    quiet = fv.integral(gauss, on_failure="nan")
    assert f.vmap(f.grad(area), (None, 0))(AT, width).isnan().tolist() == [True, False]


def test_no_unit_and_no_symmetry_is_a_failure() -> None:
    """Derivatives that are zero because their parts cancel, and integrands of any size."""
    solve, half = fv.integral(gauss), torch.tensor(0.5, dtype=F64)
    waves = lambda p: solve(lambda t: p * torch.cos(4 * torch.pi * t), *ENDS)
    distance = lambda c: solve(lambda t: (t - c) ** 2, *ENDS)
    nothing = lambda c: solve(lambda t: t + 0 * c, *ENDS)
    for fun in (waves, distance, nothing):
        np.testing.assert_allclose(f.grad(fun)(half), 0.0, atol=1e-6)
    assert f.grad(lambda c: solve(lambda t: c * t, ENDS[1], ENDS[1]))(half) == 0.0
    small = f.grad(lambda c: solve(lambda t: 1e-200 * torch.exp(c * t), ENDS[0], 1e3 * ENDS[1]))
    np.testing.assert_allclose(small(1e-3 * ENDS[1]), 1e-200 * 1e6, rtol=1e-9)


def test_structures_and_types() -> None:
    solve, n = fv.integral(gauss), torch.arange(1, 3)

    def program(z):
        out = solve(
            lambda t: {"c": (z * t) ** n, "r": z.abs() * t}, *torch.tensor([0.0, 1.0], dtype=F64)
        )
        return (out["c"].abs() ** 2).sum() + out["r"]

    def closed(z):
        return ((z**n / (n + 1)).abs() ** 2).sum() + z.abs() / 2

    z, dz = (
        torch.tensor(0.4 + 0.3j, dtype=torch.complex128),
        torch.tensor(1 - 2j).to(torch.complex128),
    )
    torch.testing.assert_close(f.grad(program)(z), f.grad(closed)(z), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        f.jvp(program, (z,), (dz,))[1], f.jvp(closed, (z,), (dz,))[1], rtol=1e-6, atol=1e-6
    )


def test_a_batch_of_conjugates() -> None:
    solve = fv.integral(gauss)
    program = lambda z: solve(lambda t: (z.conj() ** 2 * t).imag, *ENDS)
    closed = lambda z: (z.conj() ** 2).imag * (ENDS[1] ** 2 - ENDS[0] ** 2) / 2
    z = torch.tensor([0.4 + 0.3j, 1 - 2j]).to(torch.complex128)
    start = lambda fun: f.vmap(f.grad(lambda z: fun(z.conj())))(z)
    torch.testing.assert_close(start(program), start(closed), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["double backward", "reverse over reverse"])
def test_a_number_that_the_integrand_is_linear_in(name) -> None:
    """A second derivative by it integrates nothing."""
    solve = fv.integral(gauss)
    args = (torch.tensor(0.7, dtype=F64), *ARGS[1:])
    got = TRANSFORMATIONS[name](lambda p, a, b: solve(lambda t: p * t, a, b), *args)
    want = TRANSFORMATIONS[name](lambda p, a, b: p * (b**2 - a**2) / 2, *args)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_what_is_refused() -> None:
    with pytest.raises(StructureError, match="b: expected a real number"):
        fv.integral(gauss)(lambda t: t, 0.0, torch.ones(2))
    with pytest.raises(StructureError, match="expected a point of shape"):
        fv.integral(lambda fun, a, b: fun(a.double()))(lambda t: t, 0.0, 1.0)
    with pytest.raises(StructureError, match="the structure and shapes of the integrand"):
        fv.integral(lambda fun, a, b: (fun(a), fun(b)))(lambda t: t, 0.0, 1.0)
    with pytest.raises(StructureError, match=r"of the integrand, \(\), got ndarray"):
        fv.integral(lambda fun, a, b: np.ones(()))(lambda t: t, 0.0, 1.0)
    with pytest.raises(StructureError, match="the integrand: expected a number, a tensor"):
        fv.integral(gauss)(lambda t: None, 0.0, 1.0)


def test_an_integral_that_is_a_number() -> None:
    quad = fv.integral(lambda fun, a, b: scipy.integrate.quad(lambda t: float(fun(t)), a, b)[0])
    rate = torch.tensor(0.7, dtype=F64, requires_grad=True)
    value = quad(lambda t: torch.exp(-rate * t), *ENDS)
    value.backward()
    a, b = ENDS
    closed = lambda r: (torch.exp(-r * a) - torch.exp(-r * b)) / r
    assert value.dtype == F64
    torch.testing.assert_close(value.detach(), closed(rate.detach()), rtol=1e-12, atol=0)
    torch.testing.assert_close(rate.grad, f.grad(closed)(rate.detach()), rtol=1e-9, atol=0)


@pytest.mark.parametrize("reads", [True, False], ids=["as the integrand does", "alone"])
def test_what_the_solver_reads_itself_has_no_derivative(reads: bool) -> None:  # noqa: FBT001
    def scaled(fun: Any, a: Any, b: Any, scale: Any = 1.0) -> Any:
        return gauss(fun, a, b) * scale

    def holding(c: Tensor) -> Any:
        return fv.integral(lambda fun, a, b: scaled(fun, a, b, c))

    def of(c: Tensor) -> Any:
        return lambda t: t * c if reads else t

    c, (a, b) = torch.tensor(2.0, dtype=F64, requires_grad=True), torch.eye(2, dtype=F64)[0].flip(0)
    by_option = fv.integral(scaled)
    programs = {
        "the option scale=": lambda c: by_option(of(c), a, b, scale=c),
        "got one by c ": lambda c: holding(c)(of(c), a, b),
    }
    for named, program in programs.items():
        with pytest.raises(CaptureError, match=f"{named}.*reads itself"):
            program(c).backward()
        with pytest.raises(CaptureError, match=f"{named}.*reads itself"):
            f.grad(program)(c.detach())
        with pytest.raises(CaptureError, match=f"{named}.*reads itself"):
            f.jvp(program, (c.detach(),), (torch.ones_like(c),))
        with torch.no_grad():
            torch.testing.assert_close(program(c), c * 0.5 * (c if reads else 1))
    if reads:
        (got,) = torch.autograd.grad(by_option(of(c), a, b, scale=c.detach()), c)
        torch.testing.assert_close(got, c.detach() * 0.5)


def test_an_option_that_does_not_move_may_be_a_tensor() -> None:
    """In forward mode too, where PyTorch would give it a tangent of zero."""

    def program(c: Tensor, nodes: Any) -> Tensor:
        def solver(fun: Any, a: Any, b: Any, nodes: Any) -> Any:
            middle = (a + b) / 2
            return sum((b - a) / 2 * w * fun(middle + (b - a) / 2 * x) for x, w in nodes)

        return fv.integral(solver)(lambda t: c * t**2, 0.0, c, nodes=nodes)

    c, nodes = torch.tensor(2.0, dtype=F64), torch.stack([NODES, WEIGHTS], 1)
    nodes = nodes.to(F64)
    slope = 4 * c**3 / 3  # of c^4 / 3
    for given in (lambda _: nodes, lambda c: nodes + 0 * c.detach()):
        of = lambda c, given=given: program(c, given(c))
        torch.testing.assert_close(f.jvp(of, (c,), (torch.ones_like(c),))[1], slope)
        torch.testing.assert_close(f.jacfwd(f.grad(of))(c), 4 * c**2)
        with torch.autograd.forward_ad.dual_level():
            out = of(torch.autograd.forward_ad.make_dual(c, torch.ones_like(c)))
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out).tangent, slope)


@pytest.mark.slow
def test_what_the_solver_could_read_and_does_not() -> None:
    """It reaches a tensor, under torch.func too, that the integrand alone reads."""

    def program(c: Tensor) -> Tensor:
        def solver(fun: Any, a: Any, b: Any) -> Any:
            assert c.shape == ()
            return gauss(fun, a, b)

        return fv.integral(solver)(lambda t: t * c, 0.0, torch.ones((), dtype=F64))

    c = torch.tensor(2.0, dtype=F64)
    torch.testing.assert_close(f.grad(program)(c), torch.tensor(0.5, dtype=F64))
    torch.testing.assert_close(f.grad(f.grad(lambda c: program(c) * c))(c), torch.ones_like(c))
