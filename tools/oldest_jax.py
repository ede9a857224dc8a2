"""Print the requirement that installs the oldest supported JAX, such as ``jax==0.9``.

The bound is stated once, in the ``jax`` extra of pyproject.toml; the gate tests against it.
"""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def main() -> None:
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    (requirement,) = extras["jax"]
    bound = re.fullmatch(r"jax\s*>=\s*([\d.]+)(,.*)?", requirement)
    if bound is None:
        raise SystemExit(f"{PROJECT}: expected jax>=VERSION in the jax extra, got {requirement!r}")
    print(f"jax=={bound[1]}")


if __name__ == "__main__":
    main()
