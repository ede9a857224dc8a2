"""Two processes on CPU: data-parallel and fully sharded modules, DTensors, collectives inside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.torch import distributed_worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch without gloo"),
]


def test_two_processes() -> None:
    worker = distributed_worker.__name__
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    shown = subprocess.run(
        [*command, "-m", worker],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr[-4000:]
    for check in distributed_worker.CHECKS:
        assert shown.stdout.count(f"passed {check.__name__}") == 2
