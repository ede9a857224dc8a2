"""What importing freevars adds to importing its host, as ``python -X importtime`` counts it.

Each sample is a process of its own, with the bytecode cached, that imports the host and then
freevars; the figure is the time spent in modules that the second import loads. The objects of the
host are looked through by the garbage collector before: when it is due next is chance.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks._table import Row, seconds

TITLE = "imports: what `import freevars.<host>` adds to the import of the host"
ADDED = 0.1  # seconds
SAMPLES = 7


def sample(host: str, cache: str) -> tuple[float, float]:
    """Seconds that the host takes to import, and seconds that freevars adds."""
    between = "gc.collect(); print('--', file=sys.stderr)"
    code = f"import gc, sys, {host}; {between}; import freevars.{host}"
    env = os.environ | {"PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-X", "importtime", "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    before, _, after = shown.stderr.partition("--\n")
    return _spent(before), _spent(after)


def _spent(lines: str) -> float:
    own = [line.split(":")[1].split("|")[0] for line in lines.splitlines() if "us]" not in line]
    return sum(map(int, own)) * 1e-6


def rows() -> Iterator[Row]:
    for host in ("jax", "torch"):
        with tempfile.TemporaryDirectory() as cache:
            samples = [sample(host, cache) for _ in range(SAMPLES + 1)][1:]
        base, added = (statistics.median(side) for side in zip(*samples, strict=True))
        yield Row(
            case=f"import freevars.{host}, beyond import {host}",
            baseline=seconds(base),
            ours=seconds(added),
            figure=added,
            target=ADDED,
            unit=" s",
        )
