"""The derivative rules: closed forms, finite differences, every composition of transformations."""

import copy
import dataclasses
import functools
import gc
import inspect
import pickle
import subprocess
import sys
import warnings
import weakref

import equinox
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax import lax
from jax.interpreters import ad

import freevars.jax as fv
from freevars.errors import NotASolutionError, StructureError
from freevars.jax._rules.solver import ImplicitSolver
from tests.jax.processes import with_devices

TRACES = []


SLOW = pytest.mark.slow  # compiles many programs, or large ones


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def newton_steps(fun, x0, steps=8):
    """Newton's method on any pytree, for functions from x to something like x."""
    v0, to_x = jax.flatten_util.ravel_pytree(x0)
    flat = lambda v: jax.flatten_util.ravel_pytree(fun(to_x(v)))[0]
    jacobian = jax.jacfwd(flat, holomorphic=jnp.iscomplexobj(v0))
    step = lambda _, v: v - jnp.linalg.solve(jacobian(v), flat(v))
    return to_x(lax.fori_loop(0, steps, step, v0))


@fv.root
def newton(fun, x0, *args, steps=8, **kwargs):
    TRACES.append(newton)
    return newton_steps(lambda x: fun(x, *args, **kwargs), x0, steps)


@fv.argmin
def minimize(fun, x0):
    """The minimiser."""
    TRACES.append(minimize)
    return newton_steps(jax.grad(fun), x0)


@fv.fixed_point
def iterate(fun, x0, steps=60):
    TRACES.append(iterate)
    return lax.fori_loop(0, steps, lambda _, x: fun(x), x0)


def by_root(a):
    return newton(lambda x: x**2 - a, 1.0)


def by_argmin(a):
    return minimize(lambda x: x**3 / 3 - a * x, 1.0)


def by_fixed_point(a):
    return iterate(lambda x: (x + a / x) / 2, 1.0)


ROOTS = pytest.mark.parametrize("square_root", [by_root, by_argmin, by_fixed_point])
A = 2.0
D1, D2, D3 = 0.5 * A**-0.5, -0.25 * A**-1.5, 0.375 * A**-2.5  # derivatives of the square root


def close(got, expected, rtol=1e-9):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=rtol, atol=1e-12)


# --- Every composition ----------------------------------------------------------------------------


@SLOW
@ROOTS
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_first_order(square_root, jit):
    close(jit(square_root)(A), A**0.5)
    close(jit(jax.grad(square_root))(A), D1)
    close(jax.grad(jit(square_root))(A), D1)
    close(jit(lambda a: jax.jvp(square_root, (a,), (1.0,))[1])(A), D1)
    close(jax.jvp(jit(square_root), (A,), (1.0,))[1], D1)


@SLOW
@ROOTS
def test_second_and_third_order(square_root):
    for second in (
        jax.grad(jax.grad(square_root)),
        jax.jit(jax.jacfwd(jax.jacrev(square_root))),
        jax.jacrev(jax.jacfwd(square_root)),
        jax.jacfwd(jax.jacfwd(jax.jit(square_root))),
        lambda a: jax.jvp(lambda a: jax.vjp(square_root, a)[1](1.0)[0], (a,), (1.0,))[1],
    ):
        close(second(A), D2)
    close(jax.jit(jax.grad(jax.hessian(square_root)))(A), D3)


def test_a_program_names_the_solver():
    @fv.root
    def by_halving(fun, x0):
        return x0

    solve = lambda a: by_halving(lambda x: x - a, A)
    assert "name=by_halving" in str(jax.make_jaxpr(solve)(A))

    @fv.integral
    def midpoint(f, a, b):
        return (b - a) * f((a + b) / 2)

    assert "name=midpoint" in str(jax.make_jaxpr(lambda a: midpoint(lambda t: a * t, 0.0, a))(A))


@ROOTS
def test_a_map_of_an_eager_derivative_is_one_of_jaxs(square_root):
    """Batched, compiled, differentiated, transposed, taken apart and put together again."""
    _, pull = jax.vjp(square_root, A)
    _, push = jax.linearize(square_root, A)
    pull_only = lambda ct: pull(ct)[0]
    leaves, tree = jax.tree.flatten(pull)
    maps = [pull_only, push, lambda ct: tree.unflatten(leaves)(ct)[0]]
    maps.append(lambda ct: jax.linear_transpose(push, A)(ct)[0])
    for linear in maps:
        close(linear(2.0), 2 * D1)
        close(jax.jit(linear)(2.0), 2 * D1)
        close(jax.vmap(linear)(jnp.array([1.0, -3.0])), [D1, -3 * D1])
        close(jax.jvp(linear, (1.0,), (2.0,))[1], 2 * D1)
        close(jax.grad(linear)(1.0), D1)
    with jax.disable_jit():
        close(jax.grad(square_root)(A), D1)
    close(jax.vmap(lambda _: jax.grad(square_root)(A), axis_name="i")(jnp.arange(2.0)), [D1, D1])


@SLOW
@ROOTS
def test_loops_and_checkpoint(square_root):
    def by_scan(a):  # a is both captured and the carry
        return lax.scan(lambda c, _: (square_root(a) * c / a**0.5, None), a, length=3)[0]

    close(jax.grad(by_scan)(A), 1.0)
    xs = jnp.array([1.0, A])
    over_xs = lambda s: jnp.sum(lax.scan(lambda c, x: (c, square_root(s * x)), 0.0, xs)[1])
    close(jax.grad(over_xs)(1.0), 0.5 * (1 + A**0.5))
    close(jax.jvp(jax.checkpoint(square_root), (A,), (1.0,))[1], D1)
    close(jax.grad(jax.checkpoint(square_root))(A), D1)
    close(jax.grad(lambda a: lax.cond(a > 1, square_root, lambda a: a, a))(A), D1)


@SLOW
@ROOTS
def test_vmap_over_captured_values(square_root):
    a = jnp.array([1.0, A, 5.0])
    close(jax.vmap(square_root)(a), a**0.5)
    close(jax.vmap(jax.grad(square_root))(a), 0.5 * a**-0.5)
    close(jax.grad(lambda a: jnp.sum(jax.vmap(square_root)(a)))(a), 0.5 * a**-0.5)
    close(jax.jit(jax.vmap(jax.hessian(square_root)))(a), -0.25 * a**-1.5)


@pytest.mark.slow
def test_vmap_over_a_function_that_chooses_between_programs(monkeypatch):
    """Under `vmap` JAX stops gradients of what a branch reads where it is not taken, which has no
    transpose unless lineax is imported."""
    monkeypatch.delitem(ad.primitive_transposes, lax.stop_gradient_p, raising=False)

    def solve(a):  # the cube root of a, or a / 2
        branches = [lambda x: x**3 / a - 1, lambda x: 2 * x / a - 1]
        return newton(lambda x: lax.cond(a > 0, *branches, x), jnp.asarray(1.0), steps=20)

    total = lambda a: jnp.sum(jax.vmap(solve)(a))
    a = jnp.array([8.0, -3.0])
    np.testing.assert_allclose(jax.vmap(solve)(a), [2.0, -1.5])
    for slope in (jax.grad(total), jax.jit(jax.grad(total)), jax.jacfwd(total)):
        np.testing.assert_allclose(slope(a), [1 / 12, 1 / 2])
    for bend in (jax.hessian(total), jax.jacrev(jax.grad(total))):
        np.testing.assert_allclose(bend(a), [[-1 / 144, 0], [0, 0]], atol=1e-12)


@pytest.mark.slow
def test_vmap_over_the_start_and_over_both():
    starts, a = jnp.array([1.0, -1.0]), jnp.array([1.0, A])
    solve = lambda a, x0: newton(lambda x: x**2 - a, x0)
    close(jax.vmap(solve, (None, 0))(A, starts), [A**0.5, -(A**0.5)])
    close(jax.vmap(jax.grad(solve), (None, 0))(A, starts), [D1, -D1])
    close(jax.vmap(jax.grad(solve))(a, starts), [0.5, -D1])


@SLOW
def test_twice_in_one_program_and_in_itself():
    close(jax.grad(lambda a: by_root(a) * by_root(2 * a))(A), 2**0.5)
    close(jax.jit(jax.grad(lambda a: by_root(by_root(a))))(A), 0.25 * A**-0.75)

    def nested(a):  # y^2 = sqrt(y a), so y = a^(1/3)
        return newton(lambda y: y**2 - newton(lambda x: x**2 - y * a, 1.0), 1.0)

    close(nested(A), A ** (1 / 3))
    close(jax.grad(nested)(A), A ** (-2 / 3) / 3)
    close(jax.jit(jax.jvp, static_argnums=0)(nested, (A,), (1.0,))[1], A ** (-2 / 3) / 3)


@SLOW
def test_bilevel_in_bilevel():
    def inner(t, y):  # x = t y
        return minimize(lambda x: (x - t * y) ** 2, 0.0)

    def outer(t):  # min (t y - 3)^2 + y^2, so y = 3 t / (1 + t^2)
        return minimize(lambda y: (inner(t, y) - 3) ** 2 + y**2, 0.0)

    t = 0.7
    exact = lambda t: 3 * t / (1 + t**2)
    close(outer(t), exact(t))
    close(jax.jit(jax.grad(outer))(t), jax.grad(exact)(t))
    close(jax.grad(jax.grad(outer))(t), jax.hessian(exact)(t))


@SLOW
def test_shard_map_on_several_devices():
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
import freevars.jax as fv
from jax import shard_map
@fv.root
def newton(fun, x0):
    return jax.lax.fori_loop(0, 20, lambda _, x: x - fun(x) / jax.grad(fun)(x), x0)
def each(a, scale):
    solve = lambda a, s: newton(lambda x: x * x - s * a, jnp.ones_like(a) + 0 * s)
    return jax.vmap(solve, (0, None))(a, scale)
mesh = Mesh(np.array(jax.devices()), ("i",))
f = shard_map(each, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"))
a = jnp.arange(1.0, 9.0)
for g in (jax.grad, lambda f, n: jax.jit(jax.grad(f, n))):
    got = g(lambda a, s: jnp.sum(f(a, s)), (0, 1))(a, 2.0)
    np.testing.assert_allclose(got[0], 0.5 * 2**0.5 * a**-0.5, rtol=1e-5)
    np.testing.assert_allclose(got[1], np.sum(0.5 * a**0.5 * 2**-0.5), rtol=1e-5)
tangent = jax.jvp(lambda s: f(a, s), (2.0,), (1.0,))[1]
np.testing.assert_allclose(tangent, 0.5 * a**0.5 * 2**-0.5, rtol=1e-5)
print(jax.device_count())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=with_devices(4),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4"


# --- What a function captures ---------------------------------------------------------------------


def test_float_repeated_and_unused():
    def solve(w, unused):
        return newton(lambda x: (unused, x**2 - w * w - 0.0 * w)[1], 1.0)

    close(jax.grad(solve, (0, 1))(A, 3.0), (1.0, 0.0))


@SLOW
def test_integers_booleans_and_keys():
    key = jax.random.key(0)
    uniform = jax.random.uniform(key, dtype=jnp.float64)

    def solve(a, n, flag, key):
        scale = lambda: jnp.where(flag, a, 0.0) * jax.random.uniform(key, dtype=jnp.float64)
        return newton(lambda x: x**n - scale(), 1.0)

    for transform in (lambda f: f, jax.jit):
        got = transform(jax.grad(solve))(A, jnp.int32(2), jnp.bool_(True), key)
        close(got, 0.5 * (uniform / A) ** 0.5)
    many = jax.vmap(jax.grad(solve), (None, 0, None, None))
    close(many(A, jnp.array([1, 2]), True, key), [uniform, 0.5 * (uniform / A) ** 0.5])


@SLOW
def test_complex_unknowns_and_values():
    a = 1.0 + 2.0j
    solve = lambda a: newton(lambda z: z**2 - a, 1.0 + 1.0j)
    close(solve(a), a**0.5)
    close(jax.jvp(solve, (a,), (1.0 + 0.0j,))[1], 0.5 * a**-0.5)
    close(jax.grad(solve, holomorphic=True)(a), 0.5 * a**-0.5)
    real = lambda t: jnp.abs(solve(t * a)) ** 2  # not holomorphic
    close(jax.grad(real)(1.0), abs(a))

    # A real objective of a complex unknown: |z - a|^2 + Im(z)^2 is least at Re a + i Im a / 2.
    def least(a):
        @fv.argmin
        def descend(fun, z0):
            return lax.fori_loop(0, 100, lambda _, z: z - 0.2 * jnp.conj(jax.grad(fun)(z)), z0)

        return descend(lambda z: jnp.abs(z - a) ** 2 + z.imag**2, 0.5 + 0.5j)

    close(least(a), 1.0 + 1.0j)
    close(jax.jvp(least, (a,), (1.0j,))[1], 0.5j)
    close(jax.grad(lambda t: least(t * a).imag)(1.0), 1.0)


def test_a_real_unknown_and_a_complex_captured_value():
    def solve(c):
        return newton(lambda x: x**2 - jnp.abs(c) ** 2, 1.0)

    c = 3.0 + 4.0j
    close(jax.grad(solve)(c), jax.grad(jnp.abs)(c))
    vjp_only = lambda c: newton(lambda x: x**2 - square_with_vjp(jnp.abs(c)), 1.0)
    close(jax.grad(vjp_only)(c), jax.grad(jnp.abs)(c))


@SLOW
def test_unknowns_are_any_pytree():
    def solve(a):
        residual = lambda x: {"u": x["u"] + x["v"][0] - a, "v": (x["u"] - x["v"][0] * a,)}
        x = newton(residual, {"u": jnp.ones(()), "v": (jnp.ones((), "float32"),)}, steps=3)
        return x["u"]

    # u + v = a and u = a v: u = a^2 / (1 + a).
    a = 2.0
    close(solve(a), a**2 / (1 + a), 1e-6)
    close(jax.grad(solve)(a), (a**2 + 2 * a) / (1 + a) ** 2, 1e-6)


MIXED = {
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f, 1), 0),
    "forward over reverse": lambda f: jax.jacfwd(jax.jacrev(f, 1), 0),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f, 1), 0),
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f, 1), 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("order", [*MIXED])
@pytest.mark.parametrize("solve", [iterate, fv.root(newton_steps, dense_limit=0)])
def test_an_equation_may_read_nothing_of_what_is_differentiated_by(solve, order):
    """u = s v + p and v = 0.5 u + q: the second reads neither s nor p."""

    def u(s, p):
        system = lambda x: {"u": s * x["v"] + p, "v": 0.5 * x["u"] + 1.0}
        minus = lambda x: jax.tree.map(jnp.subtract, system(x), x)
        x = solve(system if solve is iterate else minus, {"u": 1.0, "v": 1.0})
        return x["u"] + 3 * x["v"] ** 2

    def exact(s, p):
        x = (s + p) / (1 - s / 2)
        return x + 3 * (0.5 * x + 1.0) ** 2

    close(MIXED[order](u)(0.4, 0.3), jax.jacfwd(jax.jacfwd(exact, 1), 0)(0.4, 0.3))


@SLOW
def test_a_module_a_method_and_a_default_argument():
    net = equinox.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
    equilibrium = lambda net: iterate(lambda x: 0.3 * net(x) + 1.0, jnp.zeros(2))
    grads = equinox.filter_grad(lambda net: jnp.sum(equilibrium(net)))(net)
    bump = lambda t: equinox.tree_at(lambda n: n.layers[0].bias, net, net.layers[0].bias + t)
    slope = lambda t: jnp.sum(equilibrium(bump(t)))
    close(jnp.sum(grads.layers[0].bias), (slope(1e-5) - slope(-1e-5)) / 2e-5, 1e-6)

    class Model:
        def __init__(self, a):
            self.a = a

        def residual(self, x, scale=2.0):
            return x**2 - scale * self.a

    close(jax.grad(lambda a: newton(Model(a).residual, 1.0))(A), 0.5)
    close(jax.grad(lambda a: newton(lambda x, s=a: x**2 - s, 1.0))(A), D1)


def test_a_closure_is_a_function():
    captured = jnp.asarray(A)
    closure = fv.Closure(lambda x: x**2 - captured, jnp.ones(()))
    close(newton(closure, jnp.ones(())), A**0.5)
    slope = jax.grad(lambda closure: newton(closure, jnp.ones(())))(closure)
    close(slope.values[0], D1)


def test_float32_and_a_python_start():
    with jax.enable_x64(False):
        x, slope = jax.value_and_grad(by_root)(A)
        assert x.dtype == slope.dtype == jnp.float32
        close(slope, D1, 1e-6)
        assert newton(lambda x: x - A, 1.0).weak_type is False


@SLOW
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    a = jnp.asarray([A, 3.0], dtype)

    def solve(a):
        x = iterate(lambda x: (x + a / x) / 2, jnp.ones(2, dtype))
        assert x.dtype == dtype
        return jnp.sum(x)

    for transform in (jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))):
        slope = transform(solve)(a)
        assert slope.dtype == dtype
        close(slope.astype(float), 0.5 * a.astype(float) ** -0.5, 2e-2)
    with pytest.raises(NotASolutionError, match=r"up to (3\.0e-01|1\.8e-01) is accepted"):
        jax.grad(lambda a: iterate(lambda x: (x + a / x) / 2, 9 + 0 * a, steps=0)[0])(a)


@SLOW
@pytest.mark.parametrize(
    "x0", [{}, (), None, jnp.zeros(0), {"a": jnp.zeros((0, 3))}], ids=lambda x: str(np.shape(x))
)
def test_no_unknowns(x0):
    same = lambda fun, x0: x0
    functions = {
        fv.root: lambda x, a: jax.tree.map(lambda leaf: a * leaf, x),
        fv.fixed_point: lambda x, a: jax.tree.map(lambda leaf: a * leaf, x),
        fv.argmin: lambda x, a: a * sum(map(jnp.sum, jax.tree.leaves(x)), 0.0),
    }
    for decorate, fun in functions.items():
        for how in (None, lx.QR(), lx.GMRES(rtol=1e-9, atol=1e-9), lambda matvec, b: matvec(b)):
            solver = decorate(same, linear_solve=how)

            def solve(a, solver=solver, fun=fun):
                x = solver(lambda x: fun(x, a), x0)
                return sum(map(jnp.sum, jax.tree.leaves(x)), 3 * a)

            close([jax.grad(solve)(A), jax.jacfwd(solve)(A), jax.jit(jax.grad(solve))(A)], 3.0)


LEAST = {"on_failure": "least_squares"}
SETTINGS = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "disable_jit": jax.disable_jit,
    "checking_leaks": jax.checking_leaks,
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
}


@SLOW
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("how", [{}, {"linear_solve": lx.CG(rtol=1e-9, atol=1e-9)}, LEAST])
def test_settings_that_find_mistakes_find_none_here(setting, how):
    if setting == "checking_leaks" and "linear_solve" in how:
        pytest.skip("a cache of equinox's, which lineax uses, keeps tracers")
    half = jnp.asarray(0.5)
    step = lambda fun: lambda _, x: x - half * jax.grad(fun)(x)
    descend = fv.argmin(lambda fun, x0: lax.fori_loop(0, 60, step(fun), x0), **how)
    solve = lambda a: jnp.sum(descend(lambda x: jnp.sum((x - a * a) ** 2), jnp.ones(3)))
    with SETTINGS[setting]():
        for transform in (jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))):
            close(transform(solve)(jnp.asarray(A)), 6 * A)
        close(jax.hessian(solve)(jnp.asarray(A)), 6.0)


# --- Functions with rules of their own ------------------------------------------------------------


@jax.custom_vjp
def square_with_vjp(x):
    return x**2


square_with_vjp.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))


@jax.custom_jvp
def square_with_jvp(x):
    return x**2


square_with_jvp.defjvp(lambda x, d: (x[0] ** 2, 2 * x[0] * d[0]))


def bisect(fun, x0):
    """Needs no derivative of its function."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        return jax.tree.map(
            lambda a, b: jnp.where(fun(middle) > 0, a, b), (low, middle), (middle, high)
        )

    return sum(lax.fori_loop(0, 60, halve, (x0 - 3.0, x0 + 3.0))) / 2


@SLOW
@pytest.mark.parametrize("square", [square_with_vjp, square_with_jvp])
def test_a_function_with_a_rule(square):
    solver = fv.root(bisect)
    solve = lambda a: solver(lambda x: square(x) - a, 2.5)
    for transform in (lambda f: f, jax.jit):
        close(transform(jax.grad(solve))(A), D1)
        close(transform(lambda a: jax.jvp(solve, (a,), (1.0,))[1])(A), D1)
        close(transform(jax.grad(jax.grad(solve)))(A), D2)
    for second in (jax.hessian, lambda f: jax.jacrev(jax.jacfwd(f)), forward_twice):
        close(second(solve)(A), D2)
        close(jax.jit(second(solve))(A), D2)
    close(jax.jacfwd(jax.hessian(solve))(A), D3)
    # One that depends on a value by which nothing is differentiated yet, and on x and such a value.
    product = lambda a, b: solver(lambda x: square(x) * b - a * square(b), 2.5)  # sqrt(a b)
    mixed = 0.25 * (A * 3.0) ** -0.5
    close(jax.jacfwd(jax.grad(product), 1)(A, 3.0), mixed)
    close(jax.jacfwd(jax.jacfwd(product), 1)(A, 3.0), mixed)
    by_value = lambda a: solver(lambda x: x**2 - square(a), 2.5)
    close(jax.jvp(by_value, (A,), (1.0,))[1], 1.0)
    descend = fv.argmin(lambda fun, x0: bisect(jax.grad(fun), x0))
    by_descent = lambda a: descend(lambda x: x * square(x) / 3 - a * x, 2.5)
    close(jax.grad(by_descent)(A), D1)
    close(jax.jvp(by_descent, (A,), (1.0,))[1], D1)


def forward_twice(f):
    return jax.jacfwd(jax.jacfwd(f))


def test_a_rule_inside_a_rule():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * square_with_vjp(x) * g,))
    descend = fv.argmin(lambda fun, x0: bisect(jax.grad(fun), x0))
    close(jax.jvp(lambda a: descend(lambda x: cube(x) / 3 - a * x, 2.5), (A,), (1.0,))[1], D1)


# --- Arguments and options ------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_solver_collects_is_differentiated():
    close(jax.grad(lambda b: newton(lambda x, b: x**2 - 2 * b, 1.0, b))(3.0), 0.5 * (2 / 3) ** 0.5)
    by_keyword = lambda b: newton(lambda x, *, b: x**2 - 2 * b, 1.0, b=b)
    close(jax.grad(by_keyword)(3.0), 0.5 * (2 / 3) ** 0.5)
    both = lambda a: newton(lambda x, b, *, how: (x**2 - a * b)[how], jnp.ones(1), a, how=...)
    close(jax.grad(lambda a: both(a)[0])(3.0), 1.0)


def test_a_tuple_named_args_is_differentiated():
    @fv.root
    def like_scipy(fun, x0, args=(), tol=1e-3):
        assert tol == 1e-3
        return newton_steps(lambda x: fun(x, *args), x0)

    fun = lambda x, a, mode: {"square": x**2 - a}[mode]
    close(jax.grad(lambda a: like_scipy(fun, 1.0, (a, "square")))(A), D1)
    close(jax.grad(lambda a: like_scipy(lambda x, a: x**2 - a, 1.0, args=a))(A), D1)
    close(jax.grad(lambda a: like_scipy(lambda x: x**2 - a, 1.0))(A), D1)


def test_options_and_the_start_have_derivative_zero():
    @fv.root
    def damped(fun, x0, damping, *, table):
        step = lambda _, x: x - damping * table["s"] * fun(x) / jax.grad(fun)(x)
        return lax.fori_loop(0, 200, step, x0)

    def solve(a, x0, damping, s):
        return damped(lambda x: x**2 - a, x0, damping, table={"s": s, "name": "newton"})

    for transform in (lambda f: f, jax.jit):
        close(transform(jax.grad(solve, (0, 1, 2, 3)))(A, 1.0, 0.5, 1.0), (D1, 0.0, 0.0, 0.0))
    tangent = jax.jvp(lambda x0: solve(A, x0, 0.5, 1.0), (1.0,), (1.0,))[1]
    assert float(tangent) == 0.0


def test_options_of_equal_value_and_another_type_are_not_mixed_up():
    @fv.root
    def typed(fun, x0, option):
        return x0 + {int: 1.0, float: 2.0, bool: 3.0}[type(option)] + 0 * fun(x0)

    solve = lambda option: float(typed(lambda x: x, 0.0, option))
    assert [solve(1), solve(1.0), solve(True)] == [1.0, 2.0, 3.0]
    inside = fv.root(lambda fun, x0, option: typed.__wrapped__(fun, x0, *option))
    solve = lambda option: float(inside(lambda x: x, 0.0, option))
    assert [solve(frozenset({n})) for n in (1, 1.0, True)] == [1.0, 2.0, 3.0]

    @dataclasses.dataclass(frozen=True)
    class Option:
        number: object

        def __iter__(self):
            return iter((self.number,))

    assert [solve(Option(n)) for n in (1, 1.0, True)] == [1.0, 2.0, 3.0]
    signed = fv.root(lambda fun, x0, zero: jnp.copysign(x0, zero) + 0 * fun(x0))
    assert [float(signed(lambda x: x, 1.0, z)) for z in (0.0, -0.0)] == [1.0, -1.0]


def test_the_solver_may_capture_traced_values():
    def solve(a, damping):
        @fv.root
        def damped(fun, x0):
            return lax.fori_loop(0, 200, lambda _, x: x - damping * fun(x) / jax.grad(fun)(x), x0)

        return damped(lambda x: x**2 - a, 1.0)

    for transform in (lambda f: f, jax.jit):
        close(transform(jax.grad(solve, (0, 1)))(A, 0.5), (D1, 0.0))
    close(jax.vmap(jax.grad(solve))(jnp.array([1.0, A]), jnp.array([0.5, 0.6])), [0.5, D1])
    scanned = lambda a: lax.scan(lambda c, _: (c, solve(a, c)), 0.5, length=1)[1][0]
    close(jax.jit(jax.grad(scanned))(A), D1)


def test_an_option_may_be_a_function_that_captures_a_traced_value():
    @fv.root
    def preconditioned(fun, x0, step):
        return lax.fori_loop(0, 100, lambda _, x: x - step(fun(x)), x0)

    solve = lambda a, s: preconditioned(lambda x: x**2 - a, 1.5, lambda f: s * f)
    close(jax.grad(solve, (0, 1))(A, 0.3), (D1, 0.0))


@pytest.mark.slow
def test_aux_of_the_solver_and_of_the_function():
    @fv.root(has_aux=True)
    def with_both(fun, x0):
        x = newton_steps(lambda x: fun(x)[0], x0)
        return x, {"again": fun(x)[1], "steps": 8}

    def solve(a):
        return with_both(lambda x: (x**2 - a, {"x": x, "a": a}), 1.0)

    x, aux = solve(A)
    close([x, aux["again"]["x"], aux["steps"]], [A**0.5, A**0.5, 8])
    for transform in (lambda f: f, jax.jit):
        slope, aux = transform(jax.grad(solve, has_aux=True))(A)
        close([slope, aux["again"]["a"]], [D1, A])
    close(jax.grad(lambda a: solve(a)[1]["again"]["a"])(A), 0.0)  # declared constant

    @fv.argmin(has_aux=True)
    def only_the_solver(fun, x0):
        return newton_steps(jax.grad(fun), x0), 8

    x0 = (jnp.ones(()), jnp.ones(()))
    pair = lambda a: only_the_solver(lambda x: (x[0] - a) ** 2 + (x[1] - 2 * a) ** 2, x0)[0][1]
    close(jax.grad(pair)(A), 2.0)
    two = fv.root(lambda fun, x0: (newton_steps(lambda x: jnp.stack(fun(x)), x0), 0), has_aux=True)
    equations = lambda a: two(lambda x: (x[0] - a, x[1] - x[0] * a), jnp.ones(2))[0][1]
    close(jax.grad(equations)(A), 2 * A)


def test_a_solver_that_cannot_be_traced():
    @fv.root(jit=False)
    def python(fun, x0):
        x = float(x0)
        while abs(fun(x)) > 1e-12:
            x -= float(fun(x) / jax.grad(fun)(x))
        return x

    close(python(lambda x: x**2 - A, 1.0), A**0.5)
    close(jax.grad(lambda a: python(lambda x: x**2 - jax.lax.stop_gradient(a) * a / A, 1.0))(A), D1)


# --- What a decorated solver is -------------------------------------------------------------------


def test_signature_name_docstring_and_repr():
    assert minimize.__name__ == "minimize"
    assert minimize.__doc__ == "The minimiser."
    assert list(inspect.signature(newton).parameters) == ["fun", "x0", "args", "steps", "kwargs"]
    assert repr(newton) == "<newton with an implicit derivative rule>"
    assert isinstance(newton, ImplicitSolver)


def test_names_of_arguments_are_the_solver_s():
    @fv.root
    def solver(residual, guess=1.0):
        return newton_steps(residual, guess)

    fun = lambda x: x**2 - A
    close([solver(fun), solver(residual=fun, guess=2.0), solver(fun, guess=1.0)], [A**0.5] * 3)


@pytest.mark.slow
def test_partials_jitted_functions_bound_methods_and_objects_are_solvers():
    class Bisection:
        def __call__(self, fun, x0):
            return bisect(fun, x0)

        def solve(self, fun, x0):
            return bisect(fun, x0)

    partial = functools.partial(newton_steps, steps=9)
    assert repr(fv.root(partial)).startswith("<newton_steps")
    for solver in (partial, jax.jit(newton_steps), Bisection(), Bisection().solve):
        decorated = fv.root(solver)
        solve = lambda a, decorated=decorated: decorated(lambda x: x**2 - a, 2.5)
        close(jax.grad(solve)(A), D1)


def test_a_jitted_solver_may_take_the_function_as_an_argument():
    inner = jax.jit(lambda fun, x0, a, b: newton_steps(lambda x: fun(x, a, b=b), x0))

    @fv.root
    def one_option(fun, x0, a, **kwargs):
        return inner(fun, x0, a, **kwargs)

    @fv.root
    def no_option(fun, x0, *args, **kwargs):
        return inner(fun, x0, *args, **kwargs)

    with pytest.raises(TypeError, match="missing"):  # a is an option: fun is converted without it
        one_option(lambda x, a, b: x**2 - a * b, 1.0, 2.0, b=1.0)
    close(jax.grad(lambda a: no_option(lambda x, a, b: x**2 - a * b, 1.0, a, b=1.0))(A), D1)


class Newton:
    """A solver with a state, in the four ways of a method."""

    def __init__(self, steps, weight=1.0):
        self.steps = steps
        self.weight = weight  # the solver's own, not the function's
        self.held = fv.root(self.run)

    def run(self, fun, x0):
        TRACES.append(Newton)
        return newton_steps(fun, x0 * self.weight, self.steps)

    solve = fv.root(run)
    on_host = fv.root(fv.on_host(lambda self, fun, x0: np.sqrt(x0**2 - fun(x0)) * self.weight))

    @fv.root(jit=False)
    def eagerly(self, fun, x0):
        return x0 if self.steps == 0 else newton_steps(fun, x0 * self.weight, self.steps)


@pytest.mark.parametrize("name", ["solve", "held", "on_host", "eagerly"])
def test_a_method_is_bound_like_a_function(name):
    thing = Newton(9)
    solve = lambda a: getattr(thing, name)(lambda x: x**2 - a, 1.5)
    close(jax.grad(solve)(A), D1)
    if name != "eagerly":  # it takes known values alone
        close(jax.jit(jax.grad(solve))(A), D1)


@pytest.mark.parametrize("name", ["solve", "held"])
def test_the_object_of_a_method_gets_no_derivative(name):
    # The weight moves the start, which does not matter, and the function, which does.
    def solve(a, weight):
        return getattr(Newton(9, weight), name)(lambda x: x**2 - a * weight, 1.5)

    for transformed in (jax.grad(solve, (0, 1)), jax.jit(jax.grad(solve, (0, 1)))):
        close(transformed(A, 1.0), [D1, 0.5 * A**0.5])
    close(jax.jvp(lambda weight: solve(A, weight), (1.0,), (1.0,))[1], 0.5 * A**0.5)


def test_what_the_object_of_a_method_holds_is_what_it_holds_at_the_call():
    thing, start = Newton(0), 3.0
    solve = lambda: [getattr(thing, name)(lambda x: x**2 - A, start) for name in ("solve", "held")]
    close(solve(), [start, start])
    thing.steps = 9
    close(solve(), [A**0.5, A**0.5])


def test_a_method_is_compiled_once_for_all_objects():
    thing = Newton(9)
    solve = lambda a, thing=thing: thing.solve(lambda x: x**2 - a, 1.5)
    close(jax.grad(solve)(A), D1)
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    try:
        found = jax.grad(solve)(3.0), jax.grad(solve)(3.0, Newton(9))
    finally:
        jax.monitoring.clear_event_listeners()
    close(found, [0.5 * 3.0**-0.5] * 2)
    assert [e for e in events if "backend_compile" in e] == []


def test_the_method_of_a_pytree():
    class Layer(equinox.Module):
        weight: jax.Array
        damping: jax.Array

        @fv.fixed_point
        def solve(self, fun, z):
            return lax.fori_loop(0, 60, lambda _, z: z + self.damping * (fun(z) - z), z)

    def solve(layer):  # z = weight z + 1
        return layer.solve(lambda z: layer.weight * z + 1.0, 0.0)

    half = Layer(jnp.array(0.5), jnp.array(0.9))
    for gradient in (jax.grad(solve)(half), jax.jit(jax.grad(solve))(half)):
        close([gradient.weight, gradient.damping], [4.0, 0.0])
    both = jax.tree.map(lambda a: jnp.stack([a, a / 2]), half)
    close(jax.vmap(jax.grad(solve))(both).weight, [4.0, 1 / 0.75**2])


def test_the_objects_of_methods_are_not_kept():
    def solved(k):
        thing = Newton(9, jnp.full(100, float(k)).mean())
        close(jax.grad(lambda a: thing.solve(lambda x: x**2 - a, 1.5))(A), D1)
        return weakref.ref(thing)

    kept = [solved(k) for k in range(1, 4)]
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_copies_of_methods():
    thing = Newton(9)
    again = copy.deepcopy(thing)
    thing.steps = 0
    for solve in (again.solve, again.held, pickle.loads(pickle.dumps(again)).held):
        close(jax.grad(lambda a, solve=solve: solve(lambda x: x**2 - a, 1.5))(A), D1)
    assert copy.deepcopy(newton) is newton
    assert pickle.loads(pickle.dumps(newton)) is newton


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda: fv.root(lambda fun: fun), TypeError, "a function and a starting point"),
        (lambda: fv.root(3), TypeError, "a solver is a function"),
        (lambda: fv.root(bisect, on_failure="ignore"), ValueError, "on_failure: expected"),
        (lambda: fv.root(bisect, linear_solve=3), TypeError, "linear_solve: expected None"),
        (lambda: newton(lambda x: x, 1), TypeError, r"x0: expected a floating .* got dtype int64"),
        (
            lambda: newton(lambda x: x["a"], {"a": "1"}),
            TypeError,
            r"x0\['a'\]: expected a floating .* got '1'",
        ),
        (lambda: newton(3, 1.0), TypeError, "needs a callable"),
        (lambda: newton(lambda x: x), TypeError, "missing a required argument: 'x0'"),
        (
            lambda: fv.root(lambda f, x: (x, x))(lambda x: x, 1.0),
            StructureError,
            "the returned x does not match",
        ),
        (
            lambda: fv.root(lambda f, x: x.astype("float32"))(lambda x: x, 1.0),
            StructureError,
            r"expected float64\[\], got float32\[\]. A solver returns",
        ),
        (
            lambda: fv.root(lambda f, x: x, has_aux=True)(lambda x: x, 1.0),
            StructureError,
            r"a solver returns \(x, aux\)",
        ),
        (
            lambda: fv.root(lambda f, x: x - f(x)[0])(lambda x: jnp.stack([x, x]), 1.0),
            StructureError,
            "2 components for 1 unknown",
        ),
        (
            lambda: fv.root(lambda f, x: x - f(x))(lambda x: x.astype(int), 1.0),
            StructureError,
            r"a function that returns floating or complex equations, got .* dtype=int64",
        ),
        (
            lambda: fv.implicit(lambda f, x: "zero")(lambda f, x: x)(lambda x: x, 1.0),
            StructureError,
            "a condition that returns floating or complex equations, got zero",
        ),
        (
            lambda: fv.argmin(lambda f, x: x)(lambda x: 2.0 * x, jnp.ones(2)),
            StructureError,
            r"an objective that is a real number of shape \(\), got .*2,",
        ),
        (
            lambda: fv.argmin(lambda f, x: x)(lambda x: x.astype(int), 1.0),
            StructureError,
            r"an objective that is a real number of shape \(\), got .* dtype=int64",
        ),
        (
            lambda: fv.least_squares(lambda f, x: x)(lambda x: "none", 1.0),
            StructureError,
            "returns floating or complex residuals, got none",
        ),
        (
            lambda: fv.fixed_point(lambda f, x: x)(lambda x: x[None], jnp.ones(1)),
            StructureError,
            "expected a function that returns a value like x",
        ),
    ],
)
def test_mistakes_are_told(wrong, error, text):
    with pytest.raises(error, match=text):
        wrong()


# --- Cost -----------------------------------------------------------------------------------------


def test_fresh_lambdas_never_trace_the_solver_again():
    def everything(a):
        fresh = lambda a: newton(lambda x: x**2 - a * 1.5, 1.0)
        return (
            fresh(a),
            jax.grad(fresh)(a),
            jax.jvp(fresh, (a,), (1.0,)),
            jax.vmap(jax.grad(fresh))(jnp.stack([a, a])),
            jax.grad(jax.grad(fresh))(a),
        )

    everything(jnp.array(A))
    before = len(TRACES)
    for k in range(3):
        everything(jnp.array(A + k))
    assert len(TRACES) == before


def test_only_perturbed_values_cost_anything():
    big = jnp.ones(1000)
    solve = lambda a, w: newton(lambda x: x**2 - a * jnp.sum(w), 1.0)
    by_a = jax.make_jaxpr(lambda a, d: jax.jvp(lambda a: solve(a, big), (a,), (d,)))(A, 1.0)
    by_both = jax.make_jaxpr(lambda *x: jax.jvp(solve, x[:2], x[2:]))(A, big, 1.0, big)
    equations = lambda program: str(program).count(" = ")  # nested ones too
    assert equations(by_a) < equations(by_both)


def test_nothing_is_kept():
    big = np.ones(1000)
    alive = weakref.ref(big)
    fun = lambda x, big=big: x**2 - jnp.sum(big)
    dead = weakref.ref(fun)
    close(newton(fun, 1.0, steps=20), 1000**0.5)
    del fun, big
    gc.collect()
    assert alive() is None
    assert dead() is None


@SLOW
def test_finite_differences():
    def solve(t):
        return newton(
            lambda x: jnp.stack([x[0] ** 3 + t[0] * x[1] - 1, jnp.sin(t[1] * x[1]) + x[0] - 0.5]),
            jnp.array([0.5, 0.5]),
            steps=20,
        )

    t = jnp.array([1.2, 0.8])
    slope = jax.jacrev(solve)(t)
    step = lambda i: 1e-5 * jnp.eye(2)[i]
    for i in range(2):
        central = (solve(t + step(i)) - solve(t - step(i))) / 2e-5
        close(slope[:, i], central, 1e-7)
    close(jax.jacfwd(solve)(t), slope)


def test_what_a_numpy_solver_returns_is_an_array_of_jax():
    @fv.root(jit=False)
    def solver(fun, x0):
        return np.asarray(x0 - fun(x0))

    x = solver(lambda x: x - 2.0, jnp.ones(3))
    assert isinstance(x, jax.Array)
    np.testing.assert_array_equal(x, 2.0)


@pytest.mark.parametrize("n", [1, pytest.param(600, marks=pytest.mark.slow)])
def test_an_equation_that_reads_nothing_of_what_is_differentiated_by(n) -> None:
    """Of the unknown's leaves one has no direction of its own, and one no entries."""

    def solve(fun, x0):
        del fun
        root = jnp.full(n, 2.0) ** 0.5
        return {"a": root, "b": 3 * root, "c": x0["c"]}

    def fun(x, t):
        return {"a": x["a"] ** 2 - t, "b": x["b"] - 3 * x["a"], "c": x["c"]}

    x0 = {"a": jnp.ones(n), "b": jnp.ones(n), "c": jnp.zeros((0, 2))}
    total = lambda t: jnp.sum(fv.root(solve, dense_limit=1)(lambda x: fun(x, t), x0)["b"])
    for derivative in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(derivative(total)(2.0), n * 1.5 / 2**0.5, rtol=1e-5)


def test_one_unknown_beside_a_leaf_without_entries() -> None:
    solver = fv.root(lambda fun, x0: {"a": jnp.sqrt(2.0), "b": x0["b"]})
    f = lambda t: solver(
        lambda x: {"a": x["a"] ** 2 - t, "b": x["b"]}, {"a": 1.0, "b": jnp.zeros(0)}
    )["a"]
    np.testing.assert_allclose(jax.grad(f)(2.0), 0.5 / 2**0.5, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(f)))(jnp.full(2, 2.0)), 0.5 / 2**0.5)


@pytest.mark.slow
@pytest.mark.parametrize("outer", [lambda f: f, jax.jit])
def test_an_unknown_that_is_the_same_for_all_of_a_batch_beside_one_that_is_not(outer) -> None:
    """Where the solver goes leaf by leaf, it finds w = b once: u = a b."""

    @fv.root
    def richardson(fun, x0):
        step = lambda _, x: jax.tree.map(lambda x, r: x - r / 2, x, fun(x))
        return lax.fori_loop(0, 60, step, x0)

    def solve(a, b):
        fun = lambda x: {"u": x["u"] - a * x["w"], "w": x["w"] - b}
        return richardson(fun, {"u": 0.0, "w": jnp.float32(0.0)})

    a, b = jnp.array([1.0, 2.0, 3.0]), jnp.float32(2.0)
    every = outer(jax.vmap(solve, in_axes=(0, None)))

    def total(a, b):
        x = every(a, b)
        return jnp.sum(x["u"] ** 2) + jnp.sum(x["w"])

    by_a, by_b = jax.grad(total, (0, 1))(a, b)
    np.testing.assert_allclose(by_a, 2 * a * b**2, rtol=1e-6)
    np.testing.assert_allclose(by_b, 2 * b * jnp.sum(a**2) + 3, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(total, (a, b), (a, b))[1], by_a @ a + by_b * b, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["raise", "warn"])
def test_the_rank_promotion_of_a_user_is_not_ours(mode) -> None:
    """A matrix times a vector's entries inside of a rule is no mistake of theirs; one in the
    function is."""

    def loss(a):
        found = fv.scipy.root(lambda x: x**3 + x - a, jnp.ones(2)).x
        near = lambda x: jnp.sum((x - found) ** 2)
        sides = [(0, None), (None, 5)]
        zero = {"type": "eq", "fun": lambda x: x.sum() - 1}
        x = fv.scipy.minimize(near, jnp.zeros(2), method="SLSQP", constraints=zero, bounds=sides).x
        decay = lambda t, y: -x[0] * y
        y = fv.scipy.solve_ivp(decay, (0, 1.0), jnp.ones(2), t_eval=jnp.array([0.5, 1.0])).y
        return jnp.sum(y) + fv.scipy.quad(lambda t: jnp.sum(jnp.exp(-x * t)), 0, 1.0)[0]

    a = jnp.array([2.0, 1.8])
    wanted = jax.grad(loss)(a)
    with jax.numpy_rank_promotion(mode), warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(jax.grad(loss)(a), wanted, rtol=1e-6)
        matrix = jnp.ones((2, 2))
        with pytest.raises((ValueError, UserWarning), match="rank_promotion"):
            jax.grad(lambda a: jnp.sum(fv.scipy.root(lambda x: matrix[0] * x - a * matrix, a).x))(a)
