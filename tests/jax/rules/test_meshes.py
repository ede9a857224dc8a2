"""An unknown on several devices: named axes, shards, explicit meshes (`mesh_problems.py`)."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freevars.jax as fv
from tests.jax.processes import with_devices

CHECKS = ["shard_map", "shard_map, check_vma=False", "vmap", "pmap", "explicit", "passed on"]
CHECKS += ["a batch, explicit", "spread and whole", "trajectories", "refused"]


@pytest.mark.slow  # a process of its own that compiles several programs
@pytest.mark.parametrize("check", CHECKS)
def test_unknowns_on_several_devices(check):
    program = Path(__file__).with_name("mesh_problems.py")
    done = subprocess.run(
        [sys.executable, str(program), check],
        capture_output=True,
        text=True,
        check=False,
        env=with_devices(4),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"passed {check}, one of {', '.join(CHECKS)}\n"


@pytest.mark.slow
@pytest.mark.parametrize("send", ["psum", "ppermute"])
def test_members_of_a_batch_that_send_to_each_other_are_one_unknown(send):
    """x_i + 0.3 x_(i - 1), or of the sum of all, = a_i."""
    n = 3
    ring = [(i, (i + 1) % n) for i in range(n)]
    sent = {
        "psum": (lambda x: jax.lax.psum(x, "b"), np.ones((n, n))),
        "ppermute": (lambda x: jax.lax.ppermute(x, "b", ring), np.roll(np.eye(n), 1, axis=0)),
    }
    to_others, matrix = sent[send]

    @fv.root
    def solver(fun, x0):
        return jax.lax.fori_loop(0, 100, lambda _, x: x - 0.5 * fun(x), x0)

    def one(a):
        return solver(lambda x: x + 0.3 * to_others(x) - a, 0.0 * a)

    got = jax.jacrev(jax.vmap(one, axis_name="b"))(jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(got, np.linalg.inv(np.eye(n) + 0.3 * matrix), atol=1e-5)


@pytest.mark.slow
def test_coupled_members_have_second_derivatives():
    """x_i = (a_i x_i + mean of x^2 + a_i) / 4: of the fixed point against that of a loop."""
    a = jnp.array([0.5, -0.3, 0.2])
    find = fv.fixed_point(lambda fun, x: jax.lax.fori_loop(0, 60, lambda _, x: fun(x), x))

    def one(a):
        f = lambda x: (a * x + jnp.mean(jax.lax.pmean(x**2, "b")) + a) / 4
        return find(f, jnp.zeros(2) * a)

    def by_steps(a):
        step = lambda _, x: (a * x + jnp.mean(x**2) + a) / 4
        return jax.lax.fori_loop(0, 60, step, jnp.zeros(3))

    with jax.enable_x64(True):
        coupled = lambda a: jnp.sum(jax.vmap(one, axis_name="b")(a)[:, 0] ** 2)
        alone = lambda a: jnp.sum(by_steps(a) ** 2)
        np.testing.assert_allclose(coupled(a), alone(a), rtol=1e-6)
        right = jax.hessian(alone)(a)
        for second in (jax.hessian(coupled), jax.jacrev(jax.grad(coupled))):
            np.testing.assert_allclose(second(a), right, rtol=1e-5, atol=1e-7)
