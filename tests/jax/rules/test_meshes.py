"""An unknown on several devices: named axes, shards, explicit meshes (`mesh_problems.py`)."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freevars.jax as fv

CHECKS = ["shard_map", "shard_map, check_vma=False", "vmap", "pmap", "explicit", "passed on"]
CHECKS += ["a batch, explicit", "refused"]


@pytest.mark.slow  # a process of its own that compiles several programs
@pytest.mark.parametrize("check", CHECKS)
def test_unknowns_on_several_devices(check):
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    program = Path(__file__).with_name("mesh_problems.py")
    done = subprocess.run(
        [sys.executable, str(program), check], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"passed {check}, one of {', '.join(CHECKS)}\n"


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
