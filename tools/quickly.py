"""Run Python with JAX compiling in the quick way, for what runs once.

    python tools/quickly.py ARGUMENTS OF PYTHON

For the gate and the tests: what they find does not depend on it, and programs that take most of
their time to compile take half of it.
"""

import os
import re
import sys
from importlib import metadata

# An option that a release of XLA does not know ends the process, so only where they were tried.
_TRIED = ((0, 9), (0, 10))
_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def settings() -> dict[str, str]:
    """Environment variables for the JAX that is installed beside this Python; what is set stays."""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    try:
        jaxlib = tuple(map(int, re.findall(r"\d+", metadata.version("jaxlib"))[:2]))
    except metadata.PackageNotFoundError:
        jaxlib = ()
    if jaxlib in _TRIED:
        quick["XLA_FLAGS"] = _FLAGS
    return {name: os.environ.get(name, value) for name, value in quick.items()}


if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], os.environ | settings())  # noqa: S606
