"""Each entry of `_compat` alone, so that a release of JAX that changes something fails here first,
with the name of what changed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from freevars.jax import _compat

X = jnp.array([0.5, -0.25, 2.0])
W = jnp.array([1.0, 2.0, -1.0])


def program(fun, *args):
    return jax.make_jaxpr(fun)(*args)


def named(closed, name):
    jaxpr, _ = _compat.separate_constants(closed)
    return next(e for e in jaxpr.eqns if e.primitive.name == name)


def test_the_public_names_of_programs_are_the_same() -> None:
    for name in ("ClosedJaxpr", "Jaxpr", "Literal", "Var", "jaxpr_as_fun"):
        assert getattr(_compat, name) is getattr(jax.extend.core, name)


def test_an_import_starts_no_backend_and_loads_only_what_every_program_needs() -> None:
    code = """
        import jax, sys
        before = set(sys.modules)
        import freevars.jax
        loaded = {name for name in set(sys.modules) - before if not name.startswith("freevars")}
        print(sorted(name for name in loaded if "pallas" in name or "mlir" in name))
        print(jax._src.xla_bridge.backends_are_initialized())
        later = ("freevars._names.search", "freevars.jax._rules.odeint")
        print([name for name in later if name in sys.modules])
        fv = freevars.jax
        fv.Closure(lambda x: 2 * x, 1.0)(1.0)
        print([name for name in later if name in sys.modules])
        print(all(name in dir(fv) and getattr(fv, name) for name in (*fv.__all__, "scipy")))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == ["[]", "False", "[]", "[]", "True"]


def test_without_jax_the_error_says_what_to_install() -> None:
    code = """
        import sys
        sys.modules["jax"] = None
        try:
            import freevars.jax
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "freevars.jax needs JAX: pip install 'freevars[jax]'\n", done.stderr


def test_separate_constants_and_evaluate() -> None:
    jaxpr, constants = _compat.separate_constants(program(lambda x: x * W, X))
    assert len(jaxpr.invars) == 2
    assert constants[0] is W
    np.testing.assert_array_equal(_compat.evaluate(jaxpr, [W + 1, X])[0], X * (W + 1))


@pytest.mark.parametrize(
    ("name", "fun", "count"),
    [
        ("jit", jax.jit(jnp.sin), 1),
        ("scan", lambda x: lax.scan(lambda c, _: (jnp.sin(c), None), x, length=2)[0], 1),
        ("while", lambda x: lax.while_loop(lambda c: c[0] < 1, jnp.sin, x), 2),
        ("cond", lambda x: lax.cond(x[0] < 1, jnp.sin, jnp.cos, x), 2),
        ("custom_jvp_call", jax.nn.silu, 0),
    ],
)
def test_nested_programs(name, fun, count) -> None:
    closed = program(fun, X)
    found = [e for e in _compat.separate_constants(closed)[0].eqns if e.primitive.name == name]
    if count:
        assert len(_compat.nested_programs(found[0])) == count


def test_drop_dead_code() -> None:
    def fun(x, y):
        jnp.sin(x)
        return jax.jit(lambda x, y: (y * 2, jnp.cos(x)))(x, y)[0]

    jaxpr, _ = _compat.separate_constants(program(fun, X, X))
    smaller, used = _compat.drop_dead_code(jaxpr, [False, True])
    assert used == [False, True]
    assert "cos" not in str(smaller)
    np.testing.assert_array_equal(_compat.evaluate(smaller, [X])[0], 2 * X)


def test_replace() -> None:
    jaxpr, _ = _compat.separate_constants(program(lambda x, y: x - y, X, X))
    swapped = _compat.replace(jaxpr, invars=jaxpr.invars[::-1])
    np.testing.assert_array_equal(_compat.evaluate(swapped, [W, X])[0], X - W)


def test_cast() -> None:
    assert _compat.cast(1.0, jax.typeof(jnp.bfloat16(1))).dtype == jnp.bfloat16
    assert _compat.cast(jnp.float32(1), jax.typeof(1.0)).weak_type


@pytest.mark.parametrize(
    ("fun", "matters"),
    [
        (lambda x: x * jnp.bfloat16(2), True),
        (lambda x: jax.jit(lambda x: x * jnp.bfloat16(2))(x), True),
        (lambda x: x * jnp.float32(2), False),
        (lambda x: x * 2, False),
        (lambda x: x * jnp.complex64(2), False),
        (lambda x: x.astype(int), False),
        # A number of the program's own: the dtype of what it meets, whatever x is.
        (lambda x: x.astype(int) + jnp.uint8(2) * 2, False),
        (lambda x: jnp.interp(x, jnp.arange(3.0), jnp.arange(3.0)), False),
        # What a loop carries comes of x at the end, and so the number that it starts from.
        (lambda x: jax.lax.fori_loop(0, 2, lambda _, c: c + x, 1.0) * jnp.bfloat16(2), True),
        (
            lambda x: jax.lax.scan(lambda c, _: (c + x, c * jnp.bfloat16(2)), 1.0, length=2),
            True,
        ),
    ],
)
def test_converts_weak_values(fun, matters) -> None:
    jaxpr, _ = _compat.separate_constants(program(fun, jnp.asarray(1.0)))
    assert _compat.converts_weak_values(jaxpr) == matters


def test_integers_that_narrow_matter() -> None:
    jaxpr, _ = _compat.separate_constants(program(lambda x: x * jnp.uint8(2), 1))
    assert _compat.converts_weak_values(jaxpr)


def test_kind() -> None:
    dtypes = [jnp.bool_, jnp.uint8, jnp.int32, jnp.bfloat16, jnp.float32, jnp.complex64]
    assert [_compat.kind(jnp.dtype(d)) for d in dtypes] == [0, 1, 1, 2, 2, 3]
    assert _compat.kind(jax.random.key(0).dtype) == 4


def test_is_live() -> None:
    kept = []

    def outer(x):
        assert _compat.is_live(x)
        kept.append(x)
        return jnp.sum(x)

    jax.jvp(outer, (X,), (X,))
    jax.jit(outer)(X)
    kept[0]._trace.invalidate()  # few transformations do this themselves when they end
    assert not _compat.is_live(kept[0])


def test_is_array() -> None:
    yes = [X, np.ones(2), np.float32(1), 1, 1.0, 1j, True, jax.random.key(0), jax.new_ref(X)]
    no = ["s", None, jnp.sin, np.dtype("f4"), jnp.float32, np.array(["s"]), object()]
    assert all(_compat.is_array(x) for x in yes)
    assert not any(_compat.is_array(x) for x in no)


def test_is_ref() -> None:
    seen = []

    @jax.jit
    def inside(x):
        seen.append(_compat.is_ref(jax.new_ref(x)))
        return x

    inside(X)
    assert seen == [True]
    assert _compat.is_ref(jax.new_ref(X))
    assert not any(_compat.is_ref(x) for x in (X, np.ones(2), 1.0, "s", None))


def test_trace_context_follows_settings_but_not_named_axes() -> None:
    before = _compat.trace_context()
    with jax.default_matmul_precision("float32"):
        assert _compat.trace_context() != before
    seen = []
    jax.vmap(lambda x: seen.append(_compat.trace_context()) or x, axis_name="i")(X)
    assert seen[0] == before == _compat.trace_context()
    hash(before)


def test_prepend_operands() -> None:
    closed = program(lambda x: jax.jit(lambda x: x * W)(x), X)
    jaxpr, _ = _compat.separate_constants(closed)
    eqn = jaxpr.eqns[0]
    more = _compat.prepend_operands(eqn, [jaxpr.invars[0]], {})
    for name in ("in_shardings", "in_layouts", "donated_invars"):
        assert len(more.params[name]) == len(eqn.params[name]) + 1


def test_scan_with_constants() -> None:
    def fun(x):
        return lax.scan(lambda c, _: (c * W, None), x, length=2)[0]

    eqn = named(program(fun, X), "scan")
    assert _compat.scan_with_constants(eqn.params, 0).items() <= eqn.params.items()
    assert _compat.scan_with_constants(eqn.params, 2) != _compat.scan_with_constants(eqn.params, 0)


def test_function_parts() -> None:
    assert _compat.function_parts(lambda: None) is None
    assert _compat.function_parts(object()) is None


def ruled(kind):
    """A function with a rule, and the functions of that."""
    if kind == "jvp":
        f = jax.custom_jvp(lambda x: jnp.sin(x) * W)
        f.defjvp(lambda p, t: (f(p[0]), jnp.cos(p[0]) * W * t[0]))
        return f, [f.jvp]
    f = jax.custom_vjp(lambda x: jnp.sin(x) * W)
    f.defvjp(lambda x: (f(x), x), lambda x, ct: (jnp.cos(x) * W * ct,))
    return f, [f.fwd, f.bwd]


def innermost(x):
    inner = _compat.unwrapped(x)
    if inner is None:
        inner = getattr(x, "f", None)
    return x if inner is None else innermost(inner)


@pytest.mark.parametrize("kind", ["jvp", "vjp"])
def test_rules_are_found_behind_whatever_jax_puts_around_them(kind) -> None:
    f, rules = ruled(kind)
    name = f"custom_{kind}_call"
    eqn = named(program(lambda x: f(x), X), name)
    once = program(lambda x: _compat.as_function(eqn)(*[W, x][-len(eqn.invars) :]), X)
    dropped, _ = _compat.drop_dead_code(_compat.separate_constants(once)[0], [True, True])
    (last,) = [e for e in dropped.eqns if e.primitive.name == name]
    for found in (eqn, named(once, name), last):
        assert list(map(innermost, _compat.rule_objects(found))) == rules
        assert _compat.captured_by_rule(found) == 1


def test_as_function() -> None:
    eqn = named(program(lambda x: jnp.sin(x) * 2.0, X), "mul")
    (result,) = _compat.as_function(eqn)(X, jnp.float32(2.0))
    np.testing.assert_allclose(result, X * 2.0)


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.grad, lambda f: jax.grad(jax.jit(f)), lambda f: jax.jit(jax.grad(f))]
)
def test_is_open(transform) -> None:
    seen = []

    def inner(x):
        seen.append(x)
        return x

    def outer(w):
        jax.make_jaxpr(inner)(1.0)
        assert not _compat.is_open(seen[0])
        assert _compat.is_open(w)
        jax.make_jaxpr(lambda x: x if _compat.is_open(w) and _compat.is_open(x) else 1 / 0)(1.0)
        return w

    transform(outer)(1.0)
    assert not _compat.is_open(seen[0])


def test_types() -> None:
    assert isinstance(jax.jit(jnp.sin), _compat.JITTED)
    closed = program(jnp.sin, X)
    assert isinstance(closed, _compat.JAXPR_TYPES)
    assert isinstance(closed.eqns[0], _compat.EQUATION)
    for value in (jax.typeof(X), X.sharding, jax.make_mesh((1,), ("i",))):
        assert isinstance(value, _compat.VALUES)


def test_computes_now() -> None:
    seen = []

    def note(x):
        seen.append(_compat.computes_now())
        return x

    note(X)
    jax.grad(lambda x: note(x).sum())(X)
    jax.jit(note)(X)
    assert seen == [True, True, False]
