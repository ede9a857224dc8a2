"""closure_convert: what is hoisted, in which order, of every kind of callable; nothing stale."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freevars.jax as fv
from freevars.errors import CaptureError, FreevarsError, LeakError, StructureError

X = jnp.array([0.5, -0.25, 2.0])
W = jnp.array([1.0, 2.0, -1.0])


def gradient(make):
    """The gradient of sum(make(w)(X)) by w, through a conversion, and without one."""

    def converted(w):
        f, hoisted = fv.closure_convert(make(w), X)
        return jnp.sum(f(X, *hoisted))

    return jax.grad(converted)(W), jax.grad(lambda w: jnp.sum(make(w)(X)))(W)


# Closed forms and finite differences: the oracle that does not go through JAX's own autodiff.


def test_closed_form() -> None:
    def total(w):
        f, hoisted = fv.closure_convert(lambda x: jnp.sum(w**2 * x), X)
        return f(X, *hoisted)

    np.testing.assert_allclose(total(W), np.sum(np.asarray(W) ** 2 * X), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(total)(W), 2 * np.asarray(W) * X, rtol=1e-6)
    np.testing.assert_allclose(jax.hessian(total)(W), np.diag(2 * np.asarray(X)), rtol=1e-6)


def test_finite_differences() -> None:
    with jax.enable_x64(True):
        x, w = (jnp.asarray(np.asarray(v, np.float64)) for v in (X, W))

        def total(w):
            f, hoisted = fv.closure_convert(lambda x: jnp.sum(jnp.tanh(w * x) * jnp.exp(w)), x)
            return f(x, *hoisted)

        h = 1e-6
        steps = [(total(w + h * e) - total(w - h * e)) / (2 * h) for e in np.eye(3)]
        np.testing.assert_allclose(jax.grad(total)(w), steps, rtol=1e-8)


def test_complex_gradient() -> None:
    def total(z, via):
        def fun(x):
            return jnp.real(jnp.sum(jnp.exp(1j * x * z)))

        if not via:
            return fun(X)
        f, hoisted = fv.closure_convert(fun, X)
        assert [h.dtype for h in hoisted] == [jnp.complex64]
        return f(X, *hoisted)

    z = 0.5 + 0.25j
    np.testing.assert_allclose(
        jax.grad(functools.partial(total, via=True))(z),
        jax.grad(functools.partial(total, via=False))(z),
        rtol=1e-6,
    )


# What is hoisted.


def test_traced_values_are_hoisted_and_concrete_ones_stay() -> None:
    seen = []

    def outer(w):
        f, hoisted = fv.closure_convert(lambda x: w * x + W * np.asarray(X), X)
        seen.append(len(hoisted))
        return jnp.sum(f(X, *hoisted))

    jax.grad(outer)(W)
    outer(W)
    assert seen == [1, 0]


def test_all_hoists_the_same_list_inside_and_outside() -> None:
    seen = []

    def outer(w):
        fun = lambda x: w * x + V * np.array([1.0, 2.0, 3.0], np.float32)
        f, hoisted = fv.closure_convert(fun, X, hoist="all")
        seen.append([jax.typeof(h) for h in hoisted])
        return jnp.sum(f(X, *hoisted))

    V = W + 1
    jax.grad(outer)(W)
    jax.jit(outer)(W)
    outer(W)
    assert len(seen[0]) == 3
    assert [[(t.shape, t.dtype) for t in types] for types in seen] == [
        [(t.shape, t.dtype) for t in seen[0]]
    ] * 3


def test_every_dtype_is_hoisted() -> None:
    values = {
        "float": jnp.float32(2),
        "half": jnp.bfloat16(2),
        "complex": jnp.complex64(1j),
        "int": jnp.int32(3),
        "unsigned": jnp.uint8(3),
        "bool": jnp.bool_(True),
        "key": jax.random.key(0),
    }

    names = [name for name in values if name != "key"]

    @jax.jit
    def outer(values):
        def fun(x):
            noise = jax.random.normal(values["key"], ())
            return x * noise, [values[k] for k in names]

        f, hoisted = fv.closure_convert(fun, 1.0)
        assert {str(h.dtype) for h in hoisted} == {str(v.dtype) for v in values.values()}
        return f(1.0, *hoisted)[1]

    jax.tree.map(np.testing.assert_array_equal, outer(values), [values[k] for k in names])


def test_order_is_that_of_first_use() -> None:
    def order(fun, *captured):
        _, hoisted = fv.closure_convert(fun, X, hoist="all")
        return [next(i for i, c in enumerate(captured) if c is h) for h in hoisted]

    a, b, c = W, W + 1, W + 2
    assert order(lambda x: (x * c + a) * b, a, b, c) == [2, 0, 1]
    assert order(lambda x: jax.jit(lambda y: y * b * a)(x) + c, a, b, c) == [1, 0, 2]
    assert order(lambda x: (x, c, b), a, b, c) == [2, 1]
    assert order(lambda x: x * a + c * b - a, a, b, c) == [0, 2, 1]


def test_order_of_traced_values_is_that_of_first_use() -> None:
    @jax.jit
    def outer(a, b, c):
        _, hoisted = fv.closure_convert(lambda x: (x * c + a) * b, X)
        assert hoisted[0] is c
        assert hoisted[1] is a
        assert hoisted[2] is b
        return a

    outer(W, W, W)


def test_each_value_once() -> None:
    again = W
    held = [W, {"w": W}]

    def fun(x):
        inner = jax.jit(lambda y: y * W * held[0])
        return inner(x) + inner(x * again) + jax.checkpoint(lambda y: y * held[1]["w"])(x)

    f, hoisted = fv.closure_convert(fun, X, hoist="all")
    assert len(hoisted) == 1
    assert hoisted[0] is W
    np.testing.assert_allclose(f(X, 2 * W), X * 4 * W**2 + X * 8 * W**3 + X * 2 * W, rtol=1e-6)


def test_a_numpy_array_once() -> None:
    n = np.array([1.0, 2.0, 3.0], np.float32)
    fun = lambda x: x * n + jax.jit(lambda y: y * n)(x)
    f, hoisted = fv.closure_convert(fun, X, hoist="all")
    assert len(hoisted) == 1
    np.testing.assert_array_equal(hoisted[0], n)
    np.testing.assert_allclose(f(X, n + 1), 2 * X * (n + 1))


def test_dead_code_hoists_nothing() -> None:
    def fun(x):
        jnp.sin(W) * x
        jax.jit(lambda y: (y, jnp.cos(W + 1)))(x)
        kept, _ = jax.jit(lambda y: (y * 2, y * (W + 2)))(x)
        jax.lax.scan(lambda c, _: (c * (W + 3), None), x, length=2)
        return kept

    f, hoisted = fv.closure_convert(fun, X, hoist="all")
    assert hoisted == []
    np.testing.assert_array_equal(f(X), 2 * X)


def test_traced_dead_code_hoists_nothing() -> None:
    @jax.jit
    def outer(w, v):
        def fun(x):
            kept, _ = jax.jit(lambda y: (y * w, y * v))(x)
            return kept

        _, hoisted = fv.closure_convert(fun, X)
        assert hoisted == [w] or hoisted[0] is w
        assert len(hoisted) == 1
        return w

    outer(W, W)


def test_an_effect_keeps_what_it_reads(capsys) -> None:
    def fun(x):
        jax.debug.print("{}", W[0], ordered=True)
        return x

    f, hoisted = fv.closure_convert(fun, X, hoist="all")
    assert len(hoisted) == 1
    f(X, W + 41)
    jax.effects_barrier()
    assert capsys.readouterr().out == "42.0\n"


def test_other_values_may_stand_for_the_hoisted_ones() -> None:
    f, hoisted = fv.closure_convert(lambda x: x * W, X, hoist="all")
    np.testing.assert_array_equal(f(X, hoisted[0] + 1), X * (W + 1))
    np.testing.assert_array_equal(jax.vmap(f, (None, 0))(X, jnp.stack([W, W + 1]))[1], X * (W + 1))


# Every kind of callable.


class Unhashable:
    __hash__ = None

    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return jnp.sin(self.w * x)

    def method(self, x):
        return self(x)

    @staticmethod
    def of(w):
        return lambda x: jnp.sin(w * x)


class Hashable(Unhashable):
    __hash__ = object.__hash__


def kinds():
    def nested(w):
        def inner(x):
            return jnp.sin(w * x)

        return inner

    def default(w):
        def fun(x, w=w, *, s=w):
            return jnp.sin((w + s) / 2 * x)

        return fun

    sine = lambda w, x: jnp.sin(w * x)
    return {
        "lambda": lambda w: lambda x: jnp.sin(w * x),
        "nested": nested,
        "default": default,
        "bound method": lambda w: Unhashable(w).method,
        "static method": Unhashable.of,
        "partial": lambda w: functools.partial(sine, w),
        "partial of partial": lambda w: functools.partial(functools.partial(sine, w)),
        "pytree partial": lambda w: jax.tree_util.Partial(sine, w),
        "partial by keyword": lambda w: functools.partial(lambda x, w: jnp.sin(w * x), w=w),
        "hashable object": Hashable,
        "unhashable object": Unhashable,
        "jitted": lambda w: jax.jit(lambda x: jnp.sin(w * x)),
        "jitted method": lambda w: jax.jit(Hashable(w).method),
        "checkpointed": lambda w: jax.checkpoint(lambda x: jnp.sin(w * x)),
        "vmapped": lambda w: lambda x: jax.vmap(lambda a, b: jnp.sin(a * b))(w, x),
        "gradient": lambda w: jax.grad(lambda x: jnp.sum(jnp.cos(w * x))),
        "vjp": lambda w: lambda x: jax.vjp(lambda x: jnp.sin(w * x), x)[1](w)[0],
        "made by vjp": lambda w: lambda x: jax.vjp(lambda y: jnp.sin(w * y), w)[1](x)[0],
        "composed": lambda w: functools.reduce(
            lambda f, g: lambda x: g(f(x)), [jnp.sin, lambda x: w * x, jnp.cos]
        ),
        "ufunc's method": lambda w: w.__mul__,
        "converted": lambda w: functools.partial(
            lambda f, hoisted, x: f(x, *hoisted), *fv.closure_convert(lambda x: jnp.sin(w * x), X)
        ),
        "closure": lambda w: fv.Closure(lambda x: jnp.sin(w * x), X),
    }


@pytest.mark.parametrize("kind", kinds())
def test_kinds_of_callables(kind) -> None:
    got, expected = gradient(kinds()[kind])
    assert jnp.any(expected != 0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    f = fv.Closure(kinds()[kind](W), X)
    np.testing.assert_allclose(f(X), kinds()[kind](W)(X), rtol=1e-6)


def test_a_function_made_by_vjp_itself() -> None:
    def outer(w, via):
        pullback = jax.vjp(lambda x: jnp.sin(w * x), X)[1]
        if via:
            f, hoisted = fv.closure_convert(pullback, X)
            assert hoisted
            return jnp.sum(f(X, *hoisted)[0])
        return jnp.sum(pullback(X)[0])

    np.testing.assert_allclose(
        jax.grad(outer)(W, via=True), jax.grad(outer)(W, via=False), rtol=1e-6
    )


def test_an_equinox_module() -> None:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, "scalar", 4, 1, key=jax.random.key(0))

    def loss(model, via):
        if via:
            f = fv.Closure(model, X)
            assert len(f.values) == 4
            return f(X)
        return model(X)

    got, expected = (eqx.filter_grad(functools.partial(loss, via=via))(model) for via in (1, 0))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    other = eqx.nn.MLP(3, "scalar", 4, 1, key=jax.random.key(1))
    assert jax.tree.structure(fv.Closure(model, X)) == jax.tree.structure(fv.Closure(other, X))


def test_a_flax_module() -> None:
    nn = pytest.importorskip("flax.linen")
    model = nn.Dense(2)
    params = model.init(jax.random.key(0), X)

    def loss(params, via):
        fun = lambda x: jnp.sum(jnp.sin(model.apply(params, x)))
        return fv.Closure(fun, X)(X) if via else fun(X)

    got, expected = (jax.grad(functools.partial(loss, via=via))(params) for via in (1, 0))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, expected)


def test_an_apply_function_over_a_dict_of_parameters() -> None:
    params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    apply = lambda params, x: jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])

    def loss(params, via):
        fun = functools.partial(apply, params)
        if not via:
            return jnp.sum(fun(X))
        f, hoisted = fv.closure_convert(fun, X)
        return jnp.sum(f(X, *hoisted))

    got, expected = (jax.grad(functools.partial(loss, via=via))(params) for via in (1, 0))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, expected)


# Never stale.


def test_a_rebound_variable_is_seen() -> None:
    w = W
    fun = lambda x: x * w
    assert fv.closure_convert(fun, X)[0](X)[1] == X[1] * 2
    w = W + 1
    assert fv.closure_convert(fun, X)[0](X)[1] == X[1] * 3
    assert fv.Closure(fun, X)(X)[1] == X[1] * 3


def test_a_changed_attribute_is_seen() -> None:
    model = Hashable(W)
    for w in (W, W + 1, 3.0):
        model.w = w
        np.testing.assert_allclose(fv.closure_convert(model, X)[0](X), jnp.sin(w * X), rtol=1e-6)
        np.testing.assert_allclose(fv.Closure(model, X)(X), jnp.sin(w * X), rtol=1e-6)


def test_a_changed_numpy_array_is_seen() -> None:
    n = np.array([1.0, 2.0, 3.0], np.float32)
    fun = lambda x: x * n
    before = fv.Closure(fun, X)
    n[0] = 10.0
    assert fv.Closure(fun, X)(X)[0] == X[0] * 10
    assert jax.tree.structure(before) == jax.tree.structure(fv.Closure(fun, X))


def test_a_jitted_function_is_as_stale_as_jax_makes_it() -> None:
    """JAX itself keeps what a jitted function read when it was traced."""
    box = {"w": 2.0}
    fun = jax.jit(lambda x: x * box["w"])
    fun(X)
    box["w"] = 3.0
    np.testing.assert_array_equal(fv.closure_convert(fun, X)[0](X), fun(X))


# What `converted` looks like.


def test_name_doc_and_repr() -> None:
    def objective(x):
        """What is minimised."""
        return x * W

    f, _ = fv.closure_convert(objective, X, hoist="all")
    assert f.__name__ == "objective"
    assert f.__doc__ == "What is minimised."
    assert f.__wrapped__ is objective
    assert repr(f) == "<converted objective(float32[3]; hoisted: float32[3])>"
    g, _ = fv.closure_convert(functools.partial(objective), 1.0)
    assert repr(g) == "<converted objective(weak float32[]; hoisted: none)>"
    h, _ = fv.closure_convert(Hashable(W), X)
    assert h.__name__ == "Hashable"


# Bad input.


def test_hoist_is_a_name_or_a_function() -> None:
    expected = 'hoist: expected "differentiable", "traced", "floating", "all" or a function of'
    with pytest.raises(ValueError, match=expected):
        fv.closure_convert(lambda x: x, X, hoist="some")


def _hoisted_under(transform, hoist):
    """What each policy makes an argument of a function that reads one value of each sort."""
    flag, table = jnp.array([True, False, True]), np.arange(3)

    def inner(w, n):
        derived = jnp.sin(w)
        fun = lambda x: x * w * n + derived * flag + table + W * jax.random.uniform(KEY, (3,))
        converted, hoisted = fv.closure_convert(fun, X, hoist=hoist)
        np_or_jax = jax.closure_convert(fun, X)[1]
        found.append((sorted(map(str, map(jax.typeof, hoisted))), hoisted, np_or_jax))
        return jnp.sum(converted(X, *hoisted))

    found = []
    transform(inner)(W, jnp.arange(3))
    return found[0]


KEY = jax.random.key(3)
TRANSFORMS = {
    "nothing": lambda f: f,
    "grad": jax.grad,
    "jvp": lambda f: lambda w, n: jax.jvp(lambda w: f(w, n), (w,), (w,)),
    "vmap": jax.vmap,
    "jit": jax.jit,
    "jit of grad": lambda f: jax.jit(jax.grad(f)),
    "vmap in grad": lambda f: jax.grad(lambda w, n: jnp.sum(jax.vmap(f, (None, 0))(w, n))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_differentiable_hoists_what_jax_s_own_conversion_hoists(name) -> None:
    _, ours, jax_s = _hoisted_under(TRANSFORMS[name], "differentiable")
    assert {id(x) for x in ours} == {id(x) for x in jax_s}


@pytest.mark.parametrize("name", ["nothing", "vmap", "jit of grad"])
def test_each_policy_hoists_what_the_one_before_does(name) -> None:
    policies = ["differentiable", "traced", "floating", "all"]
    counts = [len(_hoisted_under(TRANSFORMS[name], hoist)[1]) for hoist in policies]
    assert (
        counts == {"nothing": [0, 0, 2, 6], "vmap": [0, 3, 4, 7], "jit of grad": [2, 3, 4, 7]}[name]
    )


def test_a_function_decides_what_is_hoisted() -> None:
    v = 2 * W
    converted, hoisted = fv.closure_convert(lambda x: x * W + v, X, hoist=lambda a: a is v)
    assert [id(a) for a in hoisted] == [id(v)]
    np.testing.assert_allclose(converted(X, W), X * W + W)
    assert [c.policy for c in fv.captures(lambda x: x * v, X, hoist=jnp.isrealobj).values] == [
        "isrealobj"
    ]


@pytest.mark.parametrize("convert", [fv.closure_convert, fv.Closure])
def test_fun_is_callable(convert) -> None:
    with pytest.raises(TypeError, match=r"needs a callable, got (ArrayImpl|Array)"):
        convert(X, X)


def test_the_number_of_hoisted_values() -> None:
    f, hoisted = fv.closure_convert(lambda x: x * W, X, hoist="all")
    message = r"takes 1 arguments and 1 hoisted values, 2 in all, got {}"
    with pytest.raises(TypeError, match=message.format(1)):
        f(X)
    with pytest.raises(StructureError, match=message.format(3)):
        f(X, *hoisted, *hoisted)


def test_the_type_of_a_hoisted_value() -> None:
    f, _ = fv.closure_convert(lambda x: x * W, X, hoist="all")
    with pytest.raises(
        TypeError, match=r"captured value 0 .*expected float32\[3\], got float32\[2\]"
    ):
        f(X, W[:2])
    with pytest.raises(
        TypeError, match=r"captured value 0 .*expected float32\[3\], got int32\[3\]"
    ):
        f(X, jnp.arange(3))
    with pytest.raises(TypeError, match=r"captured value 0 .*expected float32\[3\], got 'w'"):
        f(X, "w")


def test_an_error_inside_the_function_comes_through() -> None:
    def fun(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fv.closure_convert(fun, X)


def test_errors_are_of_one_family() -> None:
    for error in (StructureError, CaptureError):
        assert issubclass(error, FreevarsError)
        assert issubclass(error, TypeError)


# Mutable references.


@pytest.mark.parametrize("convert", [fv.closure_convert, fv.Closure])
def test_a_captured_reference_is_refused(convert) -> None:
    ref = jax.new_ref(W)

    def fun(x):
        return x * ref[...]

    with pytest.raises(CaptureError, match=r"fun captures the mutable reference ref \(ref float32"):
        convert(fun, X)


def test_a_captured_reference_that_is_only_written_is_refused() -> None:
    ref = jax.new_ref(W)

    def fun(x):
        ref[...] = x
        return x

    with pytest.raises(CaptureError, match=r"mutable reference .*test_convert\.py:\d+"):
        fv.closure_convert(fun, X)


def test_a_traced_reference_is_refused() -> None:
    @jax.jit
    def outer(w):
        ref = jax.new_ref(w)
        fv.closure_convert(lambda x: x * ref[...], X)
        return w

    with pytest.raises(CaptureError, match="mutable reference"):
        outer(W)


def test_a_reference_made_inside_is_fine() -> None:
    def fun(x):
        ref = jax.new_ref(x)
        ref[...] = ref[...] * W
        ref[0] = 7.0
        return ref[...]

    f = fv.Closure(fun, X)
    np.testing.assert_array_equal(f(X), (X * W).at[0].set(7.0))
    # JAX 0.10 has no reverse rule for writing to a part of a reference.
    _, tangent = jax.jvp(lambda f: f(X), (f,), (f,))
    np.testing.assert_array_equal(tangent, (X * W).at[0].set(0.0))


def test_a_reference_as_an_argument() -> None:
    def fun(ref, x):
        ref[...] = x * W
        return x

    ref = jax.new_ref(jnp.zeros(3))
    f, hoisted = fv.closure_convert(fun, ref, X)
    np.testing.assert_array_equal(ref[...], jnp.zeros(3))
    f(ref, X, *hoisted)
    np.testing.assert_array_equal(ref[...], X * W)


# Custom rules that capture.


def rule_capturing(c):
    @jax.custom_jvp
    def sine(x):
        return jnp.sin(x)

    @sine.defjvp
    def _(primals, tangents):
        return jnp.sin(*primals), c * tangents[0]

    return sine


def test_an_array_that_a_rule_holds_is_a_value() -> None:
    f = fv.Closure(lambda x: rule_capturing(W)(x) * W, X)
    assert f.values[0] is W
    assert (len(f.values), f.constants) == (1, ())
    np.testing.assert_allclose(jax.jit(lambda f: f(X))(f), jnp.sin(X) * W, rtol=1e-6)
    scaled = jax.tree.map(lambda w: 10 * w, f)
    for closure, w in ((f, W), (scaled, 10 * W)):
        np.testing.assert_allclose(
            jax.grad(lambda x, closure=closure: jnp.sum(closure(x)))(X), w * w, rtol=1e-6
        )


def test_a_traced_value_that_a_rule_holds_is_hoisted() -> None:
    def slope(w):  # the derivative of the rule's is w
        return jax.grad(lambda x: fv.Closure(rule_capturing(w), X)(x).sum())(X)

    for jit in (lambda f: f, jax.jit):
        np.testing.assert_array_equal(jit(slope)(W), W)
        np.testing.assert_array_equal(jit(jax.jacobian(slope))(W), jnp.eye(3))


@pytest.mark.parametrize("made", [jnp.asarray, lambda c: jax.lax.full_like(X[0], c), np.float32])
@pytest.mark.parametrize("form", ["jvp", "vjp"])
def test_a_number_made_in_the_function_that_a_rule_holds(form, made) -> None:
    """JAX writes it into the program, where it has no variable."""

    def times(c):
        def fun(x):
            scale = made(c)
            if form == "jvp":
                f = jax.custom_jvp(lambda x: scale * jnp.sin(x))
                f.defjvp(lambda p, t: (scale * jnp.sin(p[0]), scale * jnp.cos(p[0]) * t[0]))
            else:
                f = jax.custom_vjp(lambda x: scale * jnp.sin(x))
                f.defvjp(lambda x: (scale * jnp.sin(x), x), lambda x, g: (scale * jnp.cos(x) * g,))
            return f(x)

        return fv.Closure(fun, X[0])

    np.testing.assert_allclose(times(3.0)(X[0]), 3 * jnp.sin(X[0]), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(times(3.0))(X[0]), 3 * jnp.cos(X[0]), rtol=1e-6)
    second = jax.grad(jax.jit(jax.grad(times(3.0))))(X[0])
    np.testing.assert_allclose(second, -3 * jnp.sin(X[0]), rtol=1e-6)
    assert jax.tree.structure(times(3.0)) == jax.tree.structure(times(3.0))
    assert jax.tree.structure(times(3.0)) != jax.tree.structure(times(4.0))


def test_an_argument_that_a_rule_holds() -> None:
    f = fv.Closure(lambda x: jax.jvp(rule_capturing(x), (W,), (W,))[1], X)
    np.testing.assert_array_equal(f(X), X * W)
    np.testing.assert_array_equal(jax.jacobian(f)(X), jnp.diag(W))
    f = fv.Closure(lambda x: rule_capturing(x)(W), X)
    np.testing.assert_allclose(f(X), jnp.sin(W), rtol=1e-6)


def ruled_by(c, body=lambda c, x: c * x**2):
    """A function that captures an array, and whose rule says nothing of the derivative along it."""
    scaled = jax.custom_vjp(lambda x: body(c, x))
    scaled.defvjp(lambda x: (body(c, x), x), lambda x, ct: (2 * c * x * ct,))
    return scaled


def test_an_array_that_a_custom_vjp_captures_is_a_value() -> None:
    """Along it the derivative is the body's, to every order, and the rule reads it too."""
    f = fv.Closure(lambda x: jnp.sum(ruled_by(W)(x) * W), X)
    explicit = lambda w, x: jnp.sum(w * x**2 * w)
    assert (len(f.values), f.constants) == (1, ())
    assert f.values[0] is W
    v = 2 * W
    fresh = fv.Closure(lambda x: jnp.sum(ruled_by(v)(x) * v), X)
    assert jax.tree.structure(f) == jax.tree.structure(fresh)
    other = jax.tree.map(lambda w: 3 * w, f)
    by_x, by_w = (lambda f, x: jax.grad(f)(x)), (lambda f, x: jax.grad(lambda f: f(x))(f).values[0])
    for closure, w in ((f, W), (other, 3 * W)):
        np.testing.assert_allclose(by_x(closure, X), jax.grad(explicit, 1)(w, X), rtol=1e-6)
        np.testing.assert_allclose(by_w(closure, X), jax.grad(explicit)(w, X), rtol=1e-6)
        for first, argnum in ((by_x, 1), (by_w, 0)):
            squares = lambda f, x, first=first: jnp.sum(first(f, x) ** 2)
            square = lambda w, x, i=argnum: jnp.sum(jax.grad(explicit, i)(w, x) ** 2)
            for second, i in ((jax.grad(squares, 1), 1), (jax.grad(squares), 0)):
                got = second(closure, X)
                got = got if i else got.values[0]
                np.testing.assert_allclose(got, jax.grad(square, i)(w, X), rtol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        lambda c, x: jax.lax.while_loop(lambda y: y[0] < 9.0, lambda y: 2 * y, c * x + 1.0),
        lambda c, x: jax.pure_callback(np.asarray, X, c * x),
        lambda c, x: _bisect(lambda y: y - c * x),
    ],
    ids=["a loop", "a callback", "a bisection"],
)
def test_a_body_without_a_derivative_is_refused_when_one_is_asked_for(body) -> None:
    f = fv.Closure(lambda x: jnp.sum(ruled_by(W, body)(x)), X)
    np.testing.assert_allclose(jax.grad(f)(X), 2 * W * X)
    with pytest.raises(CaptureError, match=r"rule covers its arguments.*stop_gradient"):
        jax.grad(lambda f: f(X))(f)
    declared = fv.Closure(lambda x: jnp.sum(ruled_by(jax.lax.stop_gradient(W), body)(x)), X)
    np.testing.assert_array_equal(jax.grad(lambda f: f(X))(declared).values[0], 0 * W)
    inside = fv.Closure(lambda x: jnp.sum(ruled_by(x, body)(W)), X)
    with pytest.raises(CaptureError, match="rule covers its arguments"):
        jax.grad(inside)(X)


def test_what_the_body_of_a_custom_jvp_only_compares_is_refused() -> None:
    """A traced value, too: by the argument there is a rule, by the value there is none."""

    def root_of(c):
        solve = jax.custom_jvp(lambda x: _bisect(lambda y: y**3 - c * x))
        solve.defjvp(lambda p, t: ((y := solve(*p)), c * t[0] / (3 * y**2)))
        return lambda x: jnp.sum(solve(x))

    f = fv.Closure(root_of(W), X)
    np.testing.assert_allclose(jax.grad(f)(X), W / (3 * jnp.cbrt(W * X) ** 2), rtol=1e-3)
    for lost in (
        lambda: jax.grad(lambda f: f(X))(f),
        lambda: jax.grad(lambda w: fv.Closure(root_of(w), X)(X))(W),
        lambda: jax.jvp(lambda w: fv.Closure(root_of(w), X)(X), (W,), (W,)),
    ):
        with pytest.raises(CaptureError, match=r"custom_jvp rule covers its arguments.*compared"):
            lost()


def test_what_a_loop_only_compares_is_refused_beside_what_it_multiplies() -> None:
    """Two values that go through the same open-ended loop."""
    scale = 1 + W

    def body(scale, x):
        grown = lambda y: (y[0] + 1.0, jnp.where(y[1] < W, y[1] * scale, y[1]))
        return jax.lax.while_loop(lambda y: y[0] < 9.0, grown, (0.0, x))[1]

    f = fv.Closure(lambda x: _with_rule("jvp", lambda x: body(scale, x))(x), X)
    with pytest.raises(CaptureError, match="only compared"):
        jax.jvp(lambda f: f(X), (f,), (f,))
    by_scale = lambda s: jax.tree.map(lambda v: s if v is scale else v, f)(X)
    found, expected = (jax.jvp(g, (scale,), (W,))[1] for g in (by_scale, lambda s: body(s, X)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert jnp.any(expected != 0)


def _with_rule(kind, body):
    """A function, and a rule that says of its argument alone what the derivative is."""
    ruled = (jax.custom_jvp if kind == "jvp" else jax.custom_vjp)(body)
    if kind == "jvp":
        ruled.defjvp(lambda p, t: (body(*p), t[0]))
    else:
        ruled.defvjp(lambda x: (body(x), None), lambda _, ct: (ct,))
    return ruled


@pytest.mark.parametrize("kind", ["jvp", "vjp"])
@pytest.mark.parametrize(
    "body",
    [
        lambda c, x: jax.lax.stop_gradient(c) * x,
        lambda c, x: jax.jit(lambda c: jax.lax.stop_gradient(c) * x)(c),
        lambda c, x: jax.lax.scan(lambda y, _: (jax.lax.stop_gradient(c) * y, None), x, None, 2)[0],
    ],
    ids=["in it", "in a jitted function", "in a loop"],
)
def test_a_constant_declared_in_the_body_is_one(body, kind) -> None:
    f = fv.Closure(lambda x: jnp.sum(_with_rule(kind, lambda x: body(W, x))(x)), X)
    np.testing.assert_array_equal(jax.grad(lambda f: f(X))(f).values[0], 0 * W)


@pytest.mark.parametrize("kind", ["jvp", "vjp"])
def test_what_a_rule_within_a_body_captures(kind) -> None:
    """The inner rule holds the value too, and that is no second way to a result."""
    scale = 2 * W

    def inner(x):
        ruled = jax.custom_jvp(lambda x: scale * x**2)
        ruled.defjvp(lambda p, t: (scale * p[0] ** 2, 2 * scale * p[0] * t[0]))
        return ruled(x)

    f = fv.Closure(lambda x: jnp.sum(_with_rule(kind, lambda x: inner(W * x))(x)), X)
    found = jax.grad(lambda f: f(X))(f).values
    expected = {2.0: (W * X) ** 2, 1.0: 2 * scale * W * X**2}
    for value, got in zip(f.values, found, strict=True):
        np.testing.assert_allclose(got, expected[float(value[0])], rtol=1e-6)


@pytest.mark.parametrize("kind", ["jvp", "vjp"])
def test_a_rule_that_never_runs_since_its_arguments_are_integers(kind) -> None:
    f = fv.Closure(lambda n: jnp.sum(_with_rule(kind, lambda n: W**n)(n)), jnp.int32(3))
    np.testing.assert_allclose(jax.grad(lambda f: f(jnp.int32(3)))(f).values[0], 3 * W**2)


def _bisect(fun):
    def half(_, ends):
        low, high = ends
        middle = (low + high) / 2
        return jnp.where(fun(middle) < 0, middle, low), jnp.where(fun(middle) < 0, high, middle)

    return jax.lax.fori_loop(0, 20, half, (jnp.full(3, -9.0), jnp.full(3, 9.0)))[0]


def test_programs_that_each_call_one_twice_are_looked_into_once() -> None:
    """Two to the 30 paths, 31 programs: the conversion ends."""
    fun = jax.jit(lambda x: ruled_by(W)(x))
    for _ in range(30):
        fun = jax.jit(lambda x, inner=fun: inner(x) + inner(0.5 * x))
    f = fv.Closure(lambda x: fun(x), X)
    assert f.values[0] is W
    assert f.constants == ()


def test_a_traced_value_without_a_derivative_is_refused() -> None:
    def outer(w):
        return fv.Closure(lambda x: ruled_by(w)(x) * w, X)(X).sum()

    with pytest.raises(CaptureError, match=r"captures the traced value w \(float32\[3\]"):
        jax.grad(outer)(W)
    with pytest.raises(CaptureError, match="Pass the value to the function that has the rule"):
        jax.jit(outer)(W)


def test_a_value_whose_program_is_finished_is_a_leak() -> None:
    kept = []
    jax.jit(lambda w: kept.append(3 * w) or w)(X)
    convert = lambda x: fv.Closure(lambda x: x * kept[0], x)(x)
    for outer in (convert, jax.jit(convert)):
        with pytest.raises(LeakError, match=r"^kept\[0\] \(float32.*outside the transformation"):
            outer(X)


def test_a_traced_value_that_nobody_can_differentiate_is_a_value() -> None:
    def outer(n):
        return fv.Closure(lambda x: ruled_by(n, lambda n, x: n * x**2)(x), X)(X)

    np.testing.assert_allclose(jax.jit(outer)(jnp.int32(3)), 3 * X**2)
    np.testing.assert_allclose(jax.vmap(outer)(W), W[:, None] * X**2)


def test_a_callback_that_holds_an_array() -> None:
    host = lambda x: np.asarray(x) * np.asarray(W)
    fun = lambda x: jax.pure_callback(host, jax.ShapeDtypeStruct((3,), np.float32), x) * W
    f = fv.Closure(fun, X)
    assert f.values[0] is W
    np.testing.assert_allclose(f(X), X * W * W)
    # What runs on the host is the callback itself, with what it holds.
    np.testing.assert_allclose(jax.tree.map(jnp.zeros_like, f)(X), 0 * X)
