"""Print the requirement that installs the oldest supported release: ``oldest.py jax`` prints, say,
``jax==0.9``.

The bound is stated once, in the extra of that name in pyproject.toml; the gate tests against it.
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def main() -> None:
    (name,) = sys.argv[1:]
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    (requirement,) = extras[name]
    bound = re.fullmatch(rf"{name}\s*>=\s*([\d.]+)(,.*)?", requirement)
    if bound is None:
        message = f"{PROJECT}: expected {name}>=VERSION in the {name} extra, got {requirement!r}"
        raise SystemExit(message)
    print(f"{name}=={bound[1]}")


if __name__ == "__main__":
    main()
