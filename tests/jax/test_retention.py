"""Nothing is kept: converting many closures over big arrays leaves none of them behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freevars.jax as fv
from freevars.jax._convert import program as _program

X = jnp.array([0.5, -0.25, 2.0])

RESIDENT = """
    import ctypes, gc, os
    import jax, jax.numpy as jnp, numpy as np, freevars.jax as fv
    x = jnp.ones(())
    {setup}

    def resident():
        gc.collect()
        # What is freed goes back to the system, so that only what is held counts.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def once(k):
        w = jnp.asarray(np.full(1 << 20, float(k), np.float32))
        {once}

    for k in range(5):
        once(k)
    before = resident()
    for k in range(200):
        once(k)
    print(resident() - before, sum(a.nbytes for a in jax.live_arrays()))
"""

WAYS = {
    "convert": ("", "fv.closure_convert(lambda x: jnp.sum(w) * x, x, hoist='all')"),
    "convert and call": (
        "",
        "c, h = fv.closure_convert(lambda x: jnp.sum(w) * x, x); c(x, *h)",
    ),
    "closure": ("", "fv.Closure(lambda x: jnp.sum(w) * x, x)(x)"),
    "jitted solver": (
        "solve = jax.jit(lambda f, x: f(x))",
        "solve(fv.Closure(lambda x: jnp.sum(w) * x, x), x)",
    ),
    "gradient": (
        "solve = jax.jit(jax.grad(lambda f, x: f(x)))",
        "solve(fv.Closure(lambda x: jnp.sum(w) * x, x), x)",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("way", WAYS)
def test_two_hundred_conversions_leave_memory_where_it_was(way) -> None:
    setup, once = WAYS[way]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RESIDENT.format(setup=setup, once=once))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kept, live = map(float, done.stdout.split())
    assert kept < 20, "MiB kept, of 800 that went through"
    assert live < 100, "bytes: nothing but x"


class Function:
    """A callable whose death can be watched, with the array that it captures."""

    def __init__(self, body):
        self.w = jnp.array([1.0, 2.0, 3.0])
        self.body = body

    def __call__(self, x):
        return self.body(x, self.w)


@jax.custom_jvp
def ruled(x):
    return jnp.sin(x)


ruled.defjvps(lambda t, ans, x: t * jnp.cos(x))

BODIES = {
    "arithmetic": lambda x, w: x * w,
    "jit": lambda x, w: jax.jit(lambda x: x * w)(x),
    "scan": lambda x, w: jax.lax.scan(lambda c, _: (c * w, None), x, length=2)[0],
    "numpy in jit": lambda x, w: jax.jit(lambda x: x * np.asarray(w))(x),
    "custom rule": lambda x, w: ruled(x * w),
    "checkpoint": lambda x, w: jax.checkpoint(lambda x: jnp.sin(x * w))(x),
    "relu": lambda x, w: jax.nn.relu(x * w),
    "cond": lambda x, w: jax.lax.cond(x[0] > 0, lambda: x * w, lambda: x - w),
}
apply = jax.jit(lambda f, x: f(x))
USES = {
    "convert": lambda fun: fv.closure_convert(fun, X, hoist="all"),
    "call converted": lambda fun: (lambda c, h: c(X, *h))(*fv.closure_convert(fun, X)),
    "call": lambda fun: fv.Closure(fun, X)(X),
    "solver": lambda fun: apply(fv.Closure(fun, X), X),
    "gradient": lambda fun: jax.grad(lambda f: jnp.sum(f(X)))(fv.Closure(fun, X)),
    "inside jit": lambda fun: jax.jit(lambda x: fv.Closure(fun, x)(x))(X),
}


# JAX's caches have to be cleared for some, which costs whatever is compiled next.
@pytest.mark.parametrize(
    "body", [pytest.param(b, marks=pytest.mark.slow if i % 3 else ()) for i, b in enumerate(BODIES)]
)
@pytest.mark.parametrize("use", USES)
def test_functions_and_arrays_die(body, use) -> None:
    fun = Function(BODIES[body])
    watched = weakref.ref(fun), weakref.ref(fun.w)
    USES[use](fun)
    del fun
    if use == "inside jit" or body in ("jit", "numpy in jit"):
        # JAX keeps what a jit has closed over, for as long as its own caches live.
        jax.clear_caches()
    gc.collect()
    assert [ref() is None for ref in watched] == [True, True]


def test_the_table_of_programs_forgets() -> None:
    _program._RECENT.clear()  # or some of these would be forgotten meanwhile
    gc.collect()
    before = len(_program._PROGRAMS)
    closures = [fv.Closure((lambda n: lambda x: x * n)(float(n)), X) for n in range(100, 120)]
    for f in closures:
        f(X)
    assert len(_program._PROGRAMS) == before + 20
    assert len(_program._RECENT) <= _program._RECENT_SIZE
    del closures, f
    _program._RECENT.clear()
    gc.collect()
    assert len(_program._PROGRAMS) <= before


def test_what_is_kept_holds_nothing_of_the_users() -> None:
    _program._RECENT.clear()
    kept = lambda: len(_program._RECENT)
    for body in ("arithmetic", "jit", "scan", "checkpoint", "cond", "relu", "custom rule"):
        before = kept()
        fv.Closure(Function(BODIES[body]), X)
        assert kept() == before + 1, body
    before = kept()
    fv.Closure(lambda x, s: x, X, "static")
    fv.Closure(lambda x, f: x, X, jax.tree_util.Partial(lambda: 0))
    fv.Closure(lambda x: jax.pure_callback(lambda x: x, X, x), X)
    assert kept() == before


def test_what_is_kept_is_bounded() -> None:
    for n in range(_program._RECENT_SIZE + 3):
        fv.Closure(lambda x, n=n: x * n, 1.0)
    assert len(_program._RECENT) == _program._RECENT_SIZE


def holding(kind, big, held):
    """A function whose rule holds an array and an object, and whose body may read the array."""

    def scaled(x, by):
        held.used = True
        return x * jnp.mean(by)

    if kind == "jvp":
        f = jax.custom_jvp(lambda x: scaled(x, big))
        f.defjvp(lambda p, t: (f(p[0]), scaled(t[0], big)))
    elif kind == "jvp, the rule alone":
        f = jax.custom_jvp(lambda x: x * 2.0)
        f.defjvp(lambda p, t: (f(p[0]), 2.0 * t[0] + scaled(0.0 * t[0], big)))
    else:
        f = jax.custom_vjp(lambda x: x * 2.0)
        f.defvjp(lambda x: (f(x), None), lambda _, ct: (scaled(ct, big),))
        if kind == "vjp":
            f = jax.custom_vjp(lambda x: scaled(x, big))
            f.defvjp(lambda x: (f(x), None), lambda _, ct: (scaled(ct, big),))
    return f


class Held:
    """An object that can be watched."""


def _newton(fun, x0):
    return jax.lax.fori_loop(0, 5, lambda _, x: x - fun(x), x0)


@fv.on_host
def on_host(fun, x0):
    x = x0
    for _ in range(5):
        x = x - np.asarray(fun(x))
    return x


SOLVERS = {
    "root": (fv.root(_newton), lambda f: lambda x: x - f(x) / 4.0 - 1.0),
    "fixed_point": (
        fv.fixed_point(lambda fun, x0: jax.lax.fori_loop(0, 40, lambda _, x: fun(x), x0)),
        lambda f: lambda x: f(x) / 8.0 + 1.0,
    ),
    "argmin": (
        fv.argmin(lambda fun, x0: x0 - 0.5 * jax.grad(fun)(x0)),
        lambda f: lambda x: (x - 1.0) ** 2 + 0.0 * f(x),
    ),
    "on_host": (fv.root(on_host, check=False), lambda f: lambda x: x - f(x) / 4.0 - 1.0),
    "jit": (
        lambda f, x: apply(fv.Closure(f, x), x),
        lambda f: lambda x: x - f(x),
    ),
}


ALONE = ["jvp, the rule alone", "vjp, the rule alone"]


@pytest.mark.parametrize(
    "kind", ["jvp", "vjp", *(pytest.param(k, marks=pytest.mark.slow) for k in ALONE)]
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_that_a_rule_holds_outlives_a_call(solver, kind) -> None:
    solve, make = SOLVERS[solver]

    def once(k):
        big, held = jnp.full(100, float(k)), Held()
        solve(make(holding(kind, big, held)), jnp.float32(1.0))
        return weakref.ref(big), weakref.ref(held)

    watched = [ref for k in range(1, 4) for ref in once(k)]
    # The last call may be remembered by JAX until the next.
    once(4)
    gc.collect()
    assert [ref() is None for ref in watched] == [True] * len(watched)


def test_what_the_rules_of_equal_closures_hold_is_let_go() -> None:
    """The program is kept, and shared by all; none of the arrays is."""

    def once(k):
        big = jnp.full(1000, k)
        rule = jax.custom_jvp(lambda x: x * jnp.mean(big))
        rule.defjvp(lambda p, t: (rule(p[0]), t[0] * jnp.mean(big)))
        return weakref.ref(big), fv.Closure(lambda x: rule(4.0) - x, 1.0)._program

    made = [once(float(k)) for k in range(4)]
    gc.collect()
    assert len({id(program) for _, program in made}) == 1
    assert [array() for array, _ in made] == [None] * 4
