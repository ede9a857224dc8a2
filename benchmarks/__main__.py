"""``python -m benchmarks``: every table. ``python -m benchmarks convert``: just that one."""

import argparse
import os
import platform

import jax
import jaxlib

from benchmarks import (
    _table,
    call,
    captures,
    convert,
    gradient,
    host,
    imports,
    memory,
    rules,
    solver,
    torch_rules,
)

TABLES = {
    "convert": convert,
    "call": call,
    "captures": captures,
    "gradient": gradient,
    "solver": solver,
    "rules": rules,
    "host": host,
    "memory": memory,
    "imports": imports,
    "torch_rules": torch_rules,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}")
    chosen = parser.parse_args().tables or list(TABLES)
    if unknown := set(chosen) - set(TABLES):
        parser.error(
            f"no such table: {', '.join(sorted(unknown))}; choose from {', '.join(TABLES)}"
        )

    print(
        f"Python {platform.python_version()}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, "
        f"{jax.default_backend()}, {os.cpu_count()} cores"
    )
    rows = [row for name in chosen for row in _table.show(TABLES[name].TITLE, TABLES[name].rows())]
    missed = sum(not row.met for row in rows)
    print(f"\n{len(rows)} figures, {missed} of them missed their target.")


if __name__ == "__main__":
    main()
