"""A Closure as a value: what JAX does with an array, it does with a closure."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import freevars.jax as fv
from freevars.errors import StructureError
from tests.jax.processes import with_devices

X = jnp.array([0.5, -0.25, 2.0])
W = jnp.array([1.0, 2.0, -1.0])
V = jnp.array([0.3, 0.1, 0.7])


def make(w, v=V):
    return fv.Closure(lambda x: jnp.sum(jnp.sin(w * x) * v), X)


def explicit(w, v, x):
    return jnp.sum(jnp.sin(w * x) * v)


def test_attributes() -> None:
    f = make(W)
    assert f.values[0] is W
    assert f.values[1] is V
    assert f.constants == ()
    assert f.in_struct == (jax.ShapeDtypeStruct((3,), jnp.float32),)
    assert f.out_struct == jax.ShapeDtypeStruct((), jnp.float32)
    assert (
        repr(f) == "Closure(<lambda>: (float32[3]) -> float32[]; captures float32[3], float32[3])"
    )
    many_values = [W + i for i in range(6)]
    many = fv.Closure(lambda x: sum(x * w for w in many_values), X)
    assert repr(many).count("float32") <= 7
    assert "… 6 in all" in repr(many)
    assert "captures nothing" in repr(fv.Closure(lambda x: x, X))


def test_is_a_pytree() -> None:
    f = make(W)
    leaves, structure = jax.tree.flatten(f)
    assert leaves == list(f.values)
    again = jax.tree.unflatten(structure, leaves)
    assert again.values == f.values
    doubled = jax.tree.map(lambda v: 2 * v, f)
    np.testing.assert_allclose(doubled(X), explicit(2 * W, 2 * V, X), rtol=1e-6)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path({"f": f})]
    assert paths == ["['f'].values[0]", "['f'].values[1]"]
    jax.tree.unflatten(structure, [object(), None])  # JAX puts anything in the place of a leaf


def test_the_cotangent_is_a_closure() -> None:
    f = make(W)
    gradient = jax.grad(lambda f: f(X))(f)
    assert jax.tree.structure(gradient) == jax.tree.structure(f)
    np.testing.assert_allclose(gradient.values[0], V * X * jnp.cos(W * X), rtol=1e-6)
    np.testing.assert_allclose(gradient.values[1], jnp.sin(W * X), rtol=1e-6)
    value, pullback = jax.vjp(lambda f, x: f(x), f, X)
    of_f, of_x = pullback(jnp.ones_like(value))
    np.testing.assert_allclose(of_f.values[0], gradient.values[0])
    np.testing.assert_allclose(of_x, V * W * jnp.cos(W * X), rtol=1e-6)


def test_an_integer_capture_has_a_float0_cotangent() -> None:
    n = jnp.arange(3)
    f = fv.Closure(lambda x: jnp.sum(x[n] * W), X)
    gradient = jax.grad(lambda f: f(X), allow_int=True)(f)
    dtypes = sorted(str(v.dtype) for v in gradient.values)
    assert jax.dtypes.float0 in [v.dtype for v in gradient.values], dtypes


@jax.custom_vjp
def solve(f, x):
    """Newton's method, one root for each entry."""
    step = lambda _, x: x - f(x) / jax.vmap(jax.grad(lambda x: f(x)), 0)(x)
    return lax.fori_loop(0, 20, step, x)


def _solve_fwd(f, x):
    root = lax.fori_loop(0, 30, lambda _, x: x - f(x) / jax.jvp(f, (x,), (jnp.ones(3),))[1], x)
    return root, (f, root)


def _solve_bwd(residuals, ct):
    f, root = residuals
    slope = jax.jvp(f, (root,), (jnp.ones(3),))[1]
    return jax.vjp(lambda f: f(root), f)[1](-ct / slope)[0], jnp.zeros(3)


solve.defvjp(_solve_fwd, _solve_bwd)


def test_custom_vjp_without_nondiff_argnums() -> None:
    target = jnp.array([2.0, 3.0, 4.0])
    loss = lambda t: jnp.sum(solve(fv.Closure(lambda x: x**2 - t, X), jnp.ones(3)))
    np.testing.assert_allclose(jax.grad(loss)(target), 0.5 / jnp.sqrt(target), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(target), 0.5 / jnp.sqrt(target), rtol=1e-5)
    batched = jax.vmap(jax.grad(loss))(jnp.stack([target, 4 * target]))
    np.testing.assert_allclose(batched[1], 0.25 / jnp.sqrt(target), rtol=1e-5)


def test_vmap_over_some_captured_values() -> None:
    f = make(jnp.stack([W, W + 1, W + 2])[0])
    batch = jnp.stack([W, W + 1, W + 2])
    stacked = jax.tree.unflatten(jax.tree.structure(f), [batch, V])
    axes = jax.tree.unflatten(jax.tree.structure(f), [0, None])
    got = jax.vmap(lambda f, x: f(x), in_axes=(axes, None))(stacked, X)
    np.testing.assert_allclose(got, [explicit(w, V, X) for w in batch], rtol=1e-6)
    by_map = jax.tree.map(lambda v: 0 if v.ndim > 1 else None, stacked)
    np.testing.assert_allclose(
        jax.vmap(lambda f, x: f(x), in_axes=(by_map, None))(stacked, X), got, rtol=1e-6
    )


def test_vmap_makes_a_stack_of_closures() -> None:
    batch = jnp.stack([W, W + 1])
    fs = jax.vmap(lambda w: make(w))(batch)
    assert fs.values[0].shape == (2, 3)
    np.testing.assert_allclose(
        jax.vmap(lambda f: f(X))(fs), [explicit(w, V, X) for w in batch], rtol=1e-6
    )


def test_jit_gives_and_takes_closures() -> None:
    f = jax.jit(make)(W)
    assert jax.tree.structure(f) == jax.tree.structure(make(W))
    np.testing.assert_allclose(f(X), explicit(W, V, X), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(f)(X), explicit(W, V, X), rtol=1e-6)


def test_scan_carry_and_xs() -> None:
    fs = jax.tree.map(lambda *v: jnp.stack(v), make(W), make(W + 1), make(W + 2))

    def step(f, g):
        return jax.tree.map(lambda a, b: a + 0.1 * b, f, g), f(X) + g(X)

    last, totals = lax.scan(step, make(W), fs)
    w, v, expected = W, V, []
    for k in range(3):
        expected.append(explicit(w, v, X) + explicit(W + k, V, X))
        w, v = w + 0.1 * (W + k), v + 0.1 * V
    np.testing.assert_allclose(totals, expected, rtol=1e-5)
    np.testing.assert_allclose(last.values[0], w, rtol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_cond_on_either_of_two_closures(first) -> None:
    f, g = make(W), make(W + 1)
    choose = lambda p, f, g: lax.cond(p, lambda f, g: f, lambda f, g: g, f, g)
    got = jax.jit(choose)(first, f, g)
    np.testing.assert_allclose(got(X), (f if first else g)(X), rtol=1e-6)
    np.testing.assert_allclose(lax.cond(first, lambda: make(W), lambda: make(W + 1))(X), got(X))
    gradient = jax.grad(lambda f, g: choose(first, f, g)(X), argnums=(0, 1))(f, g)
    assert jnp.any(gradient[0].values[0] != 0) == first
    assert jnp.any(gradient[1].values[0] != 0) != first


def test_device_put_and_block_until_ready() -> None:
    f = jax.device_put(make(W), jax.devices()[0])
    np.testing.assert_allclose(jax.block_until_ready(f)(X), make(W)(X))
    assert jax.device_get(f).values[0].__class__ is np.ndarray
    np.testing.assert_allclose(jax.device_get(f)(X), make(W)(X))


def test_donated() -> None:
    w = jnp.array([4.0, 5.0, 6.0])
    f = fv.Closure(lambda x: x * w, X)
    expected = f(X)
    doubled = jax.jit(lambda f: jax.tree.map(lambda v: 2 * v, f), donate_argnums=0)(f)
    np.testing.assert_array_equal(doubled(X), 2 * expected)
    assert w.is_deleted()


def test_nested_closures() -> None:
    f = make(W)
    g = fv.Closure(lambda x: f(x) * jnp.sum(V), X)
    assert [v is w for v, w in zip(g.values, (W, V), strict=True)] == [True, True]
    h = fv.Closure(lambda f, x: f(x) ** 2, f, X)
    assert h.values == ()
    np.testing.assert_allclose(h(f, X), f(X) ** 2, rtol=1e-6)
    assert isinstance(h.in_struct[0], fv.Closure)


def test_one_dispatch_compiled_once_per_structure() -> None:
    fresh = lambda w: fv.Closure(lambda x: jnp.tanh(w * x) - 0.123, X)
    programs = set()
    for k in range(5):
        f = fresh(W + k)  # the one before is gone by now
        np.testing.assert_allclose(f(X), jnp.tanh((W + k) * X) - 0.123, rtol=1e-6)
        programs.add(f._program)
    assert len(programs) == 1
    assert f._program._run._cache_size() == 1


def test_a_closure_does_not_fit_a_solver_of_other_types() -> None:
    f = make(W)
    with pytest.raises(
        StructureError, match=r"args\[0\] .*expected float32\[3\], got float32\[2\]"
    ):
        jax.jit(lambda f, x: f(x))(f, X[:2])


# Several devices, in a process of its own.

SHARDED = """
    import jax, jax.numpy as jnp, numpy as np, freevars.jax as fv
    from jax.sharding import NamedSharding, PartitionSpec as P
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.{kind},))
    split, whole = NamedSharding(mesh, P("i")), NamedSharding(mesh, P())
    w = jax.device_put(jnp.arange(16.0), split)
    x = jax.device_put(jnp.ones(16), whole)
    make = lambda w: fv.Closure(lambda x: jnp.sin(w) * x, x)
    f = make(w)
    assert f.values[0].sharding == split
    assert jax.jit(lambda f: f)(f).values[0].sharding.is_equivalent_to(split, 1)
    np.testing.assert_allclose(f(x), np.sin(np.arange(16.0)), rtol=1e-6)
    loss = lambda f, x: jnp.sum(f(x) ** 2)
    gradient = jax.jit(jax.grad(loss))(f, x)
    assert gradient.values[0].sharding.is_equivalent_to(split, 1), gradient.values[0].sharding
    expected = 2 * np.sin(np.arange(16.0)) * np.cos(np.arange(16.0))
    np.testing.assert_allclose(gradient.values[0], expected, rtol=1e-4, atol=1e-6)
    moved = jax.device_put(f, whole)
    assert moved.values[0].sharding == whole
    np.testing.assert_allclose(moved(x), f(x), rtol=1e-6)
    converted, hoisted = fv.closure_convert(lambda x: jnp.sin(w) * x, x, hoist="all")
    assert hoisted[0].sharding == split
    assert converted(x, *hoisted).sharding.is_equivalent_to(f(x).sharding, 1)
    print("done")
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.slow
def test_a_sharded_capture_keeps_its_sharding(kind) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED.format(kind=kind))],
        capture_output=True,
        text=True,
        check=False,
        env={**with_devices(8), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "done\n", done.stderr[-2000:]
