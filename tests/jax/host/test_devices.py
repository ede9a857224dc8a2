"""A host solver in programs over several devices and processes (`device_problems.py`)."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jax.processes import with_devices

PROGRAM = str(Path(__file__).with_name("device_problems.py"))


def _run(*args: str, devices: int) -> subprocess.Popen[str]:
    env = {**with_devices(devices), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, PROGRAM, *args]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def _end(process: subprocess.Popen[str]) -> str:
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.mark.slow  # a process of its own with several devices
def test_several_devices() -> None:
    assert _end(_run(devices=4)).count("passed") == 7


@pytest.mark.slow  # two processes that talk
def test_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    both = [_run(port, str(i), devices=2) for i in range(2)]
    first, second = map(_end, both)
    assert first.count("passed") == second.count("passed") == 3
    answers = [out.partition("answer ")[2].splitlines()[0] for out in (first, second)]
    assert answers[0] == answers[1]
