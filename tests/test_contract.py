"""One contract for both hosts: the same names, the same options, the same error for a mistake.

Each row is tried in each host with the words that are the same in both. What only one host has is
listed by name, so that a new name is put into the other host, or into these lists.
"""

import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from freevars import errors

# What the other host has no use for.
ONLY_EXPORTS = {
    "jax": {
        *("HostFunction", "HostSolver", "on_host", "scipy_status"),  # PyTorch is on the host
        "Diagnosis",  # what `diagnose` gives
        "explain_leaks",  # of tracers
        "testing",  # torch.autograd.gradcheck takes a decorated solver as it is
    },
    "torch": set(),
}
ONLY_OPTIONS = {
    "jax": {"dense_limit", "jit", "preconditioner"},
    "torch": {"batch_dims", "rng"},
}
ONLY_IN_CLOSURE = {"jax": set(), "torch": {"from_module"}}
POLICIES = ("differentiable", "traced", "floating", "all")


class Host(NamedTuple):
    """One host, and how it writes what the rows need."""

    name: str
    fv: Any
    array: Callable[[Any], Any]  # floating
    integers: Callable[[Any], Any]
    stack: Callable[[Any], Any]
    gradient: Callable[..., Any]  # of a real function of one array

    @property
    def rules(self) -> list[Any]:
        return [self.fv.root, self.fv.argmin, self.fv.fixed_point]

    @property
    def options(self) -> Any:
        return importlib.import_module(f"freevars.{self.name}._rules.rules").Options


def _jax() -> Host:
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    fv = importlib.import_module("freevars.jax")
    floats = lambda x: jnp.asarray(x, float)
    return Host("jax", fv, floats, jnp.asarray, jnp.stack, jax.grad)


def _torch() -> Host:
    torch = pytest.importorskip("torch")
    fv = importlib.import_module("freevars.torch")
    floats = lambda x: torch.tensor(x, dtype=torch.float32)
    return Host("torch", fv, floats, torch.tensor, torch.stack, torch.func.grad)


HOSTS = {"jax": _jax, "torch": _torch}


@pytest.fixture(params=HOSTS)
def host(request) -> Host:
    return HOSTS[request.param]()


@pytest.fixture
def both() -> list[Host]:
    return [make() for make in HOSTS.values()]


def same_but(found: dict[str, set[str]], only: dict[str, set[str]]) -> None:
    """The hosts have the same names, apart from those that are listed."""
    shared = {name: names - only[name] for name, names in found.items()}
    assert shared["jax"] == shared["torch"]


def test_the_same_exports_errors_included(both) -> None:
    same_but({host.name: set(host.fv.__all__) for host in both}, ONLY_EXPORTS)
    for host in both:
        assert set(errors.__all__) <= set(host.fv.__all__)
        for name in host.fv.__all__:
            assert getattr(host.fv, name) is not None


def test_what_a_caller_holds_has_a_public_name(host) -> None:
    fv, x = host.fv, host.array([1.0, 2.0])
    converted, hoisted = fv.closure_convert(lambda y: y * x, x, hoist="all")
    assert type(converted) is fv.Converted
    assert type(hoisted) is list
    solve = fv.root(lambda fun, x0: x0)
    assert type(solve) is fv.ImplicitSolver
    assert isinstance(fv.Closure(lambda y: y * x, x).captures, report().CaptureReport)


def report() -> Any:
    return importlib.import_module("freevars.report")


def test_the_same_options(both) -> None:
    found = {host.name: set(host.options.__annotations__) for host in both}
    same_but(found, ONLY_OPTIONS)
    for host in both:
        for name in {"check": None, "has_aux": None, "on_failure": None}:
            assert name in typing.get_type_hints(host.options)


def test_the_same_signatures(both) -> None:
    for name in ("Closure", "captures", "closure_convert"):
        first, second = (inspect.signature(getattr(host.fv, name)).parameters for host in both)
        assert list(first) == [p for p in second if p in first], name
    for name in ("root", "argmin", "fixed_point"):
        first, second = (inspect.signature(getattr(host.fv, name)) for host in both)
        assert list(first.parameters) == list(second.parameters), name


def test_the_same_options_of_integrals(both) -> None:
    for file, name in (("integral", "IntegralOptions"), ("odeint", "OdeOptions")):
        first, second = (
            getattr(importlib.import_module(f"freevars.{host.name}._rules.{file}"), name)
            for host in both
        )
        assert typing.get_type_hints(first) == typing.get_type_hints(second)


def test_the_same_derivatives_of_integrals(host) -> None:
    """One step of the midpoint rule, and one of Euler's method, forwards and back."""
    fv, one = host.fv, host.array(1.0)

    @fv.integral(check=False)
    def midpoint(fun, low, high, *, parts=1):
        del parts
        return (high - low) * fun((low + high) / 2)

    area = lambda a: midpoint(lambda t: a * t**2, low=0 * a, high=2 * a, parts=1)
    assert float(host.gradient(area)(one)) == 2.0 + 2.0 * 4.0

    @fv.odeint(check=False)
    def euler(fun, y0, ts, *, parts=1):
        del parts
        return host.stack([y0, y0 + (ts[1] - ts[0]) * fun(ts[0], y0)])

    end = lambda a: euler(lambda t, y: a * t + 0 * y, y0=one, ts=host.array([1.0, 3.0]))[1]
    # From y' = a t: y_t = a t, and backwards the integral of t by one step from the end.
    assert float(host.gradient(end)(one)) == 2.0 * 3.0


def test_the_same_solvers_of_scipy(both) -> None:
    first, second = (importlib.import_module(f"freevars.{host.name}.scipy") for host in both)
    assert set(first.__all__) == set(second.__all__)
    for name in (name for name in first.__all__ if name.islower()):
        signatures = (inspect.signature(getattr(host, name)).parameters for host in (first, second))
        mine, others = ({n: p.default for n, p in found.items()} for found in signatures)
        assert mine == others, name


def test_the_same_attributes_of_a_closure(both) -> None:
    found = {}
    for host in both:
        x, n = host.array([1.0, 2.0]), host.integers([1, 2])
        closure = host.fv.Closure(lambda y, x=x, n=n: y * x * n, x)
        assert isinstance(closure.values, tuple)
        assert isinstance(closure.constants, tuple)
        assert closure.in_struct[0].shape == closure.out_struct.shape == (2,)
        found[host.name] = {name for name in dir(closure) if not name.startswith("_")}
    same_but(found, ONLY_IN_CLOSURE)


@pytest.mark.parametrize("hoist", POLICIES)
def test_the_same_policies(host, hoist) -> None:
    fv, x, n = host.fv, host.array([1.0, 2.0]), host.integers([3, 4])
    fun = lambda y: y * x * n

    def slope(w):
        converted, hoisted = fv.closure_convert(lambda y: fun(y) * w, x, hoist=hoist)
        counts.append(len(hoisted))
        return converted(x, *hoisted).sum()

    counts: list[int] = []
    gradient = host.gradient(slope)(host.array([0.5, 0.5]))
    assert gradient.tolist() == [3.0, 16.0]
    assert counts == [{"differentiable": 1, "traced": 1, "floating": 2, "all": 3}[hoist]]
    found = fv.captures(fun, x, hoist=hoist).values
    assert sum(value.hoisted for value in found) == counts[0] - 1


def test_a_function_as_the_policy(host) -> None:
    fv, x, y = host.fv, host.array([1.0, 2.0]), host.array([3.0, 4.0])
    converted, hoisted = fv.closure_convert(lambda z: x * y * z, x, hoist=lambda t: t is y)
    assert [h.tolist() for h in hoisted] == [[3.0, 4.0]]
    assert converted(x, x).tolist() == [1.0, 8.0]


def newton(host: Host, **options: Any) -> Any:
    """One step, which solves a linear equation with slope one."""
    return host.fv.root(lambda fun, x0: x0 - fun(x0), **options)


MISTAKES: dict[str, tuple[type[Exception], str, Callable[[Host], Any]]] = {
    "no solver": (TypeError, "a solver is a function", lambda h: h.fv.root(3)),
    "a solver of one argument": (
        TypeError,
        r"a function and a starting point .* got <lambda>\(fun\)",
        lambda h: h.fv.root(lambda fun: fun),
    ),
    "an option that there is not": (
        TypeError,
        "root: expected the options has_aux, .*, got linear_slve. Did you mean linear_solve",
        lambda h: h.fv.root(linear_slve=None),
    ),
    "another on_failure": (ValueError, "on_failure: expected", lambda h: h.fv.root(on_failure=3)),
    "a flag that is no flag": (TypeError, "check: expected True", lambda h: h.fv.root(check="no")),
    "a linear_solve that is none": (
        TypeError,
        "linear_solve: expected",
        lambda h: newton(h, linear_solve=3),
    ),
    "a tolerance that is none": (ValueError, "tol: expected", lambda h: h.fv.root(tol=0.0)),
    "a tolerance that is no number": (TypeError, "tol: expected", lambda h: h.fv.root(tol="1")),
    "totals that are no function": (
        TypeError,
        "conserved: expected",
        lambda h: h.fv.root(conserved=3),
    ),
    "a class as linear_solve": (
        TypeError,
        "linear_solve: expected",
        lambda h: newton(h, linear_solve=dict),
    ),
    "a missing argument": (
        TypeError,
        r"\(fun, x0\): missing a required argument: 'x0'",
        lambda h: newton(h)(lambda x: x),
    ),
    "a function that is none": (
        TypeError,
        "needs a callable, got int: 3",
        lambda h: newton(h)(3, h.array(1.0)),
    ),
    "an unknown of integers": (
        errors.StructureError,
        "x0",
        lambda h: newton(h)(lambda x: x, h.integers([1])),
    ),
    "an unknown that is text": (errors.StructureError, "x0", lambda h: newton(h)(lambda x: x, "1")),
    "another x than x0": (
        errors.StructureError,
        "expected",
        lambda h: h.fv.root(lambda fun, x0: (x0, x0))(lambda x: x, h.array([1.0])),
    ),
    "no aux": (
        errors.StructureError,
        r"a solver returns \(x, aux\)",
        lambda h: h.fv.root(lambda fun, x0: x0, has_aux=True)(lambda x: (x, None), h.array([1.0])),
    ),
    "two equations for one unknown": (
        errors.StructureError,
        "expected",
        lambda h: h.gradient(
            lambda a: h.fv.root(lambda fun, x0: x0)(lambda x: h.stack([x, a]), h.array(1.0))
        )(h.array(2.0)),
    ),
    "an objective that is no number": (
        errors.StructureError,
        "expected",
        lambda h: h.gradient(
            lambda a: h.fv.argmin(lambda fun, x0: x0)(lambda x: x * a, h.array([1.0, 2.0]))[0]
        )(h.array(2.0)),
    ),
    "not converged": (
        errors.NotASolutionError,
        "did not converge",
        lambda h: h.gradient(
            lambda a: h.fv.root(lambda fun, x0: x0)(lambda x: x - a, h.array(1.0))
        )(h.array(2.0)),
    ),
    "singular": (
        errors.SingularError,
        "singular|regular",
        lambda h: h.gradient(
            lambda a: newton(h)(lambda x: a * 0 * x.sum() + 0 * x, h.array([1.0, 2.0])).sum()
        )(h.array(2.0)),
    ),
    "an integrator of two arguments": (
        TypeError,
        r"takes integrand, a and b as its first three arguments, got <lambda>\(f, a\)",
        lambda h: h.fv.integral(lambda f, a: f(a)),
    ),
    "an integrator that is none": (
        TypeError,
        r"a function solver\(field, y0, ts, \.\.\.\), got 3",
        lambda h: h.fv.odeint(3),
    ),
    "an option of another rule": (
        TypeError,
        "integral: expected the options has_aux, takes, on_failure, check, tol, got polish",
        lambda h: h.fv.integral(polish=True),
    ),
    "another form": (
        ValueError,
        'takes: expected None, "pytree" or "array", got "scalar"|got \'scalar\'',
        lambda h: h.fv.odeint(takes="scalar"),
    ),
    "another way back": (
        ValueError,
        'reverse: expected "adjoint" or "sensitivities"',
        lambda h: h.fv.odeint(reverse="forward"),
    ),
    "an integrand that is none": (
        TypeError,
        "needs a callable, got int: 3",
        lambda h: h.fv.integral(lambda f, a, b: f(a))(3, 0.0, 1.0),
    ),
    "an integral without aux": (
        errors.StructureError,
        r"a solver returns \(integral, aux\)",
        lambda h: h.fv.integral(lambda f, a, b: f(a), has_aux=True)(lambda t: t, 0.0, 1.0),
    ),
    "a time that is none": (
        errors.StructureError,
        "ts: expected a vector of one or more times",
        lambda h: h.fv.odeint(lambda f, y0, ts: y0)(lambda t, y: y, h.array(1.0), h.array(0.0)),
    ),
    "converting what is no function": (
        TypeError,
        "needs a callable, got int: 3",
        lambda h: h.fv.closure_convert(3, h.array(1.0)),
    ),
    "a closure of what is no function": (
        TypeError,
        "needs a callable",
        lambda h: h.fv.Closure(3, h.array(1.0)),
    ),
    "a report of what is no function": (
        TypeError,
        "needs a callable",
        lambda h: h.fv.captures(3, h.array(1.0)),
    ),
    "a policy that there is not": (
        ValueError,
        "hoist: expected",
        lambda h: h.fv.closure_convert(lambda x: x, h.array(1.0), hoist="some"),
    ),
    "a report of a policy that there is not": (
        ValueError,
        "hoist: expected",
        lambda h: h.fv.captures(lambda x: x, h.array(1.0), hoist="some"),
    ),
    "a call of another shape": (
        errors.StructureError,
        "expected",
        lambda h: h.fv.Closure(lambda x: x, h.array([1.0]))(h.array([1.0, 2.0])),
    ),
    "too many arguments": (
        errors.StructureError,
        "expected",
        lambda h: h.fv.Closure(lambda x: x, h.array([1.0]))(h.array([1.0]), h.array([1.0])),
    ),
    "arguments by keyword": (
        TypeError,
        "takes its arguments by position",
        lambda h: h.fv.Closure(lambda x: x, h.array([1.0]))(x=h.array([1.0])),
    ),
    "a hoisted value of another shape": (
        errors.StructureError,
        "expected",
        lambda h: _with_a_wrong_value(h),
    ),
}


def _with_a_wrong_value(host: Host) -> None:
    x = host.array([1.0, 2.0])
    converted, hoisted = host.fv.closure_convert(lambda y: y * x, x, hoist="all")
    assert len(hoisted) == 1
    converted(x, host.array([1.0]))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_same_error_for_a_mistake(host, mistake) -> None:
    error, text, make = MISTAKES[mistake]
    with pytest.raises(error, match=text) as caught:
        make(host)
    assert caught.type is error


def test_the_same_ways_to_call_a_solver(host) -> None:
    fv, one = host.fv, host.array(1.0)

    @fv.root
    def solve(equation, start, args=(), *, halves=1):
        for _ in range(halves):
            start = start - equation(start, *args) / 2
        return start

    a = host.array(3.0)
    line = lambda x: 2 * (x - a)
    for x in (
        solve(line, one),
        solve(start=one, equation=line),
        solve(line, one, None),
        solve(line, start=one, args=None),
        solve(lambda x, b: 2 * (x - b), one, (a,)),
        solve(lambda x, b: 2 * (x - b), one, args=a, halves=2),
    ):
        assert float(x) == 3.0
    by_argument = lambda b: solve(lambda x, b: 2 * (x - b), one, args=(b,))
    assert float(host.gradient(by_argument)(a)) == 1.0


def test_truncated_backward_passes(host) -> None:
    """Of x = x / 2 + a, whose derivative is 2: as many powers of 1/2 as there are terms."""
    for linear_solve, expected in (
        (host.fv.one_step, 1.0),
        (host.fv.neumann(1), 1.0),
        (host.fv.neumann(3), 1.75),
        (host.fv.neumann(2, step=0.5), 0.5 + 0.375),
    ):
        iterate = host.fv.fixed_point(lambda fun, x0: 2 * fun(0 * x0), linear_solve=linear_solve)
        x = lambda a, iterate=iterate: iterate(lambda x: x / 2 + a, 0 * a)
        assert float(host.gradient(x)(host.array(3.0))) == expected
    with pytest.raises(ValueError, match="terms: expected a number of at least 1"):
        host.fv.neumann(0)


def test_aux_of_the_solver_and_perhaps_of_the_function(host) -> None:
    def step(fun, x0):
        value = fun(x0)
        value = value[0] if isinstance(value, tuple) else value
        return x0 - value, {"value": value}

    solve, one = host.fv.root(step, has_aux=True), host.array([1.0, 2.0])
    for wrap in (lambda value: value, lambda value: (value, "aux")):
        x, aux = solve(lambda x, wrap=wrap: wrap(x - 3.0), one)
        assert (x.tolist(), aux["value"].tolist()) == ([3.0, 3.0], [-2.0, -1.0])
        total = lambda a, wrap=wrap: solve(lambda x: wrap(x - a), one)[0].sum()
        assert host.gradient(total)(one).tolist() == [1.0, 1.0]
    # An unknown that is a pair, and a value that is one.
    pair = host.fv.root(lambda fun, x0: (x0, None), has_aux=True)
    assert pair(lambda x: (x[0] - 1.0, x[1] - 2.0), (one[0], one[1]))[1] is None


def test_methods_work_in_both(host) -> None:
    fv, one = host.fv, host.array(1.0)

    class Solver:
        def __init__(self, own):
            self.own = own
            self.held = fv.root(self.run)

        def run(self, fun, x0):
            return x0 * self.own - fun(x0 * self.own)

        @fv.root
        def solve(self, fun, x0):
            return x0 * self.own - fun(x0 * self.own)

    for name in ("solve", "held"):
        solve = lambda a, own, name=name: getattr(Solver(own), name)(lambda x: x - a * own, one)
        a = host.array(3.0)
        assert float(host.gradient(lambda a, solve=solve: solve(a, one))(a)) == 1.0
        # By what the object holds: through the function alone, not through the solver's own use.
        assert float(host.gradient(lambda own, solve=solve: solve(a, own))(one)) == 3.0
    assert float(Solver.solve(Solver(one), lambda x: x - 3.0, one)) == 3.0
