"""Compile for the sake of compiling: problems here are tiny, and each is run a few times."""

import gc
import os
import re
from importlib import metadata

# An option that a release of XLA does not know ends the process, so only where they were tried.
_TRIED = ((0, 9), (0, 10))
_QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def _jaxlib() -> tuple[int, ...]:
    try:
        return tuple(map(int, re.findall(r"\d+", metadata.version("jaxlib"))[:2]))
    except metadata.PackageNotFoundError:
        return ()


if _jaxlib() in _TRIED:
    os.environ.setdefault("XLA_FLAGS", _QUICK)

# Traces and graphs are millions of objects that live long. To look through them so often as Python
# does took a tenth of the time.
gc.set_threshold(100_000, 50, 100)
