"""Hyperparameters tuned on data that no process has whole: two processes, four devices each (JAX).

    python examples/distributed/jax_job.py       starts both, on this machine's CPU
    make demo-distributed                        the same, and its twin in PyTorch

Each process holds half of the training data, spread over its devices. The program is that of one
device: the fit captures arrays that are sharded over all eight, and the compiler adds the sums.
Process 0 has all the data as well, and compares. On a cluster, start one process a machine with the
arguments ADDRESS COUNT INDEX.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

import freevars.jax as fv

STEPS, RATE, ROWS = 10, 50.0, 320


@fv.argmin
def newton(fun, w0):
    step = lambda _, w: w - jnp.linalg.solve(jax.hessian(fun)(w), jax.grad(fun)(w))
    return jax.lax.fori_loop(0, 12, step, w0)


def loss(w: Array, x: Array, y: Array) -> Array:
    return jnp.mean(jax.nn.softplus(-y * (x @ w)))


@jax.jit
def validation(log_ridge: Array, train: tuple[Array, Array], valid: tuple[Array, Array]) -> Array:
    objective = lambda w: loss(w, *train) + jnp.exp(log_ridge) @ w**2 / ROWS
    return loss(newton(objective, jnp.zeros(30)), *valid)


def tune(train: tuple[Array, Array], valid: tuple[Array, Array]) -> tuple[np.ndarray, list[float]]:
    log_ridge, losses = jnp.zeros(30), []
    step = jax.jit(jax.value_and_grad(validation))
    for _ in range(STEPS):
        value, slope = step(log_ridge, train, valid)
        log_ridge -= RATE * slope
        losses.append(float(value))
    return np.asarray(log_ridge), losses


def job(address: str, count: int, index: int) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(address, count, index)
    features, labels = load_breast_cancer(return_X_y=True)
    x, y = StandardScaler().fit_transform(features), 2.0 * labels - 1.0
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    mine = slice(index * ROWS // count, (index + 1) * ROWS // count)
    spread = lambda a: jax.make_array_from_process_local_data(rows, a[mine])
    found, losses = tune((spread(x[:ROWS]), spread(y[:ROWS])), (x[ROWS:], y[ROWS:]))
    if index == 0:
        alone, _ = tune((x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:]))
        error = np.max(np.abs(found - alone)) / np.max(np.abs(alone))
        print(
            f"{count} processes, {jax.device_count()} devices: {losses[0]:.4f} to {losses[-1]:.4f}"
        )
        print(f"against one process with all the data: relative difference {error:.1e}")
        if not (error < 1e-6 and losses[-1] < losses[0]):
            raise SystemExit("the hypergradients differ, or tuning did not help")


def start_both() -> int:
    """Two processes on this machine, with four devices each."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "localhost:12377", "2"]
    started = [subprocess.Popen([*command, str(i)], env=environment) for i in range(2)]  # noqa: S603 (itself)
    return max(abs(process.wait()) for process in started)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(start_both())
    job(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
