"""JAX's own switches that change how programs are traced: right under each, or refused."""

# ruff: noqa: E501 (functions and messages, one a line)

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import jax
import pytest

PROGRAM = """
    import functools
    import jax, jax.numpy as jnp, numpy as np, freevars.jax as fv
    from jax import lax

    X, W = jnp.array([0.5, -0.25, 2.0]), jnp.array([1.0, 2.0, -1.0])
    N = np.array([1.0, 2.0, 3.0], np.float32)

    @jax.custom_vjp
    def vjp_sine(x, w):
        return jnp.sin(x * w)

    def bwd(residuals, ct):
        x, w = residuals
        return ct * jnp.cos(x * w) * w, 3 * ct * jnp.cos(x * w) * x

    vjp_sine.defvjp(lambda x, w: (vjp_sine(x, w), (x, w)), bwd)

    @jax.custom_jvp
    def jvp_sine(x):
        return jnp.sin(x)

    jvp_sine.defjvps(lambda t, ans, x: 2 * t * jnp.cos(x))

    BODIES = {
        "plain": lambda w: lambda x: x * w + N,
        "jit": lambda w: lambda x: jax.jit(lambda x: x * w + jax.jit(lambda x: x * N)(x))(x),
        "vjp": lambda w: lambda x: vjp_sine(x, w) * N,
        "jvp": lambda w: lambda x: jvp_sine(x * w) * N,
        "checkpoint": lambda w: lambda x: jax.checkpoint(lambda x: jnp.sin(x * w) * N)(x),
        "both": lambda w: lambda x: jax.checkpoint(lambda x: vjp_sine(jvp_sine(x), w))(x),
        "cond": lambda w: lambda x: lax.cond(x[0] > 0, lambda x: x * w, lambda x: x - N, x),
    }
    if not getattr(jax.config, "jax_scan3", False):
        BODIES["scan"] = lambda w: lambda x: lax.scan(lambda c, n: (vjp_sine(c, w) * n, None), x, N)[0]

    def traced(fun, x):
        f, hoisted = fv.closure_convert(fun, x)
        return f(x, *hoisted)

    def everything(fun, x):
        f, hoisted = fv.closure_convert(fun, x, hoist="all")
        return f(x, *hoisted)

    solve = jax.jit(lambda f, x: f(x))
    closure = lambda fun, x: solve(fv.Closure(fun, x), x)
    def gradients(via, w, x):
        def total(name, w, x):
            fun = BODIES[name](w)
            return jnp.sum((fun(x) if via is None else via(fun, x)) ** 2)
        return {name: jax.value_and_grad(functools.partial(total, name), (0, 1))(w, x) for name in BODIES}

    run = jax.jit(gradients, static_argnums=0)
    expected = run(None, W, X)
    for via in (traced, everything, closure):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), run(via, W, X), expected)
    for name, body in BODIES.items():
        # The same captured values inside and outside, and all of them hoisted.
        _, hoisted = fv.closure_convert(body(W), X, hoist="all")
        counts = []
        jax.jit(lambda w: counts.append(len(fv.closure_convert(body(w), X, hoist="all")[1])) or w)(W)
        assert counts[0] == len(hoisted) >= 1, name
        for w in (W, W + 1):  # a concrete capture, through a solver compiled once
            np.testing.assert_allclose(closure(body(w), X), body(w)(X), rtol=1e-6)
        # Other values may pass, in the rule too.
        if name not in ("vjp", "jvp", "both"):
            continue
        f = fv.Closure(body(W), X)
        moved = jax.tree.map(lambda v: v + 1 if v is W else v, f)
        of_x = [jax.jit(jax.grad(lambda x: jnp.sum(g(x) ** 2)))(X) for g in (moved, body(W + 1))]
        np.testing.assert_allclose(*of_x, rtol=1e-5, err_msg=name)
    print("right")
"""

# Each away from its default; the default is what all other tests run under.
FLAGS = [
    "jax_use_simplified_jaxpr_constants",
    "jax_custom_vjp3",
    "jax_custom_jvp3",
    "jax_remat3",
    "jax_enable_x64",
]


@pytest.mark.slow
@pytest.mark.parametrize("flag", FLAGS)
def test_right_under_each_setting(flag) -> None:
    if not hasattr(jax.config, flag):
        pytest.skip("this release of JAX does not have it")
    if flag == "jax_use_simplified_jaxpr_constants" and jax.__version_info__ < (0, 10):
        pytest.skip("this release of JAX fails on the functions themselves")
    done = run(PROGRAM, flag, not getattr(jax.config, flag))
    assert done.stdout == "right\n", done.stderr[-3000:]


def test_scan3_is_refused() -> None:
    """JAX drops its loops as dead code: a wrong number, were it not refused."""
    if not hasattr(jax.config, "jax_scan3"):
        pytest.skip("this release of JAX does not have it")
    program = """
        import jax, jax.numpy as jnp, freevars.jax as fv
        fun = lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=3)[0]
        fv.Closure(fun, jnp.ones(3))
    """
    done = run(program, "jax_scan3", value=True)
    assert "NotImplementedError: jax_scan3 is on" in done.stderr


def run(program, flag, value):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            flag.upper(): str(int(value)),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
    )
