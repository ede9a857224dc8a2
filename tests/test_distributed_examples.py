"""The jobs of several processes, as a user starts them; each compares itself with one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
JOBS = Path(__file__).parent.parent / "examples" / "distributed"


def run(*command: object) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def test_two_processes_with_four_devices_each_in_jax() -> None:
    pytest.importorskip("sklearn")
    assert "2 processes, 8 devices" in run(JOBS / "jax_job.py")


def test_two_processes_under_torchrun() -> None:
    pytest.importorskip("sklearn")
    torch = pytest.importorskip("torch")
    if not torch.distributed.is_gloo_available():
        pytest.skip("PyTorch without gloo")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert "2 processes: " in run(*launch, JOBS / "torch_job.py")
