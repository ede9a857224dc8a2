"""Print the path of the newest CPython on this machine, 3.12 or newer: the gate tests on it too.

    python tools/newest_python.py [MINIMUM]

Candidates are the ``python3.N`` on PATH and in pyenv's versions. Each is run before it is believed:
a shim may point nowhere, and a name may lie. Exit status 1, and nothing printed, if there is none.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Implementation, version and free-threading as the interpreter itself tells them. A pre-release is
# passed over, and so is a free-threaded build: packages ship no wheels for these.
PROBE = """
import sys, sysconfig
usable = (
    sys.implementation.name == "cpython"
    and sys.version_info.releaselevel == "final"
    and not sysconfig.get_config_var("Py_GIL_DISABLED")
)
print(*(sys.version_info[:3] if usable else (0, 0, 0)), sys.executable)
"""


def candidates() -> Iterator[Path]:
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    folders += Path.home().glob(".pyenv/versions/*/bin")
    for folder in folders:
        if folder.is_dir():
            yield from (p for p in folder.iterdir() if re.fullmatch(r"python3(\.\d+)?", p.name))


def version(python: Path) -> tuple[tuple[int, ...], str] | None:
    """((major, minor, micro), its own path), or None if it cannot be run."""
    try:
        printed = subprocess.run(
            [python, "-c", PROBE], capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    *numbers, path = printed.strip().split(maxsplit=3)
    return tuple(int(number) for number in numbers), path


def main() -> int:
    minimum = tuple(int(n) for n in (sys.argv[1] if sys.argv[1:] else "3.12").split("."))
    found = {version(python) for python in candidates()} - {None}
    fit = [one for one in found if one and one[0] >= minimum]
    if not fit:
        return 1
    print(max(fit)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
