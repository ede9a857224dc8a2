"""An unknown on several devices: named axes, shards, explicit meshes (`mesh_problems.py`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # a process of its own that compiles some thirty programs
def test_unknowns_on_several_devices():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    program = Path(__file__).with_name("mesh_problems.py")
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("passed") == 6
