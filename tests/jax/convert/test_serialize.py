"""A closure is a value: copies, pickles, other processes and exported programs carry what it holds
and what it computes, and nothing of the Python function."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from functools import partial
from typing import NamedTuple

import cloudpickle
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.optimize
from jax import export, lax
from jax.custom_derivatives import SymbolicZero

import freevars.jax as fv
from freevars.errors import StructureError
from freevars.jax._convert import serialize
from freevars.jax._convert.pack import pack
from freevars.jax._convert.unpack import unpack
from tests.jax.processes import with_devices

X = jnp.array([0.5, -0.25, 2.0])
W = jnp.array([1.0, 2.0, -1.0])


def elsewhere(value):
    """Pickled, and loaded by a process that never saw it."""
    data = pickle.dumps(value)
    marked = dict(serialize._MARKED)
    serialize._MARKED.clear()
    try:
        return pickle.loads(data)
    finally:
        serialize._MARKED.update(marked)


# Programs of every kind, each a function of x that captures W.


@jax.custom_jvp
def doubled_slope(x):
    return jnp.sin(x) * W


doubled_slope.defjvp(
    lambda primals, tangents: (doubled_slope(*primals), 2 * jnp.cos(*primals) * tangents[0] * W)
)


@jax.custom_vjp
def tripled_slope(x, y):
    return x * y


tripled_slope.defvjp(
    lambda x, y: (tripled_slope(x, y), (x, y)),
    lambda saved, ct: (3 * ct * saved[1] * doubled_slope(saved[0]), ct * saved[0]),
)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def power(x, n):
    return x**n


power.defjvp(
    lambda n, primals, tangents: (power(*primals, n), 5 * n * power(*primals, n) * tangents[0])
)


PROGRAMS = {
    "arithmetic": lambda x: jnp.sum(jnp.sin(W * x) @ jnp.outer(x, W)) + 2.0,
    "nested jit": lambda x: jax.jit(lambda x: jax.jit(jnp.sin)(x) * W)(x),
    "scan": lambda x: lax.scan(lambda c, w: (c * w, c), x, W)[0],
    "while": lambda x: lax.while_loop(lambda c: c[0] < 9.0, lambda c: c + W**2, x),
    "cond": lambda x: lax.cond(x[0] > 0, lambda x: jnp.sin(x) * W, jnp.cos, x),
    "switch": lambda x: lax.switch(1, [jnp.sin, lambda x: W * x, jnp.cos], x),
    "linear solve": lambda x: jnp.linalg.solve(jnp.diag(W) + jnp.eye(3), x),
    "custom linear solve": lambda x: lax.custom_linear_solve(
        lambda v: W**2 * v, x, lambda _, b: b / W**2, symmetric=True
    ),
    "gather and scatter": lambda x: x.at[jnp.array([0, 2])].add(W[jnp.array([1, 0])]),
    "random": lambda x: x * W * jax.random.normal(jax.random.key(0), (3,)),
    "random, of another kind": lambda x: (
        x * W * jax.random.uniform(jax.random.key(1, impl="rbg"), (3,))
    ),
    "convolution": lambda x: jnp.convolve(x, W),
    "checkpoint": lambda x: jax.checkpoint(lambda x: jnp.sin(W * x) ** 2)(x),
    "checkpoint with a policy": lambda x: jax.checkpoint(
        lambda x: jnp.sin(W @ x) * x, policy=jax.checkpoint_policies.dots_saveable
    )(x),
    "reduce": lambda x: lax.reduce(x * W, jnp.float32(0), lambda a, b: a + 2 * b, (0,)),
    "sort": lambda x: lax.sort((x * W, W), num_keys=1)[1] * x,
    "named axis": lambda x: jax.vmap(lambda y, w: lax.psum(y, "i") * w, axis_name="i")(x, W),
    "associative scan": lambda x: lax.associative_scan(jnp.add, x * W),
    "decompositions": lambda x: jnp.linalg.eigvalsh(jnp.outer(x, x) + jnp.diag(W)),
    "fft": lambda x: jnp.fft.rfft(x * W).real,
    "integers": lambda x: x * jnp.arange(3) + jnp.argmax(W),
    "half precision": lambda x: (x.astype(jnp.bfloat16) * W.astype(jnp.bfloat16)).astype(x.dtype),
    "a weak number": lambda x: lax.full_like(2.0, 3) * x * W,
    "JAX's custom rules": lambda x: jax.nn.relu(W * x) + jax.nn.silu(x) + jax.nn.relu6(x),
    "a custom rule": doubled_slope,
    "a custom rule of both halves": lambda x: tripled_slope(doubled_slope(x), W),
    "custom rules in a loop": lambda x: lax.scan(
        lambda c, w: (tripled_slope(doubled_slope(c), w * c), None), x, W
    )[0],
    "a custom rule with a static argument": lambda x: jax.jit(lambda x: power(x * W, 2))(x),
    "printing": lambda x: (jax.debug.print("x"), x * W)[1],
    "callback": lambda x: jax.pure_callback(np.negative, x, x, vmap_method="sequential") * W,
    "nothing captured": lambda x: x + 1,
    "ignored": lambda x: W * 2,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_comes_back_as_it_was(name) -> None:
    f = fv.Closure(PROGRAMS[name], X)
    g = elsewhere(f)
    assert g._program is f._program, "and is shared with what computes the same"
    assert unpack(pickle.loads(pickle.dumps(pack(f._program)))) is f._program
    jax.tree.map(np.testing.assert_array_equal, g(X), f(X))


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - {"callback", "while", "ignored"}))
@pytest.mark.slow
def test_its_derivatives_too(name) -> None:
    f = fv.Closure(PROGRAMS[name], X)
    g = elsewhere(f)
    loss = lambda f, x: jnp.sum(f(x) ** 2)
    of = lambda f: jax.tree.leaves(jax.grad(loss, argnums=(0, 1), allow_int=True)(f, X))
    for a, b in zip(of(g), of(f), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(
        jax.jacrev(jax.grad(loss, 1), 1)(g, X), jax.jacrev(jax.grad(loss, 1), 1)(f, X), rtol=1e-5
    )


# What has a rule of this library: the rule is traced where it is sent.


def newton(fun, x0):
    return lax.fori_loop(0, 20, lambda _, x: x - fun(x) / jax.grad(fun)(x), x0)


def hybrid(fun, x0):
    return scipy.optimize.root(fun, x0, jac=fun.jacobian, tol=1e-6).x


def by_matrix(operator, b):
    return W[:1] ** 2 * b / operator(jnp.ones_like(b))


@jax.custom_jvp
def squared(x):
    return x**2


squared.defjvp(lambda primals, tangents: (squared(*primals), 2 * primals[0] * tangents[0]))


@jax.custom_jvp
def by_rule(y):
    return fv.root(newton)(lambda x: x**2 - y, 1.0)


@by_rule.defjvp
def _(primals, tangents):
    x = by_rule(*primals)
    return x, fv.root(newton)(lambda s: s * x - 0.5, 1.0) * tangents[0]


# Each gives the square root of 4 y.
SOLVERS = {
    "root": lambda y: fv.root(newton)(lambda x: W[1] * x**2 / 2 - 4 * y, 1.0),
    "a rule of the user's inside": lambda y: fv.root(newton)(lambda x: squared(x) - 4 * y, 1.0),
    "inside a rule of the user's": lambda y: 2 * by_rule(y),
    "nested": lambda y: fv.root(newton)(
        lambda x: fv.root(newton)(lambda z: z * x - y, 1.0) - x / 4, 1.0
    ),
    "a linear solve that holds an array": lambda y: fv.root(linear_solve=by_matrix)(
        lambda fun, x0: newton(lambda x: fun(x[None])[0], x0[0])[None]
    )(lambda x: x**2 - 4 * y, jnp.ones(1))[0],
    "on the host": lambda y: fv.root(fv.on_host(hybrid))(lambda x: x**2 - 4 * y, jnp.ones(1))[0],
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "nested")) for n in SOLVERS]
)
def test_a_solver_inside_has_its_derivatives_elsewhere(name, monkeypatch) -> None:
    f = fv.Closure(SOLVERS[name], 1.0)
    data = pickle.dumps(f)
    monkeypatch.setattr(serialize, "_MARKED", {})
    g = pickle.loads(data)
    assert g._program is not f._program, "it comes back as another program"
    y = 2.25
    np.testing.assert_allclose(g(y), 3.0, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(g)(y), 2 / 3, rtol=1e-5)
    np.testing.assert_allclose(jax.jvp(g, (y,), (1.0,))[1], 2 / 3, rtol=1e-5)
    if name == "root":
        np.testing.assert_allclose(jax.hessian(g)(y), -4 / 27, rtol=1e-5)
        slope = jax.grad(lambda g: g(y))(g).values[0]  # x^2 = 8 y / w
        np.testing.assert_allclose(slope, [0, -0.75, 0], rtol=1e-5)
        np.testing.assert_allclose(jax.vmap(jax.grad(g))(jnp.array([1.0, 4])), [1, 0.5], rtol=1e-5)


def test_a_solver_that_fails_elsewhere_has_no_derivative() -> None:
    stopped = fv.root(lambda fun, x0: x0 - fun(x0) / jax.grad(fun)(x0))
    g = elsewhere(fv.Closure(lambda y: stopped(lambda x: x**2 - y, 1.0), 4.0))
    assert g(4.0) == 2.5
    assert np.isnan(jax.grad(g)(4.0))


def by_lineax(method):
    def fun(y):  # y x = 3
        like = jax.eval_shape(lambda: jnp.ones(2))
        operator = lx.FunctionLinearOperator(lambda x: y * x, like, lx.positive_semidefinite_tag)
        return lx.linear_solve(operator, 3 * jnp.ones(2), method).value[0]

    return fun


OF_LINEAX = {
    "LU": lx.LU(),
    "QR": lx.QR(),
    "GMRES": lx.GMRES(1e-6, 1e-6),
    "CG": lx.CG(1e-6, 1e-6),  # asks for a tag, which equals itself alone
    "AutoLinearSolver": lx.AutoLinearSolver(well_posed=None),  # by tokens, each of its own class
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_LINEAX)
def test_linear_solves_of_lineax(name) -> None:
    g = elsewhere(fv.Closure(by_lineax(OF_LINEAX[name]), 2.0))
    np.testing.assert_allclose(g(1.5), 2, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(g)(1.5), -4 / 3, rtol=1e-5)
    np.testing.assert_allclose(jax.hessian(g)(1.5), 16 / 9, rtol=1e-5)


# Values, not the function.

PARAMS = {"w": jnp.float32(2)}


def loss(x):
    return PARAMS["w"] * x


CARRIERS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda f: pickle.loads(pickle.dumps(f)),
    "cloudpickle": lambda f: pickle.loads(cloudpickle.dumps(f)),
    "elsewhere": elsewhere,
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_copy_holds_the_values_of_the_closure(carrier, monkeypatch) -> None:
    carry = CARRIERS[carrier]
    w, n = jnp.float32(2), 3
    local = fv.Closure(lambda x: w * x**n, 1.0)
    module = fv.Closure(loss, 1.0)
    w, n = jnp.float32(5), 4
    monkeypatch.setitem(PARAMS, "w", jnp.float32(7))
    assert carry(local)(2.0) == 16
    assert carry(module)(2.0) == 4
    assert jax.tree.structure(carry(local)) == jax.tree.structure(local)
    copied = carry(fv.Closure(lambda x: w * x, 1.0))
    assert copied.captures.values[0].dtype == "float32"


@pytest.mark.parametrize("carrier", CARRIERS)
def test_closures_out_of_transformations_and_inside_structures(carrier) -> None:
    carry = CARRIERS[carrier]
    f = fv.Closure(lambda x: jnp.sum(W * x**2), X)
    doubled = carry(jax.tree.map(lambda v: 2 * v, f))
    np.testing.assert_allclose(doubled(X), 2 * f(X))
    gradient = carry(jax.grad(lambda f: f(X))(f))
    np.testing.assert_allclose(gradient.values[0], X**2)
    jax.tree.map(lambda a, b: a - 0.1 * b, f, gradient)
    assert carry(jax.jit(lambda f: f)(f))(X) == f(X)
    assert carry(jax.device_put(f, jax.devices()[0]))(X) == f(X)
    assert carry({"f": (f, 1)})["f"][0](X) == f(X)
    batched = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), f)
    np.testing.assert_allclose(jax.vmap(lambda f: f(X))(carry(batched)), [f(X), 2 * f(X)])
    axes = carry(jax.tree.map(lambda _: 0, f))
    np.testing.assert_allclose(jax.vmap(lambda f: f(X), (axes,))(batched), [f(X), 2 * f(X)])
    if carrier != "elsewhere":  # a structure alone is not of this library
        assert carry(jax.tree.structure(f)) == jax.tree.structure(f)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("hoist", ["all", "traced"])
def test_a_converted_function_and_its_hoisted_values(carrier, hoist) -> None:
    w = jnp.float32(2)
    converted, hoisted = fv.closure_convert(lambda x: w * x, 1.0, hoist=hoist)
    w = jnp.float32(5)
    c, h = CARRIERS[carrier]((converted, hoisted))
    assert c(3.0, *h) == 6
    assert c.__name__ == "<lambda>"
    assert repr(c) == repr(converted)
    with pytest.raises(StructureError, match="takes 1 arguments"):
        c()
    if hoist == "all":
        assert c(3.0, jnp.float32(5)) == 15
        with pytest.raises(StructureError, match="captured value 0"):
            c(3.0, X)


def test_a_deep_copy_has_arrays_of_its_own() -> None:
    w = np.ones(3, np.float32)
    f = fv.Closure(lambda x: x * w, X)
    deep, shallow = copy.deepcopy(f), copy.copy(f)
    w[:] = 3
    np.testing.assert_array_equal(deep(X), X)
    assert shallow.values[0] is f.values[0]
    shared = jnp.ones(3)
    one = fv.Closure(lambda x: x * shared, X)
    both = copy.deepcopy([one, one])
    assert both[0] is both[1]


# Types of values and of arguments.


class Point(NamedTuple):
    x: object
    y: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    a: object
    name: str = dataclasses.field(default="n", metadata={"static": True})


def test_the_types_of_values_stay() -> None:
    held = [
        jnp.asarray(2.0),  # weak
        jnp.float32(2),
        jnp.arange(3, dtype=jnp.int8),
        jnp.ones(2, jnp.bfloat16),
        jax.random.key(3),
        jax.random.key(3, impl="rbg"),
        jnp.array([1 + 2j]),
        np.arange(3.0, dtype=np.float32),
        jnp.array([True]),
    ]
    f = fv.Closure(lambda: [jnp.ravel(h) for h in held])
    g = elsewhere(f)
    for a, b in zip(f.values, g.values, strict=True):
        assert jax.typeof(a) == jax.typeof(b)
        assert getattr(a, "weak_type", None) == getattr(b, "weak_type", None)
        assert type(a) is type(b)
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    for a, b in zip(f(), g(), strict=True):
        np.testing.assert_array_equal(raw(a), raw(b))


def test_arguments_and_results_of_every_kind() -> None:
    inner = fv.Closure(lambda x: x * W, X)
    args = (Point(X, [X, None]), Data(X), {"s": "text", "f": jnp.sin, "n": 2}, inner)

    def fun(point, data, rest, inner):
        y = rest["f"](point.x + point.y[0] * data.a * rest["n"])
        return {"y": inner(y), "p": Point(y, rest["s"]), "d": data}

    f = fv.Closure(fun, *args)
    g = elsewhere(f)
    assert jax.tree.structure(g) == jax.tree.structure(f)
    got = g(*args)
    np.testing.assert_array_equal(got["y"], f(*args)["y"])
    assert got["p"].y == "text"
    assert got["d"].name == "n"
    assert g.in_struct[0] == f.in_struct[0]
    with pytest.raises(StructureError, match="static leaf"):
        g(*args[:2], {**args[2], "s": "other"}, inner)


# What cannot travel.


def test_traced_and_deleted_values_are_refused() -> None:
    def inside(w):
        with pytest.raises(pickle.PicklingError, match=r"captured value 0 of .* traced value"):
            pickle.dumps(fv.Closure(lambda x: w * x, X))
        again = copy.deepcopy(fv.Closure(lambda x: w * x, X))
        return jnp.sum(again(X))

    np.testing.assert_array_equal(jax.grad(inside)(W), X)
    w = W + 1
    f = fv.Closure(lambda x: w * x, X)
    w.delete()
    with pytest.raises(pickle.PicklingError, match="deleted or donated"):
        pickle.dumps(f)


def test_a_rule_that_stays_a_function_is_refused() -> None:
    @jax.custom_jvp
    def f(x, c):
        return x * c

    @partial(f.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        if not isinstance(tangents[1], SymbolicZero):
            raise TypeError
        return f(*primals), tangents[0] * primals[1]

    closure = fv.Closure(lambda x: f(x, W), X)
    with pytest.raises(pickle.PicklingError, match="custom derivative rule"):
        pickle.dumps(closure)


class Unpicklable:
    def __call__(self, x):
        return np.asarray(x)

    def __reduce__(self):
        msg = "it is bound to this machine"
        raise TypeError(msg)


def test_a_callback_that_cannot_be_pickled_is_refused_by_name() -> None:
    callback = Unpicklable()
    f = fv.Closure(lambda x: jax.pure_callback(callback, x, x), X)
    text = r"callback of the operation pure_callback.* bound"
    with pytest.raises(pickle.PicklingError, match=text):
        pickle.dumps(f)


def test_a_local_function_inside_needs_cloudpickle(monkeypatch) -> None:
    f = fv.Closure(lambda x: jax.pure_callback(lambda x: 2 * np.asarray(x), x, x) * W, X)
    np.testing.assert_array_equal(elsewhere(f)(X), 2 * X * W)
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(pickle.PicklingError, match=r"lambda.*cloudpickle.*not installed"):
        pickle.dumps(f)


def test_another_release_of_jax_is_refused(monkeypatch) -> None:
    f = fv.Closure(lambda x: x * W, X)
    packed = pack(f._program)._replace(release="0.1")
    with pytest.raises(pickle.UnpicklingError, match=r"with JAX 0\.1, and this is JAX"):
        unpack(packed)


def test_64_bits_where_there_are_none_are_refused() -> None:
    with jax.enable_x64(True):
        w = jnp.float64(2)
        data = pickle.dumps(fv.Closure(lambda x: w * x, 1.0))
    with pytest.raises(pickle.UnpicklingError, match="jax_enable_x64"):
        pickle.loads(data)
    with jax.enable_x64(True):
        assert pickle.loads(data)(3.0) == 6.0


# Other processes.


def slope(f):
    return jax.grad(lambda f: f(X))(f)


@pytest.fixture(scope="module")
def pool():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        yield pool


@pytest.mark.parametrize("rule", [jnp.sin, jax.nn.silu], ids=["sin", "silu"])
def test_a_worker_returns_the_gradient_of_a_closure(pool, rule) -> None:
    f = fv.Closure(lambda x: jnp.sum(rule(W * x)), X)
    for _ in range(2):
        gradient = pool.submit(slope, f).result(timeout=120)
        assert jax.tree.structure(gradient) == jax.tree.structure(f)
        np.testing.assert_allclose(gradient.values[0], slope(f).values[0], rtol=1e-6)
        f = jax.tree.map(lambda v, g: v - 0.1 * g, f, gradient)


@pytest.mark.slow
def test_dask_sends_a_closure_and_returns_its_gradient() -> None:
    dask = pytest.importorskip("dask")
    f = fv.Closure(lambda x: jnp.sum(jnp.sin(W * x)), X)
    delayed = dask.delayed(lambda f: jax.grad(lambda f: f(X))(f))
    (gradient,) = dask.compute(delayed(dask.delayed(f)), scheduler="processes", num_workers=1)
    assert jax.tree.structure(gradient) == jax.tree.structure(f)
    np.testing.assert_allclose(gradient.values[0], slope(f).values[0], rtol=1e-6)


def run(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.slow
def test_an_exported_solver_takes_closures_of_another_process(tmp_path) -> None:
    pytest.importorskip("flatbuffers")
    solver = jax.jit(lambda f, x: lax.fori_loop(0, 20, lambda _, x: x - 0.1 * jax.grad(f)(x), x))
    f = fv.Closure(lambda x: jnp.sum(W**2 * jax.nn.silu(x) ** 2), X)
    (tmp_path / "solver").write_bytes(export.export(solver)(f, X).serialize(vjp_order=1))
    (tmp_path / "f").write_bytes(pickle.dumps((f, X)))
    printed = run(f"""
        import pickle, pathlib
        import freevars.jax as fv, jax, jax.numpy as jnp
        from jax import export
        folder = pathlib.Path({str(tmp_path)!r})
        solver = export.deserialize((folder / "solver").read_bytes())
        f, x = pickle.loads((folder / "f").read_bytes())
        w = f.values[0]
        fresh = fv.Closure(lambda x: jnp.sum(w**2 * jax.nn.silu(x) ** 2), x)
        assert jax.tree.structure(fresh) == jax.tree.structure(f)
        print(*solver.call(fresh, x), *jax.grad(lambda f: solver.call(f, x).sum())(f).values[0])
    """)
    expected = [*solver(f, X), *jax.grad(lambda f: jnp.sum(solver(f, X)))(f).values[0]]
    np.testing.assert_allclose([float(x) for x in printed.split()], expected, rtol=1e-4)


SHARDED = """
    import pickle, pathlib
    import jax, jax.numpy as jnp, numpy as np, freevars.jax as fv
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    path = pathlib.Path({path!r})
    if {save}:
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        constrain = jax.lax.with_sharding_constraint
        total = jax.shard_map(
            lambda y: jax.lax.psum(jnp.sum(y), ("a", "b")),
            mesh=mesh, in_specs=P("a", "b"), out_specs=P(),
        )
        s = jax.device_put(jnp.arange(16.0).reshape(8, 2), NamedSharding(mesh, P("a", "b")))
        t = jax.device_put(jnp.float32(2), jax.devices()[3])
        fs = [
            fv.Closure(lambda x: jnp.sum(s * x), 1.0),
            fv.Closure(lambda x: t * x, 1.0),
            fv.Closure(lambda x: constrain(s * x, NamedSharding(mesh, P("a"))), 1.0),
            fv.Closure(lambda x: total(s * x), 1.0),
        ]
        for f in fs:
            g = pickle.loads(pickle.dumps(f))
            assert g.values[0].sharding == f.values[0].sharding, g.values[0].sharding
            assert g(3.0).sharding == f(3.0).sharding
        path.write_bytes(pickle.dumps([pickle.dumps(f) for f in fs]))
    else:
        for data in pickle.loads(path.read_bytes()):
            try:
                f = pickle.loads(data)
                print(f(3.0), *sorted({{d.id for d in f.values[0].devices()}}))
            except pickle.UnpicklingError as error:
                print(error)
"""


@pytest.mark.slow
def test_shardings_come_back_where_the_devices_exist(tmp_path) -> None:
    eight = {"XLA_FLAGS": with_devices(8)["XLA_FLAGS"]}
    code = lambda save: SHARDED.format(path=str(tmp_path / "f"), save=save)
    run(code(True), **eight)
    lines = run(code(False), **eight).splitlines()
    assert lines[0] == "360.0 0 1 2 3 4 5 6 7"
    assert lines[1] == "6.0 3"
    lines = run(code(False), XLA_FLAGS="").splitlines()
    assert lines[0] == "360.0 0"
    assert lines[1] == "6.0 0"
    assert all("some of which do not exist here" in line for line in lines[2:])
    assert len(lines) == 4
