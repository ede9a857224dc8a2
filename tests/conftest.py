"""Compile for the sake of compiling: problems here are tiny, and each is run a few times."""

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
