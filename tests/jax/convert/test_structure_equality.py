"""Which closures have equal structures: exactly those that compute the same thing from their values.

Every pair that must be unequal is also called through one jitted function, because that is where a
wrong equality would give a wrong number.
"""

# ruff: noqa: E501 (a table of functions, one a line)

from __future__ import annotations

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas

import freevars.jax as fv

X = jnp.array([0.5, -0.25, 2.0])
V = jnp.array([1.0, 2.0, -1.0])
SQUARE = jnp.arange(9.0).reshape(3, 3) + 4 * jnp.eye(3)


def structure(fun, *args):
    return jax.tree.structure(fv.Closure(fun, *args))


def compiled(fun):
    """What makes a program of its own for each structure: its number is the number of structures."""
    calls = []

    @jax.jit
    def apply(f, x):
        calls.append(None)
        return fun(f, x)

    return apply, calls


# Must be unequal. Each entry gives two functions of an array of shape (3,).


def rule_capturing(c):
    """A custom_jvp whose rule captures a Python number."""

    @jax.custom_jvp
    def sine(x):
        return jnp.sin(x)

    @sine.defjvp
    def _(primals, tangents):
        return sine(*primals), c * tangents[0]

    return sine


def vjp_rule_capturing(c):
    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), None), lambda _, ct: (c * ct,))
    return sine


def fwd_capturing(c):
    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), jnp.cos(x) * c), lambda cos, ct: (cos * ct,))
    return sine


def callback_adding(c):
    host = lambda x: np.asarray(x + c, np.float32)
    return lambda x: jax.pure_callback(host, jax.ShapeDtypeStruct((3,), np.float32), x)


def root_with(c):
    def root(x):
        solve = lambda f, guess: guess - f(guess) / c
        return lax.custom_root(lambda y: c * (y - x), x, solve, lambda g, y: y / c)

    return root


def debug_print(text):
    def fun(x):
        jax.debug.print(text, x[0])
        return x * 2.0

    return fun


def in_context(context, fun):
    def inside(x):
        with context:
            return fun(x)

    return inside


def twice(fun):
    return lambda x: (fun(x), fun(x))


ONE, OTHER = np.array([1.0, 2.0, 3.0], np.float32), np.array([1.0, 2.0, 4.0], np.float32)

# fmt: off
UNEQUAL = {
    "literal": (lambda x: x * 2.0, lambda x: x * 3.0),
    "two lambdas on one line": [lambda x: x + 1.0, lambda x: x - 1.0],
    "sign of zero": (lambda x: jnp.copysign(x, 0.0), lambda x: jnp.copysign(x, -0.0)),
    "literal in the last bit": (lambda x: x * 0.1, lambda x: x * float(np.nextafter(np.float32(0.1), 1))),
    "captured Python number": [(lambda n: lambda x: x * n)(n) for n in (2.0, 3.0)],
    "captured bool": [(lambda n: lambda x: x + n)(n) for n in (True, False)],
    "captured NumPy scalar": [(lambda n: lambda x: x * n)(n) for n in (np.float32(2), np.float32(3))],
    "NumPy scalar or number": [(lambda n: lambda x: lax.convert_element_type(n * jnp.int32(3), float) * x)(n)
                               for n in (2, np.float32(2))],
    "axis": (lambda x: jnp.cumsum(x), lambda x: jnp.flip(jnp.cumsum(jnp.flip(x)))),
    "reduction axis": [(lambda a: lambda x: jnp.sum(jnp.outer(x, V), axis=a))(a) for a in (0, 1)],
    "dtype": [(lambda d: lambda x: x.astype(d).astype(jnp.float32))(d) for d in (jnp.int32, jnp.bfloat16)],
    "static argument": [(lambda n: lambda x: jax.jit(lambda x, n: x * n, static_argnums=1)(x, n))(n) for n in (2, 3)],
    "nested jaxpr": (lambda x: jax.jit(jnp.sin)(x), lambda x: jax.jit(jnp.cos)(x)),
    "nested jaxpr, deep": [(lambda g: lambda x: jax.jit(lambda x: jax.checkpoint(g)(x))(x))(g) for g in (jnp.sin, jnp.cos)],
    "scan body": [(lambda g: lambda x: lax.scan(lambda c, _: (g(c), None), x, length=3)[0])(g) for g in (jnp.sin, jnp.cos)],
    "scan length": [(lambda n: lambda x: lax.scan(lambda c, _: (jnp.sin(c), None), x, length=n)[0])(n) for n in (3, 4)],
    "loop bound": [(lambda n: lambda x: lax.fori_loop(0, n, lambda _, c: jnp.sin(c), x))(n) for n in (3, 4)],
    "cond branches": [(lambda a, b: lambda x: lax.cond(x[0] > 0, a, b, x))(*ab) for ab in ((jnp.sin, jnp.cos), (jnp.cos, jnp.sin))],
    "order of operands": (lambda x: x - V, lambda x: V - x),
    "order of results": (lambda x: (jnp.sin(x), jnp.cos(x)), lambda x: (jnp.cos(x), jnp.sin(x))),
    "structure of results": (lambda x: (x * 2.0, x), lambda x: [x * 2.0, x]),
    "names of results": (lambda x: {"a": x * 2.0}, lambda x: {"b": x * 2.0}),
    "static result": (lambda x: (x * 2.0, "a"), lambda x: (x * 2.0, "b")),
    "shared or not": (lambda x: jnp.sin(x) + jnp.sin(x * V), lambda x: jnp.sin(x) + jnp.cos(x * V)),
    "custom_jvp rule's capture": [rule_capturing(c) for c in (1.0, 2.0)],
    "custom_jvp rule's capture, in a jit": [jax.jit(rule_capturing(c)) for c in (1.0, 2.0)],
    "custom_jvp rule's capture, in a scan": [(lambda f: lambda x: lax.scan(lambda c, _: (f(c), None), x, length=2)[0])(rule_capturing(c)) for c in (1.0, 2.0)],
    "custom_vjp rule's capture": [vjp_rule_capturing(c) for c in (1.0, 2.0)],
    "custom_vjp fwd's capture": [fwd_capturing(c) for c in (1.0, 2.0)],
    "callback's capture": [callback_adding(c) for c in (1.0, 2.0)],
    "debug text": [debug_print(t) for t in ("{}", "x {}")],
    "effect": (lambda x: x * 2.0, debug_print("{}")),
    "custom_root": [root_with(c) for c in (1.0, 2.0)],
    "precision": [(lambda p: lambda x: jnp.dot(SQUARE, x, precision=p))(p) for p in ("default", "highest")],
    "precision context": [in_context(jax.default_matmul_precision(p), lambda x: SQUARE @ x) for p in ("bfloat16", "float32")],
    "donation": [(lambda d: lambda x: jax.jit(lambda x: x * V, donate_argnums=d)(x + 1.0))(d) for d in ((), (0,))],
    "checkpoint policy": [(lambda p: lambda x: jax.checkpoint(lambda x: jnp.sin(SQUARE @ x), policy=p)(x))(p)
                          for p in (jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.nothing_saveable)],
    "mode of indexing": [(lambda m: lambda x: x.at[jnp.array([0, 7])].get(mode=m))(m) for m in ("clip", "fill")],
    "random algorithm": [(lambda i: lambda x: jax.random.normal(jax.random.key(0, impl=i), (3,)) * x)(i) for i in ("threefry2x32", "rbg")],
    "reference": [lambda x, c=c: written_in_a_loop(c)(x) for c in (2.0, 3.0)],
    "one value or two": (lambda x: x * V * V, lambda x: x * V * jnp.copy(V)),
}
# fmt: on


@pytest.mark.parametrize("name", UNEQUAL)
def test_closures_that_differ_are_unequal(name) -> None:
    one, other = UNEQUAL[name]
    assert structure(one, X) != structure(other, X)

    def numbers(f, x):
        result = f(x)
        floats = [r for r in jax.tree.leaves(result) if isinstance(r, jax.Array)]
        try:
            total = lambda x: sum(
                jnp.sum(r) for r in jax.tree.leaves(f(x)) if isinstance(r, jax.Array)
            )
            return floats, jax.grad(total)(x)
        except ValueError as error:
            assert "callback" in str(error)  # noqa: PT017 (a callback has no derivative)
            return floats, None

    apply, _ = compiled(numbers)
    for fun in (one, other):
        got, expected = apply(fv.Closure(fun, X), X), numbers(fun, X)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_kernels_that_differ_are_unequal() -> None:
    """They have no derivative in reverse mode."""
    kernels = [kernel(2.0), kernel(3.0), kernel(2.0, lambda i: 1 - i)]
    closures = [fv.Closure(fun, X) for fun in kernels]
    assert len({jax.tree.structure(f) for f in closures}) == 3
    for fun, f in zip(kernels, closures, strict=True):
        np.testing.assert_array_equal(jax.jit(lambda f: f(X))(f), fun(X))


def test_numpy_arrays_are_values_however_deep() -> None:
    """A NumPy array inside an inner jit is a captured value; a fresh one of its type is equal."""
    closures = [
        fv.Closure((lambda c: lambda x: jax.jit(lambda x: x * c)(x))(c), X) for c in (ONE, OTHER)
    ]
    assert jax.tree.structure(closures[0]) == jax.tree.structure(closures[1])
    for f, c in zip(closures, (ONE, OTHER), strict=True):
        np.testing.assert_array_equal(f.values[0], c)
        np.testing.assert_array_equal(f(X), X * c)


def test_true_one_and_one_point_zero_differ() -> None:
    structures = {
        structure((lambda n: lambda x: x * n)(n), jnp.int32(3)) for n in (True, 1, 1.0, 1j)
    }
    assert len(structures) >= 3


def test_nan_equals_itself_and_its_bits_count() -> None:
    assert structure(lambda x: x * float("nan"), X) == structure(lambda x: x * float("nan"), X)
    quiet, other = (np.uint32(bits).view(np.float32) for bits in (0x7FC00000, 0x7FC00001))
    make = lambda nan: lambda x: jnp.where(x > 0, x, nan)
    assert structure(make(quiet), X) == structure(make(quiet), X)
    assert structure(make(quiet), X) != structure(make(other), X)


def test_types_of_arguments_and_values_differ() -> None:
    f = lambda x: x * 2
    assert structure(f, X) != structure(f, X[:2])
    assert structure(f, X) != structure(f, X.astype(jnp.bfloat16))
    assert structure(f, jnp.float32(1)) != structure(f, 1.0)  # weak type
    assert structure(f, 1) != structure(f, 1.0)
    make = lambda v: lambda x: x * v
    assert structure(make(V), X) != structure(make(V.astype(jnp.bfloat16)), X)
    assert structure(make(V), X) != structure(make(V[:1]), X)
    assert structure(lambda t: t[0], (X,)) != structure(lambda t: t[0], [X])
    assert structure(lambda x, s: x, X, "a") != structure(lambda x, s: x, X, "b")


def test_weak_values_differ() -> None:
    def made(weak):
        w = jnp.asarray(2.0)
        w = w if weak else w.astype(jnp.float32)
        return fv.Closure(lambda x: x * w, jnp.bfloat16(3))

    weak, strong = made(weak=True), made(weak=False)
    assert weak.out_struct.dtype == jnp.bfloat16
    assert strong.out_struct.dtype == jnp.float32
    assert jax.tree.structure(weak) != jax.tree.structure(strong)


WEAK = jnp.broadcast_to(jnp.asarray(2.0), (3,))
STRONG = jnp.full((3,), 2.0, jnp.float32)

WEAKNESS_DOES_NOT_MATTER = {
    "product": lambda x, w: x * w,
    "where": lambda x, w: jnp.where(x > 0, w, x),
    "rule": lambda x, w: jax.nn.softplus(w) * jax.nn.relu(x),
    "jit": lambda x, w: jax.jit(lambda w: x * w + 1)(w),
    "scan": lambda x, w: lax.scan(lambda c, _: (c * w, None), x, length=2)[0],
    "cond": lambda x, w: lax.cond(x[0] > 0, lambda x: x * w, lambda x: x, x),
    "integers": lambda x, w: x * w.astype(jnp.int32),
}
WEAKNESS_MATTERS = {
    "result": lambda x, w: 2 * w,
    "dtype": lambda x, w: (x.astype(jnp.bfloat16) * w).astype(jnp.float32),
    "dtype inside": lambda x, w: jax.jit(lambda w: jnp.bfloat16(2) * w)(w).astype(jnp.float32),
    "a rule that stays": lambda x, w: x * batched_in_bfloat16(w),
}


@custom_vmap
def batched_in_bfloat16(w):
    return w


@batched_in_bfloat16.def_vmap
def _(size, is_batched, w):
    return (jnp.bfloat16(1) * w).astype(jnp.float32), is_batched[0]


@pytest.mark.parametrize("name", WEAKNESS_DOES_NOT_MATTER)
def test_weak_and_strong_arrays_are_equal_where_it_cannot_matter(name) -> None:
    fun = WEAKNESS_DOES_NOT_MATTER[name]
    weak, strong = (fv.Closure(lambda x, w=w: fun(x, w), X) for w in (WEAK, STRONG))
    assert jax.tree.structure(weak) == jax.tree.structure(strong)
    assert weak.values[0].weak_type
    by_values = [jax.grad(lambda f: jnp.sum(f(X) ** 2))(f).values for f in (weak, strong)]
    np.testing.assert_allclose(*by_values)
    for one, w in ((weak, WEAK), (weak, 3.0 * STRONG), (strong, 3.0 * WEAK)):
        other = jax.tree.unflatten(jax.tree.structure(one), [w])
        np.testing.assert_allclose(other(X), fun(X, w))


@pytest.mark.parametrize("name", ["product", "where", "rule", "jit", "scan", "integers"])
def test_weak_and_strong_example_arrays_are_equal_where_it_cannot_matter(name) -> None:
    fun = WEAKNESS_DOES_NOT_MATTER[name]
    made = [fv.Closure(lambda w: fun(X, w), w) for w in (WEAK, STRONG)]
    assert jax.tree.structure(made[0]) == jax.tree.structure(made[1])
    for f in made:
        assert not f.in_struct[0].weak_type
        for w in (WEAK, STRONG):
            np.testing.assert_allclose(f(w), fun(X, w))


@pytest.mark.parametrize("name", WEAKNESS_MATTERS)
def test_weak_and_strong_arrays_differ_where_it_matters(name) -> None:
    fun = WEAKNESS_MATTERS[name]
    weak, strong = (fv.Closure(lambda x, w=w: fun(x, w), X) for w in (WEAK, STRONG))
    assert jax.tree.structure(weak) != jax.tree.structure(strong)
    examples = [fv.Closure(lambda w: fun(X, w), w) for w in (WEAK, STRONG)]
    assert jax.tree.structure(examples[0]) != jax.tree.structure(examples[1])


# What surrounds the conversion counts too.


CONTEXTS = {
    "matmul precision": lambda: jax.default_matmul_precision("float32"),
    "threefry_partitionable": lambda: jax.threefry_partitionable(
        not jax.config.jax_threefry_partitionable
    ),
    "PRNG": lambda: jax.default_prng_impl("rbg"),
    "mesh": lambda: jax.set_mesh(jax.make_mesh((1,), ("i",))),
    "64 bits": lambda: jax.enable_x64(True),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_settings_around_the_conversion_count(name) -> None:
    f = lambda x: jax.random.normal(jax.random.PRNGKey(0), (3,)) * (SQUARE @ x)
    outside = structure(f, X)
    with CONTEXTS[name]():
        inside = structure(f, X)
    assert outside != inside
    assert outside == structure(f, X)


# Must be equal. Each entry makes a function afresh, capturing `w`.


@jax.custom_jvp
def module_jvp(x):
    return jnp.sin(x)


module_jvp.defjvps(lambda t, ans, x: t * jnp.cos(x))


@jax.custom_vjp
def module_vjp(x):
    return jnp.sin(x)


module_vjp.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda c, ct: (c * ct,))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def module_nondiff(fun, x):
    return fun(x)


module_nondiff.defvjp(lambda fun, x: (fun(x), x), lambda fun, x, ct: jax.vjp(fun, x)[1](ct))


@partial(jax.jit, static_argnums=(1,))
def module_jit(x, n):
    return x * n


def module_callback(x):
    return np.asarray(x)


class Model:
    def __init__(self, w):
        self.w = w

    def apply(self, x):
        return jnp.tanh(self.w * x)

    __call__ = apply


def _while(w):
    def fun(x):
        body = lambda s: (s[0] + 1, jnp.sin(s[1] * w))
        return lax.while_loop(lambda s: s[0] < 3, body, (0, x))[1]

    return fun


def _own_custom_vjp(w):
    """A custom rule made afresh, whose rule captures nothing but functions."""

    @jax.custom_vjp
    def f(x, w):
        return jnp.sin(x * w)

    f.defvjp(
        lambda x, w: (jnp.sin(x * w), (x, w)),
        lambda r, ct: (ct * jnp.cos(r[0] * r[1]) * r[1], ct * jnp.cos(r[0] * r[1]) * r[0]),
    )
    return lambda x: f(x, w)


def _custom_root(w):
    def fun(x):
        solve = lambda f, guess: guess - f(guess)
        return lax.custom_root(lambda y: y - x * w, x, solve, lambda g, y: y)

    return fun


def written_in_a_loop(c):
    def fun(x):
        ref = jax.new_ref(x)

        def step(i, _):
            ref[i] = ref[i] * c

        lax.fori_loop(0, 3, step, None)
        return ref[...]

    return fun


def kernel(c, index=lambda i: i):
    def body(x, out):
        out[...] = x[...] * c

    def fun(x):
        like = jax.ShapeDtypeStruct((2,), x.dtype)
        spec, whole = pallas.BlockSpec((1,), index), pallas.BlockSpec((1,), lambda i: i)
        call = pallas.pallas_call(
            body, like, grid=(2,), in_specs=[spec], out_specs=whole, interpret=True
        )
        return call(x[:2])

    return fun


def _linear_solve(w):
    def fun(x):
        matvec = lambda v: SQUARE @ v
        return lax.custom_linear_solve(
            matvec,
            x * w,
            lambda mv, b: jnp.linalg.solve(SQUARE, b),
            lambda mv, b: jnp.linalg.solve(SQUARE.T, b),
        )

    return fun


# fmt: off
EQUAL = {
    "arithmetic": lambda w: lambda x: jnp.sum(x * w) ** 2,
    "relu": lambda w: lambda x: jax.nn.relu(x * w),
    "silu": lambda w: lambda x: jax.nn.silu(x * w),
    "softplus": lambda w: lambda x: jax.nn.softplus(x * w),
    "logsumexp": lambda w: lambda x: jax.nn.logsumexp(x * w),
    "gelu, softmax, sigmoid": lambda w: lambda x: jax.nn.gelu(x) + jax.nn.softmax(x * w) + jax.nn.sigmoid(x),
    "relu6, elu, selu, celu": lambda w: lambda x: jax.nn.relu6(x) + jax.nn.elu(x) + jax.nn.selu(x * w) + jax.nn.celu(x),
    "solve": lambda w: lambda x: jnp.linalg.solve(SQUARE, x * w),
    "inv, det, slogdet": lambda w: lambda x: jnp.linalg.inv(SQUARE) @ x * jnp.linalg.det(SQUARE * w) * jnp.linalg.slogdet(SQUARE)[1],
    "eigh, svd, qr, cholesky": lambda w: lambda x: jnp.linalg.eigh(SQUARE @ SQUARE.T)[0] * jnp.linalg.svd(SQUARE)[1] * jnp.linalg.qr(SQUARE * w)[0][0] + jnp.linalg.cholesky(SQUARE @ SQUARE.T) @ x,
    "lstsq, norm, pinv": lambda w: lambda x: jnp.linalg.lstsq(SQUARE, x * w)[0] * jnp.linalg.norm(x) + jnp.linalg.pinv(SQUARE) @ x,
    "scan": lambda w: lambda x: lax.scan(lambda c, y: (jnp.sin(c * w), y * c), x, jnp.ones(3)),
    "fori_loop": lambda w: lambda x: lax.fori_loop(0, 3, lambda i, c: jnp.sin(c * w), x),
    "while_loop": _while,
    "cond": lambda w: lambda x: lax.cond(x[0] > 0, lambda x: x * w, lambda x: x - w, x),
    "reduce": lambda w: lambda x: lax.reduce(x * w, jnp.float32(0), lambda a, b: a + 2 * b, (0,)),
    "switch": lambda w: lambda x: lax.switch(1, [lambda x: x * w, lambda x: x - w, jnp.sin], x),
    "map": lambda w: lambda x: lax.map(lambda y: y * w, x),
    "associative_scan": lambda w: lambda x: lax.associative_scan(jnp.add, x * w),
    "jit": lambda w: lambda x: jax.jit(lambda x: x * w)(x),
    "jit, twice": lambda w: lambda x: jax.jit(lambda x: jax.jit(lambda y: y * w)(x) + x)(x),
    "jit of a module": lambda w: lambda x: module_jit(x, 3) * w,
    "checkpoint": lambda w: lambda x: jax.checkpoint(lambda x: jnp.sin(x * w))(x),
    "checkpoint with a policy": lambda w: lambda x: jax.checkpoint(lambda x: jnp.sin(x * w), policy=jax.checkpoint_policies.dots_saveable)(x),
    "vmap": lambda w: lambda x: jax.vmap(lambda a, b: jnp.sin(a * b))(x, w),
    "grad": lambda w: lambda x: jax.grad(lambda x: jnp.sum(jax.nn.softplus(x * w)))(x),
    "jvp": lambda w: lambda x: jax.jvp(lambda x: jax.nn.silu(x * w), (x,), (x,)),
    "hessian": lambda w: lambda x: jax.hessian(lambda x: jnp.sum(jnp.sin(x * w)))(x),
    "custom_jvp of a module": lambda w: lambda x: module_jvp(x * w),
    "custom_vjp of a module": lambda w: lambda x: module_vjp(x * w),
    "custom rules under jit and scan": lambda w: lambda x: jax.jit(lambda x: lax.scan(lambda c, _: (module_vjp(module_jvp(c * w)), None), x, length=2)[0])(x),
    "grad of custom rules": lambda w: lambda x: jax.grad(lambda x: jnp.sum(module_vjp(module_jvp(x * w))))(x),
    "vmap of custom rules": lambda w: lambda x: jax.vmap(lambda a, b: module_vjp(module_jvp(a * b)))(x, w),
    "custom_vjp, nondiff function": lambda w: lambda x: module_nondiff(jnp.sin, x * w),
    "custom_vjp, fresh nondiff function": lambda w: lambda x: module_nondiff(lambda x: jnp.sin(x), x * w),
    "fresh custom_vjp": _own_custom_vjp,
    "custom_jvp of a capture": lambda w: lambda x: rule_capturing(2.0)(x * w),
    "custom_root": _custom_root,
    "custom_linear_solve": _linear_solve,
    "callback of a module": lambda w: lambda x: jax.pure_callback(module_callback, jax.ShapeDtypeStruct((3,), np.float32), x * w),
    "fresh debug print": lambda w: lambda x: debug_print("{}")(x * w),
    "bound method": lambda w: Model(w).apply,
    "callable object": lambda w: Model(w),
    "partial": lambda w: partial(jnp.multiply, w),
    "jitted": lambda w: jax.jit(lambda x: x * w),
    "default argument": lambda w: lambda x, w=w: x * w,
    "vjp function": lambda w: jax.vjp(lambda x: jnp.sin(x * w), w)[1],
    "linearized": lambda w: jax.linearize(lambda x: jnp.sin(x * w), w)[1],
    "random": lambda w: lambda x: jax.random.normal(jax.random.key(0), (3,)) * x * w,
    "gamma, categorical": lambda w: lambda x: jax.random.gamma(jax.random.key(0), x**2) * w * jax.random.categorical(jax.random.key(1), x),
    "special functions": lambda w: lambda x: jax.scipy.special.gammaln(x**2) + jax.scipy.special.erf(x * w) + jax.scipy.special.logit(jax.nn.sigmoid(x)),
    "where, clip, sort, indexing": lambda w: lambda x: jnp.where(x > 0, jnp.sort(x * w), jnp.clip(x, -1, 1)).at[0].set(x[jnp.argmax(x)]),
    "einsum, conv, fft": lambda w: lambda x: jnp.einsum("i,j->i", x, w) + jnp.convolve(x, w, "same") + jnp.fft.ifft(jnp.fft.fft(x)).real,
    "reference": lambda w: lambda x: written_in_a_loop(2.0)(x * w),
    "kernel": lambda w: lambda x: kernel(2.0)(x * w),
    "odeint": lambda w: lambda x: jax.experimental.ode.odeint(lambda y, t: -y, x * w, jnp.linspace(0.0, 1.0, 3)),
}
# fmt: on


@pytest.mark.parametrize("name", EQUAL)
def test_fresh_functions_of_the_same_code_are_equal(name) -> None:
    import jax.experimental.ode

    one, other = (fv.Closure(EQUAL[name](w), X) for w in (V, V + 1))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert hash(jax.tree.structure(one)) == hash(jax.tree.structure(other))
    assert len(one.values) >= 1


@pytest.mark.parametrize("name", EQUAL)
def test_traced_and_concrete_captures_are_equal(name) -> None:
    """The list of captured values is the same inside and outside a transformation."""
    import jax.experimental.ode

    if name in ("vjp function", "linearized"):
        pytest.skip("is made by a transformation of its own")
    found = []

    @jax.jit
    def inside(w):
        f = fv.Closure(EQUAL[name](w), X)
        found.append(f._program)
        return f.values

    inside(V)
    assert found[0] is fv.Closure(EQUAL[name](V), X)._program


def test_one_compilation_for_all_fresh_lambdas() -> None:
    events = []
    listen = lambda name, _seconds, **_: events.append(name)

    @jax.jit
    def newton(f, x):
        step = lambda _, x: x - f(x) / jax.grad(lambda x: jnp.sum(f(x)))(x)
        return lax.fori_loop(0, 30, step, x)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for k in range(2, 12):
            w = jnp.full(3, float(k))
            root = newton(fv.Closure(lambda x: jax.nn.softplus(x) - w, X), X)
            np.testing.assert_allclose(root, jnp.log(jnp.expm1(w)), rtol=1e-5)
            if k == 2:
                first = len([e for e in events if "backend_compile" in e])
                assert first > 0
                for j in (2.0, 3.0):  # what the loop itself compiles
                    np.testing.assert_allclose(jnp.log(jnp.expm1(jnp.full(3, j))), j, rtol=0.2)
                events.clear()
    finally:
        jax.monitoring.clear_event_listeners()
    assert [e for e in events if "backend_compile" in e] == []
    assert newton._cache_size() == 1


def test_structure_does_not_depend_on_names_or_lines() -> None:
    def first(x):
        scaled = x * V
        return jnp.sin(scaled)

    second = functools.partial(lambda unused, y: jnp.sin(y * V), None)
    assert structure(first, X) == structure(second, X)


def test_a_mutable_object_read_by_a_rule_counts_by_content() -> None:
    box = {"c": 1.0}

    @jax.custom_jvp
    def f(x):
        return jnp.sin(x)

    f.defjvp(lambda p, t: (jnp.sin(p[0]), box["c"] * t[0]))
    before = structure(lambda x: f(x), X)
    assert structure(lambda x: f(x), X) == before
    box["c"] = 2.0
    assert structure(lambda x: f(x), X) != before


def test_a_callback_counts_by_identity() -> None:
    """It is what runs, each time; nothing of it is compiled."""
    host = lambda x: np.asarray(x + 1.0, np.float32)
    make = lambda host: lambda x: jax.pure_callback(host, jax.ShapeDtypeStruct((3,), np.float32), x)
    assert structure(make(host), X) == structure(make(host), X)
    assert structure(callback_adding(1.0), X) != structure(callback_adding(1.0), X)


def test_a_global_read_by_a_rule_counts() -> None:
    global _SCALE
    _SCALE = 1.0
    before = structure(_uses_scale, X)
    _SCALE = 2.0
    assert structure(_uses_scale, X) != before


_SCALE = 1.0


@jax.custom_jvp
def _uses_scale(x):
    return jnp.sin(x)


_uses_scale.defjvp(lambda p, t: (jnp.sin(p[0]), _SCALE * t[0]))


def test_a_constant_at_another_place_is_another_program() -> None:
    held, other = jnp.array([1.0, 2.0]), jnp.array([10.0, 20.0])

    @custom_vmap
    def rule(x):
        return x * held / held

    rule.def_vmap(lambda size, is_batched, x: (x, is_batched[0]))

    def make(first, second):
        return fv.Closure(lambda x: rule(x) + first - 2 * second, jnp.zeros(2))

    one, two = make(held, other), make(other, held)
    assert one.constants[0] is held
    assert two.constants[0] is held
    assert jax.tree.structure(one) != jax.tree.structure(two)
    x = jnp.ones(2)
    np.testing.assert_array_equal(one(x), x + held - 2 * other)
    np.testing.assert_array_equal(two(x), x + other - 2 * held)


@pytest.mark.slow
def test_an_optimiser_with_a_rule_of_its_own() -> None:
    """What a `custom_vjp` of a library's captures is a value, in its body and in its rule."""
    jaxopt = pytest.importorskip("jaxopt")

    def run(w, power=2):
        solver = jaxopt.LBFGS(lambda y, x: jnp.sum((y - w * x) ** power), maxiter=3)
        return lambda x: solver.run(X, x).params

    one, two = (fv.Closure(run(w), X) for w in (V, V + 1))
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert jax.tree.structure(one) != jax.tree.structure(fv.Closure(run(V, 4), X))
    moved = jax.tree.unflatten(jax.tree.structure(one), two.values)
    np.testing.assert_allclose(moved(X), run(V + 1)(X), rtol=1e-5)
    by_x = lambda f: jax.grad(lambda x: jnp.sum(f(x)))(X)
    np.testing.assert_allclose(by_x(moved), by_x(run(V + 1)), rtol=1e-5)
