"""Resident memory after 200 conversions of closures over 4 MB arrays, each side in a fresh process.

``python -m benchmarks.memory SIDE`` prints the growth of one side in MB.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import freevars.jax as fv
from benchmarks._peers import CONVERTERS
from benchmarks._table import Row

TITLE = "memory: growth of resident memory over 200 conversions of closures over 4 MB arrays"
TARGET = 20.0  # MB
CONVERSIONS = 200
WARM_UP = 10

Convert = Callable[..., Any]


def convert_only(convert: Convert, fun: Callable[[Array], Array], x: Array) -> None:
    convert(fun, x)


def and_call(convert: Convert, fun: Callable[[Array], Array], x: Array) -> None:
    made = convert(fun, x)
    if isinstance(made, tuple):
        converted, hoisted = made
        converted(x, *hoisted).block_until_ready()
    else:
        made(x).block_until_ready()


OURS: dict[str, Convert] = {
    "closure_convert": fv.closure_convert,
    'closure_convert(hoist="all")': partial(fv.closure_convert, hoist="all"),
    "Closure": fv.Closure,
}
USES = {"converted": convert_only, "converted and called": and_call}


def resident() -> float:
    """The resident memory of this process in MB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth(name: str, use: str) -> float:
    convert = (OURS | CONVERTERS)[name]
    x = jnp.float32(1.0)

    def once(k: int) -> None:
        array = jnp.full(1_000_000, float(k))  # 4 MB
        USES[use](convert, lambda x: jnp.sum(jnp.sin(array) * x), x)

    for k in range(WARM_UP):
        once(k)
    gc.collect()
    before = resident()
    for k in range(CONVERSIONS):
        once(WARM_UP + k)
    gc.collect()
    return resident() - before


def in_fresh_process(name: str, use: str) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", name, use]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(printed.stdout)


def rows() -> Iterator[Row]:
    for use in USES:
        peers = tuple((name, in_fresh_process(name, use)) for name in CONVERTERS)
        for name in OURS:
            yield Row(
                case=f"{name}, {use}",
                figure=in_fresh_process(name, use),
                target=TARGET,
                peers=peers,
                unit=" MB",
            )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(growth(*sys.argv[1:]))
