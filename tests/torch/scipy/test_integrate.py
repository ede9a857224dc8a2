"""`quad` and `solve_ivp` with scipy's signatures in PyTorch, against scipy and closed forms."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch

from freevars.errors import NotASolutionError
from freevars.torch.scipy import quad, solve_ivp

grad = torch.autograd.grad


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def number(x):
    return torch.tensor(float(x), requires_grad=True)


def test_quad_is_scipys() -> None:
    told = scipy.integrate.quad(lambda t: np.sin(1.7 * t) / (1 + t), 0.0, 2.0)
    found = quad(lambda t: torch.sin(1.7 * t) / (1 + t), 0.0, 2.0)
    np.testing.assert_allclose([float(part) for part in found], told, rtol=1e-6)
    options = {"epsabs": 1e-3, "epsrel": 1e-3, "limit": 3, "points": [0.5]}
    told = scipy.integrate.quad(lambda t: abs(t - 0.5), 0.0, 1.0, **options)
    found = quad(lambda t: (t - 0.5).abs(), 0, 1, **options)
    np.testing.assert_allclose([float(part) for part in found], told, rtol=1e-6)


def _area(p, a, b):
    return quad(lambda t, q: p * q * torch.exp(-p * t), a, b, args=(2.0,))[0]


def _exact_area(p, a, b):
    return 2 * (torch.exp(-p * a) - torch.exp(-p * b))


def test_derivatives_of_quad_by_captures_and_limits() -> None:
    at = [number(x) for x in (1.3, 0.2, 2.0)]
    for ours, right in zip(grad(_area(*at), at), grad(_exact_area(*at), at), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-9)
    assert torch.autograd.gradcheck(_area, at)
    p = number(1.3)
    np.testing.assert_allclose(grad(_area(p, 0.2, math.inf), p)[0], -0.4 * math.exp(-0.26))


def test_quad_in_transforms_and_to_second_order() -> None:
    ps = torch.tensor([1.3, 0.7])
    forwards = torch.func.vmap(torch.func.jacfwd(lambda p: _area(p, 0.2, 2.0)))(ps)
    second = torch.func.hessian(lambda p: _area(p, 0.2, 2.0))(ps[0])
    exact = lambda p: _exact_area(p, torch.tensor(0.2), torch.tensor(2.0))
    torch.testing.assert_close(forwards, torch.func.vmap(torch.func.grad(exact))(ps))
    torch.testing.assert_close(second, torch.func.hessian(exact)(ps[0]))


def test_each_member_of_a_batch_has_its_own_estimate() -> None:
    of_one = lambda p: quad(lambda t: torch.exp(p * torch.sin(4 * t)), 0.0, 5.0)[1]
    ps = torch.tensor([0.1, 3.0])
    torch.testing.assert_close(torch.func.vmap(of_one)(ps), torch.stack([of_one(p) for p in ps]))


def test_an_integral_does_not_depend_on_where_it_is_cut() -> None:
    area = lambda c: quad(lambda t: (t - c).abs(), 0.0, 1.0, points=[c])[0]
    np.testing.assert_allclose(torch.func.grad(area)(torch.tensor(0.3)), 2 * 0.3 - 1, rtol=1e-6)


def test_quad_of_complex_numbers() -> None:
    wave = lambda p: quad(lambda t: torch.exp(1j * p * t), 0.0, 1.0, complex_func=True)[0]
    exact = lambda p: (torch.exp(1j * p) - 1) / (1j * p)
    p = number(2.0)
    torch.testing.assert_close(wave(p), exact(p))
    torch.testing.assert_close(grad(wave(p).abs(), p), grad(exact(p).abs(), p))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"full_output": 1}, "full_output= has no place"),
        ({"weight": "cos", "wvar": 2.0}, "write the weight into the function"),
        ({"func": lambda t: torch.stack([t, t])}, r"a number of shape \(\)"),
        ({"func": lambda t: 1j * t}, "complex_func=True"),
        ({"func": lambda t: np.exp(float(t))}, "expected a function in PyTorch"),
    ],
)
def test_mistakes_of_quad(given, text) -> None:
    with pytest.raises(TypeError, match=text):
        quad(**({"func": lambda t: t, "a": 0.0, "b": 1.0} | given))


FACTORS = np.array([1.0, 2.0])
TS = [0.5, 1.0, 2.0]


def _decay(rate, ts=None, **options):
    fun = lambda t, y: -rate * torch.tensor(FACTORS) * y
    t_eval = torch.tensor(TS) if ts is None else ts
    return solve_ivp(fun, (0.0, 2.0), [1.0, 3.0], t_eval=t_eval, **options)


def test_solve_ivp_is_scipys() -> None:
    how = {"rtol": 1e-5, "atol": 1e-8}
    got = _decay(torch.tensor(0.7), **how)
    told = scipy.integrate.solve_ivp(
        lambda t, y: -0.7 * FACTORS * y, (0, 2), [1.0, 3.0], t_eval=TS, **how
    )
    np.testing.assert_allclose(got.y, told.y, rtol=1e-9)
    np.testing.assert_array_equal(got.t, told.t)
    assert got.message == told.message
    assert (bool(got.success), int(got.status), int(got.nfev)) == (True, 0, told.nfev)
    assert told.message in repr(got)


@pytest.mark.parametrize("method", ["RK45", "LSODA", pytest.param("Radau", marks=pytest.mark.slow)])
def test_derivatives_of_solve_ivp(method) -> None:
    exact = lambda rate, ts: (torch.exp(-rate * ts) + 3 * torch.exp(-2 * rate * ts)).sum()
    total = lambda rate, ts: _decay(rate, ts, method=method, rtol=1e-8).y.sum()
    at = number(0.7), torch.tensor(TS, requires_grad=True)
    for ours, right in zip(grad(total(*at), at), grad(exact(*at), at), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5)
    forwards = torch.func.jacfwd(total)(torch.tensor(0.7), torch.tensor(TS))
    np.testing.assert_allclose(forwards, grad(exact(*at), at[0])[0], rtol=1e-5)


def test_states_of_any_structure_by_the_start_and_the_first_time() -> None:
    def end(rate, first, u):
        fun = lambda t, y, a: {"u": -a * y["u"], "z": 1j * a * y["z"]}
        y0 = {"u": u, "z": torch.ones(1, dtype=torch.complex128)}
        out = solve_ivp(fun, (first, 0.0), y0, t_eval=[1.0, 0.0], args=(rate,), rtol=1e-8).y
        return out["u"][0, -1] + out["z"][0, -1].real

    at = number(0.5), number(2.0), torch.ones(2, requires_grad=True)
    exact = lambda rate, first, u: u[0] * torch.exp(rate * first) + torch.cos(rate * first)
    for ours, right in zip(grad(end(*at), at), grad(exact(*at), at), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-8)


def test_times_that_were_rounded_and_states_of_integers() -> None:
    ts = torch.linspace(0.0, 0.1, 2, dtype=torch.float32)  # 0.1 is less in float64
    y = solve_ivp(lambda t, y: -y, (0.0, 0.1), np.array([1, 2]), t_eval=ts).y[:, -1]
    np.testing.assert_allclose(y, np.array([1, 2]) * math.exp(-0.1), rtol=1e-6)


def test_lists_of_tensors_are_vectors() -> None:
    y = solve_ivp(lambda t, y: [y[1], -y[0]], (0, 1), [1, 0], t_eval=[1.0], rtol=1e-8).y
    np.testing.assert_allclose(y[:, -1], [math.cos(1), -math.sin(1)], rtol=1e-6)


def test_times_in_a_list_have_derivatives() -> None:
    last = lambda t: solve_ivp(lambda t, y: -y, (0.0, 2.0), [1.0], t_eval=[0.5, t]).y[0, -1]
    for slope in (torch.func.grad(last), torch.func.jacfwd(last)):
        np.testing.assert_allclose(slope(torch.tensor(1.0)), -math.exp(-1.0), rtol=1e-5)


def test_a_batch_has_its_own_counts() -> None:
    found = torch.func.vmap(lambda rate: _decay(rate).nfev)(torch.tensor([0.1, 9.0]))
    assert found.tolist() == [int(_decay(torch.tensor(r)).nfev) for r in (0.1, 9.0)]


@pytest.mark.slow
def test_stiff_equations_go_forwards() -> None:
    def end(rate, **how):
        fun = lambda t, y: torch.stack([-rate * (y[0] - torch.cos(t)), y[0]])
        how = {"rtol": 1e-6, "atol": np.array([1e-10, 1e-9]), **how}
        return solve_ivp(fun, (0.0, 1.0), torch.zeros(2), "BDF", [1.0], **how).y[0, -1]

    rate = number(100.0)
    with pytest.raises(NotASolutionError, match='reverse="sensitivities"'):
        grad(end(rate), rate)
    exact = (rate**2 * math.cos(1.0) + rate * math.sin(1.0)) / (1 + rate**2)
    ours = grad(end(rate, reverse="sensitivities"), rate)[0]
    np.testing.assert_allclose(ours, grad(exact, rate)[0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", ["adjoint", "sensitivities"])
def test_no_derivative_past_the_end_of_a_solution(reverse) -> None:
    """y = 1 / (1 - rate t) ends at t = 1 / rate."""

    def last(rate):
        square = lambda t, y: rate * y**2
        return solve_ivp(square, (0, 1.5), [1.0], t_eval=[0.5, 1.5], reverse=reverse).y[0, -1]

    rate = number(1.0)
    assert last(rate).isnan()
    with pytest.raises(NotASolutionError, match="there is no derivative: a state"):
        grad(last(rate), rate)
    slow = number(0.5)
    exact = 1.5 / (1 - 1.5 * slow) ** 2
    np.testing.assert_allclose(grad(last(slow), slow)[0], exact.detach(), rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"t_eval": None}, TypeError, "t_eval: expected the times"),
        ({"t_eval": 1.0}, TypeError, r"t_eval: expected the times .* got shape \(\)"),
        ({"t_eval": [3.0]}, ValueError, "expected times in t_span"),
        ({"t_span": (0.0, 0.5, 1.0)}, TypeError, "t_span: expected a pair"),
        ({"t_span": 1.0}, TypeError, "t_span: expected a pair"),
        ({"events": lambda t, y: y[0]}, TypeError, "events= has no place"),
        ({"jac": lambda t, y: y}, TypeError, "jac= is not needed"),
        ({"lband": 1}, TypeError, "lband= has no place"),
        (
            {"fun": lambda t, y: y.detach().numpy()},
            TypeError,
            r"expected a function in PyTorch, got <lambda> \(.*test_integrate\.py:\d+\), which",
        ),
    ],
)
def test_mistakes_of_solve_ivp(given, error, text) -> None:
    call = {"fun": lambda t, y: -y, "t_span": (0.0, 1.0), "y0": torch.ones(1), "t_eval": [1.0]}
    with pytest.raises(error, match=text):
        solve_ivp(**(call | given))
