"""Example arguments: any pytree, static leaves, and what a call may bring in their place."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freevars.jax as fv
from freevars.errors import StructureError

X = jnp.array([0.5, -0.25, 2.0])
W = jnp.array([1.0, 2.0, -1.0])


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Point(NamedTuple):
    x: Any
    y: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    a: Any
    b: Any
    name: str = dataclasses.field(metadata={"static": True}, default="n")


class Box:
    """A custom node whose metadata does not hash."""

    def __init__(self, value, meta=()):
        self.value = value
        self.meta = list(meta)


jax.tree_util.register_pytree_with_keys(
    Box,
    lambda b: (((jax.tree_util.GetAttrKey("value"), b.value),), b.meta),
    lambda meta, children: Box(children[0], meta),
)


def both(fun, *args):
    """The two conversions as plain functions of the arguments."""
    f, hoisted = fv.closure_convert(fun, *args)
    return [lambda *args: f(*args, *hoisted), fv.Closure(fun, *args)]


TREES = {
    "tuple": ((X, W), lambda t: t[0] * t[1]),
    "list": ([X, [W]], lambda t: t[0] * t[1][0]),
    "dict": ({"a": X, "b": {"c": W}}, lambda t: t["a"] * t["b"]["c"]),
    "namedtuple": (Point(X, W), lambda t: t.x * t.y),
    "dataclass": (Data(X, W), lambda t: t.a * t.b),
    "custom node": (Box(X, ["m"]), lambda t: t.value * len(t.meta)),
    "None": ((X, None), lambda t: t[0] * (t[1] is None)),
    "closure": (fv.Closure(lambda x: x * W, X), lambda t: t(X)),
    "Partial": (jax.tree_util.Partial(jnp.multiply, W), lambda t: t(X)),
    "empty": (((), {}, X), lambda t: t[2]),
    "key": ((X, jax.random.key(0)), lambda t: t[0] * jax.random.normal(t[1], (3,))),
    "numpy": ((np.ones(3, np.float32), W), lambda t: t[0] * t[1]),
}


@pytest.mark.parametrize("name", TREES)
def test_any_pytree(name) -> None:
    tree, fun = TREES[name]
    expected = fun(tree)
    for f in both(lambda t: fun(t) * W, tree):
        np.testing.assert_allclose(f(tree), expected * W)
        np.testing.assert_allclose(jax.jit(f)(tree), expected * W)


@pytest.mark.parametrize("name", TREES)
def test_any_pytree_as_a_result(name) -> None:
    tree, _ = TREES[name]
    for f in both(lambda x: (tree, x), X):
        result = f(X)
        assert jax.tree.structure(result[0]) == jax.tree.structure(tree)
        for a, b in zip(jax.tree.leaves(result[0]), jax.tree.leaves(tree), strict=True):
            assert jnp.all(a == b)


STATICS = ["text", Colour.RED, jnp.sin, np.dtype("float32"), jnp.float32, object(), ...]


@pytest.mark.parametrize("static", STATICS, ids=lambda s: type(s).__name__)
def test_a_static_leaf_is_seen_as_it_is(static) -> None:
    seen = []

    def fun(x, s):
        seen.append(s)
        return x * W

    for f in both(fun, X, static):
        np.testing.assert_array_equal(f(X, static), X * W)
        with pytest.raises(
            StructureError, match=r"args\[1\] does not match the example.*static leaf"
        ):
            f(X, "another")
        with pytest.raises(StructureError, match=r"args\[1\].*static leaf .*got float32\[3\]"):
            f(X, X)
    assert all(s is static for s in seen)


def test_static_leaves_compare_by_equality() -> None:
    for f in both(lambda x, s: x * len(s), X, "abc"):
        np.testing.assert_array_equal(f(X, "abcd"[:3]), 3 * X)


def test_static_leaves_deep_in_the_arguments() -> None:
    args = ({"f": jnp.sin, "x": X, "none": None}, [Colour.RED, (W, "s")])

    def fun(d, rest):
        assert rest[0] is Colour.RED
        return d["f"](d["x"]) * rest[1][0]

    for f in both(fun, *args):
        np.testing.assert_array_equal(f(*args), jnp.sin(X) * W)
        with pytest.raises(
            StructureError, match=r"args\[1\]\[0\].*expected the static leaf <Colour.RED"
        ):
            f(args[0], [Colour.BLUE, (W, "s")])
        with pytest.raises(StructureError, match=r"args\[0\]\['f'\].*static leaf"):
            f({**args[0], "f": jnp.cos}, args[1])


def test_results_that_are_not_arrays() -> None:
    def fun(x):
        return {"x": x * W, "name": "n", "colour": Colour.RED, "f": jnp.sin, "none": None, "n": 3}

    for f in both(fun, X):
        result = f(X)
        np.testing.assert_array_equal(result["x"], X * W)
        assert result["name"] == "n"
        assert result["colour"] is Colour.RED
        assert result["f"] is jnp.sin
        assert result["none"] is None
        assert result["n"] == 3
        inside = []
        jax.jit(lambda x: inside.append(f(x)) or x)(X)
        assert inside[0]["colour"] is Colour.RED


def test_arguments_and_results_without_any_array() -> None:
    for f in both(lambda s: s * 2, "ab"):
        assert f("ab") == "abab"
    for f in both(lambda: W * 2):
        np.testing.assert_array_equal(f(), W * 2)
    for f in both(lambda x: None, X):
        assert f(X) is None


# What does not fit, named by its path.

MISMATCHES = {
    "shape": ((X,), (X[:2],), r"args\[0\] .*expected float32\[3\], got float32\[2\]"),
    "rank": ((X,), (X[None],), r"args\[0\] .*expected float32\[3\], got float32\[1,3\]"),
    "dtype": ((X,), (jnp.arange(3),), r"args\[0\] .*expected float32\[3\], got int32\[3\]"),
    "a number": ((X,), (1.0,), r"args\[0\] .*expected float32\[3\], got weak float32\[\]"),
    "kind of number": ((1.0,), (1,), r"args\[0\] .*expected weak float32\[\], got weak int32\[\]"),
    "bool for int": ((1,), (True,), r"args\[0\] .*expected weak int32\[\], got bool\[\]"),
    "string": ((X,), ("x",), r"args\[0\] .*expected float32\[3\], got 'x'"),
    "None": ((X,), (None,), r"args\[0\] .*expected .*float32\[3\], got None"),
    "array for None": ((X, None), (X, X), r"args\[1\] .*expected None, got .*leaf"),
    "key": (({"a": X},), ({"b": X},), r"args\[0\]\['a'\] .*expected float32\[3\], got nothing"),
    "one too many": (({"a": X},), ({"a": X, "b": X},), r"args\[0\]"),
    "tuple or list": (((X,),), ([X],), r"args\[0\] .*expected a tuple.*, got a list"),
    "length": (((X, X),), ((X,),), r"args\[0\]"),
    "deep": (
        ({"a": [X, (X, W)]},),
        ({"a": [X, (X, W[:1])]},),
        r"args\[0\]\['a'\]\[1\]\[1\] .*expected float32\[3\], got float32\[1\]",
    ),
    "the first of two": (((X, W),), ((X[:2], W[:1]),), r"args\[0\]\[0\] "),
    "namedtuple": ((Point(X, W),), (Point(X, W[:2]),), r"args\[0\]\.y .*got float32\[2\]"),
    "dataclass": ((Data(X, W),), (Data(X[:1], W),), r"args\[0\]\.a .*got float32\[1\]"),
    "metadata": ((Data(X, W),), (Data(X, W, "other"),), r"args.*expected .*'n'.*got .*'other'"),
    "custom node": ((Box(X),), (Box(X[:1]),), r"args\[0\]\.value .*got float32\[1\]"),
    "unhashable metadata": ((Box(X, ["a"]),), (Box(X, ["b"]),), r"args.*expected .*'a'.*got .*'b'"),
    "typed key": ((jax.random.key(0),), (jax.random.PRNGKey(0),), r"args\[0\] .*expected key<"),
}


@pytest.mark.parametrize("name", MISMATCHES)
@pytest.mark.parametrize("inside", [False, True])
def test_a_call_that_does_not_fit_names_the_first_path(name, inside) -> None:
    example, call, message = MISMATCHES[name]
    f = fv.Closure(lambda *args: [jnp.asarray(a) * 1 for a in _numbers(args)], *example)
    f(*example)
    with pytest.raises(StructureError, match=message) as caught:
        (lambda: jax.eval_shape(lambda: f(*call)))() if inside else f(*call)
    assert "a solver calls its function with values like" in str(caught.value)
    f(*example)  # a refused call changes nothing


def _numbers(args):
    return [x for x in jax.tree.leaves(args) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.number)]


def test_the_number_of_arguments() -> None:
    f = fv.Closure(lambda x, y: x * y, X, W)
    with pytest.raises(StructureError, match=r"args\[1\] .*expected float32\[3\], got nothing"):
        f(X)
    with pytest.raises(StructureError, match=r"args\[2\] .*expected nothing, got"):
        f(X, W, W)


def test_mean_of_another_length_is_refused() -> None:
    """jax.closure_convert gives 7.0 for 3.5 here."""
    f, hoisted = fv.closure_convert(jnp.mean, jnp.arange(4.0))
    with pytest.raises(TypeError, match=r"args\[0\] .*expected float32\[4\], got float32\[8\]"):
        f(jnp.arange(8.0), *hoisted)


# Numbers and weak types.


def test_python_numbers_fit_scalars_of_their_kind() -> None:
    for example in (1.0, jnp.float32(1), jnp.bfloat16(1)):
        for f in both(lambda x: x * 2, example):
            assert f(3.0) == 6.0
            assert f(3.0).dtype == (jnp.asarray(example) * 2).dtype
    for f in both(lambda x: x * 2, jnp.int8(1)):
        assert f(3).dtype == jnp.int8
        with pytest.raises(StructureError, match=r"expected int8\[\], got weak float32\[\]"):
            f(3.0)


def test_weak_types_are_respected() -> None:
    for f in both(lambda x: x * jnp.bfloat16(2), 1.0):
        assert f(3.0).dtype == jnp.bfloat16
        with pytest.raises(
            StructureError, match=r"expected weak float32\[\], got float32\[\].*number"
        ):
            f(jnp.float32(3))  # would give float32
    for f in both(lambda x: x * jnp.float32(2), 1.0):
        assert f(jnp.float32(3)) == 6.0


def test_a_weak_result_stays_weak() -> None:
    for f in both(lambda x: x * 2, 1.0):
        assert f(3.0).weak_type
        assert (f(3.0) * jnp.bfloat16(1)).dtype == jnp.bfloat16
    for f in both(lambda x: x * 2, jnp.float32(1)):
        assert not f(jnp.float32(3)).weak_type
        assert not f(3.0).weak_type


def test_weak_captures_stay_weak() -> None:
    w = jnp.asarray(2.0)
    assert w.weak_type
    for f in both(lambda x: x * w, jnp.bfloat16(1)):
        assert f(jnp.bfloat16(3)).dtype == jnp.bfloat16


@pytest.mark.parametrize("wide", [False, True])
def test_64_bits_on_and_off(wide) -> None:
    with jax.enable_x64(wide):
        w = jnp.asarray(np.array([0.1, 0.2]))
        dtype = jnp.float64 if wide else jnp.float32
        for f in both(lambda x: x * w, 1.0):
            assert f(3.0).dtype == dtype
            np.testing.assert_array_equal(f(3.0), 3.0 * w)
        f = fv.Closure(lambda x: x * w, 1.0)
        grad = jax.grad(lambda f: jnp.sum(f(3.0)))(f)
        assert grad.values[0].dtype == dtype
        n = np.array([0.1, 0.2])
        np.testing.assert_array_equal(fv.Closure(lambda x: x * n, 1.0)(3.0), 3.0 * jnp.asarray(n))


def test_a_closure_made_with_64_bits_is_another_structure() -> None:
    make = lambda: fv.Closure(lambda x: x * 2.0, jnp.float32(1))
    with jax.enable_x64(True):
        wide = make()
    assert jax.tree.structure(wide) != jax.tree.structure(make())


def test_shapes_of_arguments_and_results() -> None:
    f = fv.Closure(lambda d, s: {"y": d["x"] * W, "s": s}, {"x": X}, "text")
    assert f.in_struct == ({"x": jax.ShapeDtypeStruct((3,), jnp.float32)}, "text")
    assert f.out_struct == {"y": jax.ShapeDtypeStruct((3,), jnp.float32), "s": "text"}
    assert fv.Closure(lambda x: x, 1.0).in_struct[0].weak_type


def test_metadata_that_does_not_hash_inside_a_rule() -> None:
    @jax.custom_vjp
    def rule(box):
        return box.value * W

    rule.defvjp(lambda box: (rule(box), box), lambda box, ct: (Box(2 * ct, box.meta),))
    for f in both(lambda x: rule(Box(x, ["m"])), X):
        np.testing.assert_array_equal(f(X), X * W)
        np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(f(x)))(X), 2.0)


# Python numbers that do not fit, and strict promotion.


@pytest.mark.parametrize(
    ("example", "bad", "good"),
    [
        (jnp.int8(3), 300, -128),
        (jnp.uint8(3), -1, 255),
        (jnp.int32(3), 2**40, 2**31 - 1),
        (jnp.uint32(3), -1, 2**31 - 1),
    ],
)
@pytest.mark.parametrize("wide", [False, True])
def test_a_python_number_that_does_not_fit_overflows(example, bad, good, wide) -> None:
    with jax.enable_x64(wide):
        for f in both(lambda t, s: {"x": t["n"] * 2, "s": s}, {"n": example}, "static"):
            with pytest.raises(OverflowError, match=rf"args\[0\]\['n'\].* {bad} does not fit"):
                f({"n": bad}, "static")
            assert f({"n": good}, "static")["x"] == example.dtype.type(good) * np.asarray(
                2, example.dtype
            )
        converted, _ = fv.closure_convert(lambda x: x * example, jnp.float32(1), hoist="all")
        with pytest.raises(OverflowError, match=r"captured value 0 .*does not fit"):
            converted(jnp.float32(1), bad)


def test_a_wide_python_number_does_not_fit_an_example_of_32_bits() -> None:
    f = fv.Closure(lambda n: n * 2, 3)
    with jax.enable_x64(True), pytest.raises(OverflowError, match="does not fit weak int32"):
        f(2**40)


@pytest.mark.parametrize("mode", ["standard", "strict"])
@pytest.mark.parametrize("n", [2.0, 2])
def test_python_numbers_promote_as_under_jit(mode, n) -> None:
    fun = lambda x, t: {"y": x * t["n"], "n": t["n"]}
    args = (X.astype(jnp.bfloat16), {"n": n})
    with jax.numpy_dtype_promotion(mode):
        expected = jax.jit(fun)(*args)
        for f in both(fun, *args):
            got = f(*args)
            assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, expected)
            inside = jax.jit(f)(*args)
            assert jax.tree.map(jax.typeof, inside) == jax.tree.map(jax.typeof, expected)


def test_the_weakness_of_an_array_is_no_difference() -> None:
    weak = jnp.broadcast_to(jnp.asarray(2.0), (3,))
    assert weak.weak_type
    for f in both(lambda x: x * W, X):
        np.testing.assert_array_equal(f(weak), 2 * W)
        assert not f(weak).weak_type
    for f in both(lambda x: x * W, weak):
        np.testing.assert_array_equal(f(X), X * W)
    closure = fv.Closure(lambda x: x * W, X)
    other = jax.tree.map(lambda _: weak, closure)
    np.testing.assert_array_equal(other(X), 2 * X)


def test_strict_promotion_refuses_in_a_conversion_what_it_refuses_under_jit() -> None:
    fun = lambda x: x * W.astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        with pytest.raises(ValueError, match="strict"):
            jax.jit(fun)(X)
        with pytest.raises(ValueError, match="strict"):
            fv.Closure(fun, X)


@pytest.mark.parametrize("decorate", [fv.root, fv.argmin, fv.fixed_point])
@pytest.mark.slow
def test_solvers_under_strict_promotion(decorate) -> None:
    """Each function has its solution at t / 2."""
    fun = {
        fv.root: lambda x, t: 2 * x - t,
        fv.argmin: lambda x, t: x * x - t * x,
        fv.fixed_point: lambda x, t: (2 * x + t) / 4,
    }[decorate]

    @decorate
    def solve(fun, x0, *args):
        return args[0] / 2

    with jax.numpy_dtype_promotion("strict"):
        for t in (3.0, jnp.float32(3)):
            for wrt in (jax.grad, jax.jacfwd):
                np.testing.assert_allclose(wrt(lambda t: solve(fun, 1.0, t))(t), 0.5, rtol=1e-6)
                np.testing.assert_allclose(
                    wrt(lambda t: solve(lambda x, _: fun(x, t), 1.0, 3.0))(t), 0.5, rtol=1e-6
                )
