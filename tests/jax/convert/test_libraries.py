"""Libraries with primitives of their own, built on equinox: fresh lambdas that compute the same are
equal, any others are not, and derivatives stay those of the library."""

from __future__ import annotations

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freevars.jax as fv
from freevars.jax import _compat
from freevars.jax._convert import serialize

eqx = pytest.importorskip("equinox")
lx = pytest.importorskip("lineax")
optx = pytest.importorskip("optimistix")
dfx = pytest.importorskip("diffrax")

X = jnp.array([0.5, -0.25, 2.0])
V = jnp.array([1.0, 2.0, -1.0])
STRUCT = jax.ShapeDtypeStruct((3,), jnp.float32)


def structure(fun):
    return jax.tree.structure(fv.Closure(fun, X))


def root(w, shift=0.0, tolerance=1e-6):
    residual = lambda x: lambda y, _: y - jnp.cos(y * w) + x + shift
    solver = optx.Newton(tolerance, tolerance)
    return lambda x: optx.root_find(residual(x), solver, jnp.ones(3)).value


def minimum(w, shift=0.0, power=2):
    loss = lambda x: lambda y, _: jnp.sum((y - jnp.cos(x * w) + shift) ** power)
    return lambda x: optx.minimise(loss(x), optx.BFGS(1e-5, 1e-5), jnp.zeros(3)).value


def least_squares(w, shift=0.0):
    residual = lambda x: lambda y, _: y - jnp.cos(x * w) + shift
    solver = optx.LevenbergMarquardt(1e-5, 1e-5)
    return lambda x: optx.least_squares(residual(x), solver, jnp.zeros(3)).value


def conjugate_gradients(w, shift=1.0):
    operator = lx.FunctionLinearOperator(
        lambda y: w**2 * y + shift * y, STRUCT, lx.positive_semidefinite_tag
    )
    return lambda x: lx.linear_solve(operator, x, lx.CG(1e-6, 1e-6)).value


def trajectory(w, rate=1.0, adjoint=None, method=None):
    term = dfx.ODETerm(lambda t, y, args: -rate * y * w)
    controller = dfx.PIDController(1e-4, 1e-4)
    solve = partial(
        dfx.diffeqsolve,
        term,
        method or dfx.Tsit5(),
        0.0,
        1.0,
        0.1,
        adjoint=adjoint or dfx.RecursiveCheckpointAdjoint(),
        stepsize_controller=controller,
        max_steps=64,
    )
    return lambda x: solve(x).ys[0]


def checkpointed(w, factor=1.0):
    body = lambda s: (s[0] + 1, factor * jnp.sin(s[1] * w))
    loop = partial(eqx.internal.while_loop, kind="checkpointed", max_steps=4)
    return lambda x: loop(lambda s: s[0] < 3, body, (0, x))[1]


def guarded(w, message="too large"):
    return lambda x: eqx.error_if(x * w, jnp.any(x > 1e3), message)


FAMILIES = {
    "lineax.CG": conjugate_gradients,
    "error_if": guarded,
    "checkpointed while_loop": checkpointed,
    "optimistix.root_find": root,
    "optimistix.minimise": minimum,
    "optimistix.least_squares": least_squares,
    "diffrax.diffeqsolve": trajectory,
    "diffrax, DirectAdjoint": partial(trajectory, adjoint=dfx.DirectAdjoint()),
    "diffrax, ForwardMode": partial(trajectory, adjoint=dfx.ForwardMode()),
}
OTHERS = {
    "lineax.CG": {"shift": 2.0},
    "error_if": {"message": "far too large"},
    "checkpointed while_loop": {"factor": 2.0},
    "optimistix.root_find": {"shift": 1.0},
    "optimistix.minimise": {"power": 4},
    "optimistix.least_squares": {"shift": 1.0},
    "diffrax.diffeqsolve": {"rate": 2.0},
    "diffrax, DirectAdjoint": {"method": dfx.Heun()},
    "diffrax, ForwardMode": {"rate": 2.0},
}
QUICK = ("lineax.CG", "error_if", "optimistix.root_find")


def families(names, quick=QUICK):
    slow = lambda name: () if name in quick else (pytest.mark.slow,)
    return [pytest.param(name, marks=slow(name)) for name in names]


@pytest.mark.parametrize("name", families(FAMILIES))
def test_equal_exactly_where_the_program_is(name) -> None:
    make = FAMILIES[name]
    one = structure(make(V))
    assert one == structure(make(V + 1))
    assert one != structure(make(V, **OTHERS[name]))


@pytest.mark.slow
def test_options_of_a_solver_count() -> None:
    assert structure(root(V)) != structure(root(V, tolerance=1e-3))
    one, other = (structure(trajectory(V, method=m)) for m in (dfx.Tsit5(), dfx.Dopri5()))
    assert one != other


NUMBERS = ("lineax.CG", "checkpointed while_loop", "optimistix.root_find", "diffrax.diffeqsolve")


@pytest.mark.parametrize("name", families(NUMBERS, ("lineax.CG",)))
def test_derivatives_are_those_of_the_library(name) -> None:
    """Also for other captured values than the program was first converted for."""
    make = FAMILIES[name]
    keep = fv.Closure(make(V), X)

    def loss(via, w, x):
        return jnp.sum(via(make(w))(x) ** 2)

    convert = lambda fun: fv.Closure(fun, X)
    both = lambda via: jax.value_and_grad(partial(loss, via), argnums=(0, 1))
    got, expected = (both(via)(V + 0.5, X) for via in (convert, lambda fun: fun))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    assert jax.tree.structure(keep) == structure(make(V + 0.5))


@pytest.mark.parametrize("name", families(FAMILIES))
def test_what_was_pickled_has_the_derivatives_too(name, monkeypatch) -> None:
    f = fv.Closure(FAMILIES[name](V), X)
    data = pickle.dumps(f)
    monkeypatch.setattr(serialize, "_MARKED", {})  # as where the program was never seen
    g = pickle.loads(data)
    if "ForwardMode" in name:
        derivative = lambda f: jax.jvp(f, (X,), (V,))
    else:
        derivative = lambda f: jax.vjp(lambda f, x: f(x), f, X)[1](V)
    for a, b in zip(*map(jax.tree.leaves, (derivative(f), derivative(g))), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_error_at_run_time_is_still_raised() -> None:
    f = fv.Closure(guarded(V), X)
    with pytest.raises(Exception, match="too large"):
        jax.block_until_ready(f(1e4 * X))


@pytest.mark.slow
def test_a_rule_inside_a_parameter_of_a_primitive_counts() -> None:
    """equinox holds the program of a function inside of the structure of an operand."""

    def make(w, factor):
        @jax.custom_jvp
        def sine(y):
            return jnp.sin(y)

        sine.defjvp(lambda p, t: (jnp.sin(p[0]), factor * jnp.cos(p[0]) * t[0]))
        residual = lambda x: lambda y, _: y + 0.1 * sine(y * w) - x
        return lambda x: optx.root_find(residual(x), optx.Newton(1e-6, 1e-6), X).value

    assert structure(make(V, 1.0)) == structure(make(V + 1, 1.0))
    assert structure(make(V, 1.0)) != structure(make(V, 2.0))


# A primitive of equinox's kind, made here.


def applied(fun):
    """A primitive whose parameters hold a function of the user's, one way or another."""
    internal = eqx.internal

    def impl(fun, x):
        return fun(x)

    def abstract(fun, x):
        return jax.core.ShapedArray(x.shape, x.dtype)

    def jvp(primals, tangents):
        (fun, x), (_, dot) = primals, tangents
        return jax.jvp(fun, (x,), (dot,))

    if not PRIMITIVES:
        definitions = map(internal.filter_primitive_def, (impl, abstract))
        rule = internal.filter_primitive_jvp(jvp)
        PRIMITIVES.append(internal.create_vprim("apply", *definitions, rule, None))
    return lambda x: internal.filter_primitive_bind(PRIMITIVES[0], fun, x)


PRIMITIVES: list = []


def _scaled(c, x):
    return c * x


class Scaled(eqx.Module):
    factor: float = eqx.field(static=True)

    def __call__(self, x):
        return self.factor * x


class Plain:
    """No pytree, no equality of its own."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x


HELD = {
    "a partial": lambda c: partial(_scaled, c),
    "a module with a static field": Scaled,
    "a program": lambda c: eqx.filter_closure_convert(lambda x: c * x + 0 * X, X),
}


@pytest.mark.parametrize("name", HELD)
def test_what_parameters_hold_counts_by_what_it_is(name) -> None:
    make = HELD[name]
    assert structure(applied(make(2.0))) == structure(applied(make(2.0)))
    assert structure(applied(make(2.0))) != structure(applied(make(3.0)))
    for c in (2.0, 3.0):
        f = fv.Closure(applied(make(c)), X)
        np.testing.assert_allclose(f(X), c * X, rtol=1e-6)
        np.testing.assert_allclose(jax.jvp(f, (X,), (X,))[1], c * X, rtol=1e-6)


def test_functions_and_other_objects_count_by_identity() -> None:
    for make in (lambda c: lambda x: c * x, Plain):
        held = make(2.0)
        assert structure(applied(held)) == structure(applied(held))
        assert structure(applied(make(2.0))) != structure(applied(make(2.0)))
        assert structure(applied(make(2.0))) != structure(applied(make(3.0)))


def test_a_rule_that_raises_counts_by_what_it_raises() -> None:
    def make(w, message="not here", kind=ValueError):
        @jax.custom_jvp
        def fixed(x):
            return 1.0 * x

        @fixed.defjvp
        def _(primals, tangents):
            raise kind(message)

        return lambda x: fixed(x) * w

    assert structure(make(V)) == structure(make(V + 1))
    assert structure(make(V)) != structure(make(V, "elsewhere"))
    assert structure(make(V)) != structure(make(V, kind=RuntimeError))
    f = fv.Closure(make(V), X)
    np.testing.assert_allclose(f(X), X * V)
    np.testing.assert_allclose(jax.grad(lambda f: jnp.sum(f(X)))(f).values[0], X)
    with pytest.raises(ValueError, match="not here"):
        jax.grad(lambda x: jnp.sum(f(x)))(X)


def test_programs_are_mapped_wherever_parameters_hold_them() -> None:
    jaxpr = jax.make_jaxpr(jnp.sin)(1.0)
    other = jax.make_jaxpr(jnp.cos)(1.0)
    static = jax.tree_util.Partial(jnp.sin)  # a node whose metadata is a function
    tree = jax.tree.structure({"a": static, "b": (1, None)})
    held = (1, [jaxpr], {"p": partial(max, jaxpr)}, tree)
    same = _compat.map_programs(held, lambda p: p)
    assert same is held
    changed = _compat.map_programs(held, lambda p: other)
    assert changed[1] == [other]
    assert changed[2]["p"].args == (other,)
    assert changed[3] == tree
