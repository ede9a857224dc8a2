"""Programs that people write: converted under grad, jit and vmap without a refusal, to the same
numbers, and equal in structure when made afresh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import ode

import freevars.jax as fv

X = jnp.array([0.5, -0.25, 2.0])
W = jnp.array([1.0, 2.0, -1.0])
A = jnp.arange(9.0).reshape(3, 3) + 4 * jnp.eye(3)
SPD = A @ A.T + jnp.eye(3)


def custom_root(w):
    def fun(x):
        def newton(f, guess):
            return lax.fori_loop(0, 8, lambda _, y: y - f(y) / jax.jvp(f, (y,), (1 + 0 * y,))[1], guess)

        linear = lambda g, y: y / jax.jvp(g, (y,), (jnp.ones_like(y),))[1]
        return lax.custom_root(lambda y: y**3 + y - jnp.exp(x * w), jnp.ones(3), newton, linear)

    return fun


def linear_solve(w):
    def fun(x):
        matvec = lambda v: SPD @ v + w**2 * v
        return lax.custom_linear_solve(matvec, x, lambda mv, b: jax.scipy.sparse.linalg.cg(mv, b)[0], symmetric=True)

    return fun


def minimise(w):
    return lambda x: jax.scipy.optimize.minimize(
        lambda y: jnp.sum((y - w) ** 2) + jnp.sum(y**2 * x**2), jnp.zeros(3), method="BFGS", options={"maxiter": 5}
    ).x


# fmt: off
PROGRAMS = {
    "odeint": lambda w: lambda x: ode.odeint(lambda y, t, w: -y * w * t, x, jnp.linspace(0.0, 1.0, 3), w),
    "odeint over a closure": lambda w: lambda x: ode.odeint(lambda y, t: -y * w * t, x, jnp.linspace(0.0, 1.0, 3)),
    "custom_root": custom_root,
    "custom_linear_solve": linear_solve,
    "cg": lambda w: lambda x: jax.scipy.sparse.linalg.cg(lambda v: SPD @ v + w**2 * v, x)[0],
    "gmres": lambda w: lambda x: jax.scipy.sparse.linalg.gmres(lambda v: SPD @ v + w * v, x, maxiter=3)[0],
    "solve": lambda w: lambda x: jnp.linalg.solve(SPD * w, x),
    "eigh": lambda w: lambda x: jnp.linalg.eigh(SPD + jnp.diag(w * x))[0],
    "svd": lambda w: lambda x: jnp.linalg.svd(SPD + jnp.diag(w * x))[1],
    "qr": lambda w: lambda x: jnp.linalg.qr(SPD + jnp.diag(w * x))[1],
    "cholesky": lambda w: lambda x: jnp.linalg.cholesky(SPD + jnp.diag(w**2)) @ x,
    "inv, pinv, det": lambda w: lambda x: jnp.linalg.inv(SPD * w) @ x + jnp.linalg.pinv(SPD) @ w * jnp.linalg.det(A * w),
    "lstsq": lambda w: lambda x: jnp.linalg.lstsq(A, x * w)[0],
    "norm": lambda w: lambda x: jnp.linalg.norm(x * w) * x,
    "expm": lambda w: lambda x: jax.scipy.linalg.expm(A * 0.01 * w) @ x,
    "relu": lambda w: lambda x: jax.nn.relu(x * w),
    "activations": lambda w: lambda x: sum(f(x * w) for f in (jax.nn.silu, jax.nn.gelu, jax.nn.elu, jax.nn.softplus, jax.nn.relu6, jax.nn.log_sigmoid, jax.nn.mish)),
    "softmax": lambda w: lambda x: jax.nn.log_softmax(x * w) + jax.nn.softmax(x) + jax.nn.standardize(x * w),
    "logsumexp": lambda w: lambda x: jax.nn.logsumexp(x * w) * x,
    "attention": lambda w: lambda x: jax.nn.dot_product_attention(*[(A * w * x).reshape(1, 3, 1, 3)] * 3),
    "resize": lambda w: lambda x: jax.image.resize(A * w * x, (5, 5), "bilinear"),
    "random": lambda w: lambda x: sum(f(jax.random.key(i), shape=(3,)) for i, f in enumerate((jax.random.normal, jax.random.uniform, jax.random.laplace, jax.random.cauchy))) * x * w,
    "gamma": lambda w: lambda x: jax.random.gamma(jax.random.key(0), 1 + (x * w) ** 2),
    "beta, dirichlet": lambda w: lambda x: jax.random.beta(jax.random.key(0), 1 + w**2, 1 + x**2) + jax.random.dirichlet(jax.random.key(1), 1 + x**2),
    "checkpoint policies": lambda w: lambda x: sum(jax.checkpoint(lambda x: jnp.sin(A @ (x * w)), policy=p)(x) for p in (None, jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.everything_saveable)),
    "named checkpoint": lambda w: lambda x: jax.checkpoint(lambda x: jnp.sin(jax.ad_checkpoint.checkpoint_name(x * w, "n")), policy=jax.checkpoint_policies.save_only_these_names("n"))(x),
    "special functions": lambda w: lambda x: jax.scipy.special.gammaln(1 + (x * w) ** 2) + jax.scipy.special.erf(x) + jax.scipy.special.i0(x * w) + jax.scipy.stats.norm.logcdf(x * w),
    "segment_sum": lambda w: lambda x: jax.ops.segment_sum(x * w, jnp.array([0, 0, 1]), 2),
    "interp, sort": lambda w: lambda x: jnp.interp(x, jnp.sort(w), jnp.cumsum(w)),
    "fft, conv": lambda w: lambda x: jnp.fft.irfft(jnp.fft.rfft(x * w), 3) + jnp.convolve(x, w, "same"),
    "associative_scan": lambda w: lambda x: lax.associative_scan(lambda a, b: a * b, x * w),
    "stop_gradient": lambda w: lambda x: lax.stop_gradient(x * w) * w,
    "fori_loop": lambda w: lambda x: lax.fori_loop(0, 3, lambda i, c: jnp.sin(c * w) + i, x),
}
# fmt: on
NO_VMAP = {"gamma"}  # JAX draws other numbers for a batch


@pytest.mark.parametrize("name", PROGRAMS)
def test_jax_programs(name) -> None:
    check(PROGRAMS[name])


def test_minimize() -> None:
    f = fv.Closure(minimise(W), X)
    np.testing.assert_allclose(f(X), minimise(W)(X), rtol=1e-5)
    assert jax.tree.structure(f) == jax.tree.structure(fv.Closure(minimise(W + 1), X))


def check(make, rtol=2e-4):
    """Values and derivatives by what is captured, each conversion inside the transformation."""

    def total(via, w, x):
        fun = make(w)
        result = fun(x) if via is None else via(fun, x)
        return sum(jnp.sum(r**2) for r in jax.tree.leaves(result))

    def convert(fun, x):
        f, hoisted = fv.closure_convert(fun, x)
        return f(x, *hoisted)

    def close(a, b):
        scale = 1e-5 * max(1.0, float(jnp.max(jnp.abs(b))))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=scale)

    expected = jax.jit(jax.value_and_grad(total, argnums=(1, 2)), static_argnums=0)(None, W, X)
    for via in (convert, lambda fun, x: fv.Closure(fun, x)(x)):
        gradient = jax.value_and_grad(lambda w, x: total(via, w, x), argnums=(0, 1))
        jax.tree.map(close, jax.jit(gradient)(W, X), expected)
        batch = jax.jit(jax.vmap(gradient))(jnp.stack([W, W]), jnp.stack([X, X]))
        jax.tree.map(close, jax.tree.map(lambda b: b[1], batch), expected)
    close(total(lambda fun, x: fv.Closure(fun, x)(x), W, X), expected[0])
    structures = [jax.tree.structure(fv.Closure(make(w), X)) for w in (W, W + 1)]
    assert structures[0] == structures[1]


def test_equinox_programs() -> None:
    eqx = pytest.importorskip("equinox")
    mlp = eqx.nn.MLP(3, 3, 4, 2, key=jax.random.key(0))
    check(lambda w: lambda x: mlp(x * w))
    check(lambda w: lambda x: eqx.filter_jit(lambda x: mlp(x) * w)(x))
    check(lambda w: lambda x: eqx.internal.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(s[1] * w)), (0, x), kind="checkpointed", max_steps=4)[1])


def test_lineax_programs() -> None:
    lx = pytest.importorskip("lineax")
    check(lambda w: lambda x: lx.linear_solve(lx.MatrixLinearOperator(SPD + jnp.diag(w**2)), x).value)
    struct = jax.ShapeDtypeStruct((3,), jnp.float32)
    tags = lx.positive_semidefinite_tag
    check(
        lambda w: lambda x: lx.linear_solve(
            lx.FunctionLinearOperator(lambda v: SPD @ v + w**2 * v, struct, tags), x, lx.CG(1e-6, 1e-6)
        ).value
    )


def test_optimistix_programs() -> None:
    optx = pytest.importorskip("optimistix")
    newton = optx.Newton(rtol=1e-6, atol=1e-6)
    check(lambda w: lambda x: optx.root_find(lambda y, _: y**3 + y - jnp.exp(x * w), newton, jnp.ones(3)).value)
    bfgs = optx.BFGS(rtol=1e-5, atol=1e-5)
    check(
        lambda w: lambda x: optx.minimise(
            lambda y, args: jnp.sum((y - args) ** 2 + y**4), bfgs, jnp.zeros(3), args=x * w
        ).value,
        rtol=1e-2,
    )
