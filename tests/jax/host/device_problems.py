"""Host solvers on several devices, run by `test_devices.py`: without arguments on the devices of
this process, with a port and a number as one of two processes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize as so
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import freevars.jax as fv

if len(sys.argv) > 1:
    PORT, NUMBER = sys.argv[1], int(sys.argv[2])
    jax.distributed.initialize(f"localhost:{PORT}", num_processes=2, process_id=NUMBER)
jax.config.update("jax_enable_x64", True)
N = jax.device_count()
MESH = jax.make_mesh((N,), ("b",), axis_types=(AxisType.Auto,))
RNG = np.random.default_rng(0)
X, T = RNG.normal(size=(4 * N, 3)), RNG.normal(size=4 * N)
CALLS = []


def _say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def _exact(lam):
    return np.linalg.solve(X.T @ X / len(T) + lam * np.eye(3), X.T @ T / len(T))


def _spread(a):
    return jax.make_array_from_callback(
        a.shape, NamedSharding(MESH, P("b")), lambda index: a[index]
    )


def _loss(w, x, t, lam):
    return jnp.mean((x @ w - t) ** 2) / 2 + lam * w @ w / 2


@fv.argmin
@fv.on_host
def minimize(fun, x0):
    """From a start that no two copies have in common, as long as it takes from there."""
    CALLS.append(1)
    start = x0 + np.random.default_rng().normal(size=x0.shape)
    options = {"gtol": 10.0 ** -np.random.default_rng().uniform(6, 10)}
    return so.minimize(fun.value_and_grad, start, jac=True, options=options).x


@fv.argmin
@fv.on_host
def fails(fun, x0):
    """On the first copy that comes, after some questions."""
    CALLS.append(1)
    fun.grad(x0)
    if len(CALLS) == 1:
        raise OverflowError("no more")
    return so.minimize(fun.value_and_grad, x0, jac=True).x


def _once(make):
    CALLS.clear()
    out = make()
    jax.block_until_ready(out)
    return out, len(CALLS)


def _check_spread_data():
    x, t = _spread(X), _spread(T)
    fit = jax.jit(lambda x, t, lam: minimize(lambda w: _loss(w, x, t, lam), jnp.zeros(3)))
    w, calls = _once(lambda: fit(x, t, 0.1))
    np.testing.assert_allclose(w, _exact(0.1), rtol=1e-4)
    slope = jax.jit(jax.jacrev(fit, 2))(x, t, 0.1)
    step = 1e-5
    np.testing.assert_allclose(
        slope, (_exact(0.1 + step) - _exact(0.1 - step)) / (2 * step), rtol=1e-3
    )
    return w, calls


def _check_a_failure():
    x, t = _spread(X), _spread(T)
    fit = jax.jit(lambda x, t: fails(lambda w: _loss(w, x, t, 0.1), jnp.zeros(3)))
    CALLS.clear()
    with pytest.raises(jax.errors.JaxRuntimeError, match="fails on the host raised OverflowError"):
        jax.block_until_ready(fit(x, t))


def copies_that_differ():
    w, calls = _check_spread_data()
    assert calls == 1
    shards = [np.asarray(s.data) for s in w.addressable_shards]
    assert all(np.array_equal(shards[0], s) for s in shards)


def a_copy_that_fails():
    _check_a_failure()
    assert len(CALLS) == 1


def _in_shard_map(solve, *, check, x0=None):
    start = jnp.zeros(3) if x0 is None else x0

    def fit(x, t, start):
        mean = lambda w: jax.lax.pmean(_loss(w, x, t, 0.1), "b")
        return solve(mean, start)

    specs = (P("b"), P("b"), P() if x0 is None else P("b"))
    run = jax.shard_map(fit, mesh=MESH, in_specs=specs, out_specs=specs[2], check_vma=check)
    return jax.jit(run)(_spread(X), _spread(T), start)


def data_that_a_psum_joins():
    for check in (True, False):
        w, calls = _once(lambda check=check: _in_shard_map(minimize, check=check))
        np.testing.assert_allclose(w, _exact(0.1), rtol=1e-4)
        assert calls == 1
        CALLS.clear()
        with pytest.raises(jax.errors.JaxRuntimeError, match="raised OverflowError: no more"):
            jax.block_until_ready(_in_shard_map(fails, check=check))


def a_problem_for_each_device():
    a = _spread(np.linspace(1.0, 2.0, 2 * N))
    for check in (True, False):
        own = lambda a: minimize(lambda x: jnp.sum((x - a) ** 2), jnp.zeros_like(a))
        run = jax.shard_map(own, mesh=MESH, in_specs=P("b"), out_specs=P("b"), check_vma=check)
        x, calls = _once(lambda run=run: jax.jit(run)(a))
        np.testing.assert_allclose(x, a, rtol=1e-4)
        assert calls == N
        slope = jax.jit(jax.grad(lambda a, run=run: jnp.sum(run(a) ** 2)))(a)
        np.testing.assert_allclose(slope, 2 * np.asarray(x), rtol=1e-4)


def a_start_that_varies_less_than_its_problem():
    a = _spread(np.linspace(1.0, 2.0, 2 * N))

    def own(a, cast):
        x0 = jnp.zeros(2)
        x0 = jax.lax.pcast(x0, ("b",), to="varying") if cast else x0
        return minimize(lambda x: jnp.sum((x - a) ** 2), x0)

    def run(*, cast, check):
        body = lambda a: own(a, cast)
        specs = {"in_specs": P("b"), "out_specs": P("b"), "check_vma": check}
        return jax.jit(jax.shard_map(body, mesh=MESH, **specs))(a)

    with pytest.raises(TypeError, match=r'jax.lax.pcast\(x0, \(\'b\',\), to="varying"\)'):
        run(cast=False, check=True)
    np.testing.assert_allclose(run(cast=True, check=True), a, rtol=1e-4)
    np.testing.assert_allclose(run(cast=False, check=False), a, rtol=1e-4)


def copies_of_one_problem():
    own = lambda a: minimize(lambda x: jnp.sum((x - a) ** 2), jnp.zeros_like(a))
    run = jax.jit(jax.shard_map(own, mesh=MESH, in_specs=P(), out_specs=P()))
    x, calls = _once(lambda: run(jnp.ones(2)))
    np.testing.assert_allclose(x, 1.0, rtol=1e-4)
    assert calls == 1


def an_unknown_in_parts_that_a_psum_joins():
    parts = _spread(np.zeros(3 * N))
    with pytest.raises(TypeError, match="its unknown lies in parts on the devices along the axis"):
        _in_shard_map(minimize, check=True, x0=parts)


def two_processes():
    w, calls = _check_spread_data()
    assert calls == (NUMBER == 0)
    _say("answer", np.asarray(w).tolist())
    _say("passed: one answer")
    _check_a_failure()
    assert len(CALLS) == (NUMBER == 0)
    _say("passed: one failure")
    x, t = _spread(X), _spread(T)
    solve = lambda: minimize(lambda w: _loss(w, x, t, 0.1), jnp.zeros(3))
    w, calls = _once(solve)  # called, and not compiled
    np.testing.assert_allclose(w, _exact(0.1), rtol=1e-4)
    assert calls == (NUMBER == 0)
    _say("passed: called by both")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        two_processes()
        sys.exit()
    for problem in (
        copies_that_differ,
        a_copy_that_fails,
        data_that_a_psum_joins,
        a_problem_for_each_device,
        a_start_that_varies_less_than_its_problem,
        copies_of_one_problem,
        an_unknown_in_parts_that_a_psum_joins,
    ):
        problem()
        _say("passed:", problem.__name__)
