"""Equations beside which something stays that is no program.

The rules of `custom_vmap` and `linear_call` stay functions. They count by identity, and what they
may read beside the program is a constant, so that no other value stands for it in one of the two
alone. A foreign function counts by what JAX itself compares, target and attributes; an operation
that is an object of a class (`hijax`) by its class and all that the object holds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.scipy
import numpy as np
import pytest
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import linear_call

import freevars.jax as fv
from freevars.errors import CaptureError

try:
    from jax.experimental.hijax import HiPrim
except ImportError:  # before JAX 0.12
    from jax._src.hijax import VJPHiPrimitive as HiPrim

X = jnp.array([0.5, -0.25, 2.0])
V = jnp.array([1.0, 2.0, -1.0])


@custom_vmap
def batched(x):
    return jnp.sin(x)


@batched.def_vmap
def _(size, is_batched, x):
    return 2.0 * jnp.sin(x), is_batched[0]  # other numbers, to see that it ran


def fresh(w):
    @custom_vmap
    def scaled(x):
        return x * w

    @scaled.def_vmap
    def _(size, is_batched, x):
        return 3.0 * x * w, is_batched[0]

    return lambda x: scaled(x)


def linear(w):
    forward, transposed = (lambda r, y: r * w * y), (lambda r, g: r * w * g)
    return lambda x: linear_call(forward, transposed, X, x)


def structure(fun):
    return jax.tree.structure(fv.Closure(fun, X))


def test_a_rule_counts_by_identity() -> None:
    make = lambda w: lambda x: batched(x) * w
    assert structure(make(V)) == structure(make(V + 1))
    assert structure(fresh(V)) != structure(fresh(V))
    assert structure(linear(V)) != structure(linear(V))


def test_a_rule_runs_and_what_is_outside_can_be_replaced() -> None:
    f = fv.Closure(lambda x: batched(x) * V, X)
    other = jax.tree.map(lambda v: 2 * v, f)
    np.testing.assert_allclose(jax.vmap(other)(X[None])[0], 4 * jnp.sin(X) * V, rtol=1e-6)
    np.testing.assert_allclose(other(X), 2 * jnp.sin(X) * V, rtol=1e-6)


@pytest.mark.parametrize("make", [fresh, linear])
def test_what_a_rule_may_read_is_a_constant(make) -> None:
    f = fv.Closure(make(V), X)
    assert any(c is V for c in f.constants)
    np.testing.assert_allclose(f(X), make(V)(X), rtol=1e-6)
    doubled = jax.tree.map(lambda v: 2 * v, f)  # nothing that both read changes in one of them
    if make is fresh:
        np.testing.assert_allclose(jax.vmap(doubled)(X[None])[0], 3 * X * V, rtol=1e-6)
    else:
        got, expected = (jax.vjp(g, X)[1](X)[0] for g in (f, make(V)))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    with pytest.raises(CaptureError, match=r"captures the traced value w \("):
        jax.jit(lambda w: fv.Closure(make(w), X)(X))(V)


def reads_its_argument_elsewhere(w):
    """A function of x and w, whose rule takes x from its arguments and w from outside."""

    @custom_vmap
    def scaled(x, v):
        return x * v

    @scaled.def_vmap
    def _(size, is_batched, x, v):
        return jax.jit(lambda x: x * w)(x), is_batched[0]

    return lambda x: scaled(x, w) + w[0] - w[0]


def transposes_with_what_is_outside(w):
    forward, transposed = (lambda r, y: r * y), (lambda r, g: w * g)
    return lambda x: linear_call(forward, transposed, w, x)


@pytest.mark.parametrize("make", [reads_its_argument_elsewhere, transposes_with_what_is_outside])
@pytest.mark.parametrize("w", [V, np.array([1.0, 2.0, -1.0])], ids=["JAX", "NumPy"])
def test_what_a_rule_reads_on_its_own_is_a_constant_for_its_function_too(make, w) -> None:
    f = fv.Closure(make(w), X)
    assert f.values == ()
    np.testing.assert_array_equal(f.constants[0], w)
    by_rule = lambda f: jax.vmap(f)(X[None])[0] if make is reads_its_argument_elsewhere else f(X)
    np.testing.assert_allclose(by_rule(f), X * w, rtol=1e-6)
    with pytest.raises(CaptureError, match=r"captures the traced value w \(.*in the rule too"):
        jax.grad(lambda w: jnp.sum(by_rule(fv.Closure(make(w), X))))(V)


def test_a_traced_value_that_only_a_rule_reads_is_refused() -> None:
    def make(w):
        @custom_vmap
        def same(x):
            return x

        same.def_vmap(lambda size, is_batched, x: (x * w, is_batched[0]))
        return same

    assert fv.Closure(make(V), X).constants == ()
    with pytest.raises(CaptureError, match=r"captures the traced value w \("):
        jax.grad(lambda w: jnp.sum(jax.vmap(fv.Closure(make(w), X))(X[None])))(V)


def test_every_one_of_many_functions_is_looked_at() -> None:
    arrays = [jnp.full(3, 1.0 + i) for i in range(80)]
    functions = [reads_its_argument_elsewhere(w) for w in arrays]
    assert len(fv.Closure(lambda x: sum(f(x) for f in functions), X).constants) == len(arrays)


def test_a_rule_that_calls_its_function_is_looked_at_once() -> None:
    runs = []

    @custom_vmap
    def one_by_one(x, v):
        return x * v

    @one_by_one.def_vmap
    def _(size, is_batched, x, v):
        runs.append(size)
        return jax.lax.map(lambda xv: one_by_one(*xv), (x, v)), is_batched[0]

    f = fv.Closure(lambda x: one_by_one(x, V), X)
    assert len(runs) == 1
    np.testing.assert_array_equal(f.values[0], V)  # the rule takes it from its arguments


def test_a_rule_is_given_weak_values_as_they_are() -> None:
    @custom_vmap
    def rounded(w):
        return w

    @rounded.def_vmap
    def _(size, is_batched, w):
        return (jnp.bfloat16(1) * w).astype(jnp.float32), is_batched[0]

    weak = jnp.broadcast_to(jnp.asarray(2.0 + 2.0**-10), (3,))
    fun = lambda w: X * rounded(w)
    expected = jax.vmap(fun)(weak[None])  # bfloat16 holds no 2 + 2^-10
    np.testing.assert_array_equal(jax.vmap(fv.Closure(fun, weak))(weak[None]), expected)
    batch = jax.tree.map(lambda w: w[None], fv.Closure(lambda x: fun(weak) + 0 * x, X))
    np.testing.assert_array_equal(jax.vmap(lambda f: f(X))(batch), expected)


# Foreign functions.

MATRIX = jnp.array([[2.0, 0.5, 0.25], [1.0, 4.0, -0.5], [-1.0, 0.5, 3.0]])


@pytest.fixture
def lapack():
    """On the CPU, with what JAX itself gives to LAPACK's functions before it calls them."""
    if jax.default_backend() != "cpu":
        pytest.skip("LAPACK's functions run on the CPU")
    jax.block_until_ready(jax.scipy.linalg.solve_triangular(MATRIX, X))


def triangular(a, b, part="L"):
    """The solution of a triangular system, by a function of LAPACK's that JAX has registered."""
    return jax.ffi.ffi_call(
        "lapack_strsm_ffi",
        jax.ShapeDtypeStruct(b.shape, b.dtype),
        vmap_method="sequential",
        input_output_aliases={1: 0},
        input_layouts=[(1, 0), (1, 0)],
        output_layouts=(1, 0),
    )(a, b, **{k: np.uint8(ord(v)) for k, v in _OPTIONS.items()}, uplo=np.uint8(ord(part)))


_OPTIONS = {"side": "L", "trans_x": "N", "diag": "N"}


def solves(a, part="L"):
    return lambda x: triangular(a, x[:, None], part)[:, 0]


def test_a_foreign_function_counts_by_target_operands_and_attributes(lapack) -> None:
    assert structure(solves(MATRIX)) == structure(solves(MATRIX.T))
    assert structure(solves(MATRIX)) != structure(solves(MATRIX, "U"))
    other = lambda x: solves(MATRIX)(2.0 * x)
    assert structure(solves(MATRIX)) != structure(other)


def test_a_foreign_function_runs_on_other_values(lapack) -> None:
    f = fv.Closure(solves(MATRIX), X)
    other = jax.tree.unflatten(jax.tree.structure(f), [MATRIX + jnp.eye(3)])
    for g, a in ((f, MATRIX), (other, MATRIX + jnp.eye(3))):
        expected = np.linalg.solve(np.tril(a), X)
        np.testing.assert_allclose(g(X), expected, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(g)(X), expected, rtol=1e-5)
        np.testing.assert_allclose(jax.vmap(g)(X[None])[0], expected, rtol=1e-5)


def test_a_foreign_function_without_a_rule_has_no_derivative(lapack) -> None:
    for f in (solves(MATRIX), fv.Closure(solves(MATRIX), X)):
        with pytest.raises(ValueError, match="cannot be differentiated"):
            jax.grad(lambda x, f=f: jnp.sum(f(x)))(X)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda f: jnp.sum(f(X)))(fv.Closure(solves(MATRIX), X))


def solves_with_rule(a):
    """The same with a derivative: A dy = dx - dA y."""

    @jax.custom_jvp
    def solution(a, x):
        return solves(a)(x)

    @solution.defjvp
    def _(primals, tangents):
        (a, x), (da, dx) = primals, tangents
        y = solution(a, x)
        return y, jnp.linalg.solve(jnp.tril(a), dx - jnp.tril(da) @ y)

    return lambda x: solution(a, x)


def test_a_foreign_function_has_the_derivative_of_its_rule(lapack) -> None:
    f, g = fv.Closure(solves_with_rule(MATRIX), X), fv.Closure(solves_with_rule(MATRIX.T), X)
    assert jax.tree.structure(f) == jax.tree.structure(g)
    explicit = lambda a, x: jnp.sum(jnp.linalg.solve(jnp.tril(a), x) ** 2)
    by_a, by_x = jax.grad(explicit, (0, 1))(MATRIX, X)
    got_f, got_x = jax.grad(lambda f, x: jnp.sum(f(x) ** 2), (0, 1))(f, X)
    np.testing.assert_allclose(got_f.values[0], by_a, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got_x, by_x, rtol=1e-4, atol=1e-6)


# Operations that are objects of a class.


class Power(HiPrim):
    """x^n, with twice its derivative."""

    def __init__(self, x, n, function=None):
        self.in_avals, self.out_aval = (jax.typeof(x),), jax.typeof(x)
        self.params = {"n": n, "function": function}
        super().__init__()

    def expand(self, x):
        return x**self.n if self.function is None else self.function(x)

    def vjp_fwd(self, _, x):
        return self(x), x

    def vjp_bwd_retval(self, x, g):
        return (2.0 * g * self.n * x ** (self.n - 1),)


class Same(Power):
    pass


def power(w, n, kind=Power, function=None):
    return lambda x: kind(x, n, function)(x) * w


def test_an_object_of_a_class_counts_by_class_and_parameters() -> None:
    assert structure(power(V, 3)) == structure(power(V + 1, 3))
    assert structure(power(V, 3, function=jnp.sin)) == structure(power(V, 3, function=jnp.sin))
    different = [
        power(V, 2),
        power(V, 3.0),
        power(V, 3, kind=Same),
        power(V, 3, function=jnp.sin),
        power(V, 3, function=jnp.cos),
        power(V, 3, function=lambda x: x),
    ]
    found = [structure(f) for f in (power(V, 3), *different)]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    fresh = lambda: power(V, 3, function=lambda x: x)  # two functions that JAX tells apart
    assert structure(fresh()) != structure(fresh())


class Scaled(HiPrim):
    """x times a factor that is no parameter."""

    def __init__(self, x, factor):
        self.in_avals, self.out_aval, self.params = (jax.typeof(x),), jax.typeof(x), {}
        self.factor = factor
        super().__init__()

    def expand(self, x):
        return x * self.factor


def test_an_object_of_a_class_counts_with_all_that_it_holds() -> None:
    make = lambda w: lambda x: Scaled(x, w)(x) + 0.0
    f, g = fv.Closure(make(V), X), fv.Closure(make(V + 1), X)
    assert jax.tree.structure(f) != jax.tree.structure(g)
    assert jax.tree.structure(f) == structure(make(V))
    np.testing.assert_allclose(g(X), X * (V + 1), rtol=1e-6)
    assert any(c is V for c in fv.Closure(lambda x: make(V)(x) * V, X).constants)
    with pytest.raises(CaptureError, match=r"captures the traced value w \("):
        jax.grad(lambda w: jnp.sum(fv.Closure(make(w), X)(X)))(V)


def test_an_object_of_a_class_has_its_own_derivative() -> None:
    f = jax.tree.map(lambda v: 2.0 * v, fv.Closure(power(V, 3), X))
    np.testing.assert_allclose(f(X), 2.0 * X**3 * V, rtol=1e-6)
    by_f, by_x = jax.grad(lambda f, x: jnp.sum(f(x)), (0, 1))(f, X)
    np.testing.assert_allclose(by_f.values[0], X**3, rtol=1e-6)
    np.testing.assert_allclose(by_x, 2.0 * 3.0 * X**2 * 2.0 * V, rtol=1e-6)
