"""``python -m benchmarks``: every table. ``python -m benchmarks convert``: just that one.

``--quick`` looks at the main figures, in two minutes; ``--write FILE`` makes a page of the run.
"""

import argparse
import datetime as dt
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks import (
    _table,
    _timing,
    call,
    captures,
    convert,
    gradient,
    host,
    imports,
    integrals,
    memory,
    rules,
    scale,
    solver,
    torch_convert,
    torch_qps,
    torch_rules,
)

TABLES = {
    "convert": convert,
    "call": call,
    "captures": captures,
    "gradient": gradient,
    "solver": solver,
    "rules": rules,
    "scale": scale,
    "host": host,
    "integrals": integrals,
    "memory": memory,
    "torch_convert": torch_convert,
    "torch_rules": torch_rules,
    "torch_qps": torch_qps,
    "imports": imports,
}
QUICK = ["convert", "call", "gradient", "solver", "torch_convert"]
PAGE = """# Benchmarks

Written by `make bench`. {setting}

Each figure compares freevars with a baseline: code written by hand, or the host alone. Unless a
unit says otherwise it is a ratio of times, and lower is better. The sides take turns in one run,
and a figure is the median over the turns of the quotient within one turn. A figure above its target
is marked; peers show the same figure for other libraries and, where a target is missed, for what
has to be done in any case. Other work on the machine (a load above the number of cores) makes
figures larger and less certain.
"""


def setting() -> str:
    """When and where a run takes place, and how busy the machine was in its last minutes."""
    found = [f"{platform.system()}, {platform.machine()}"]
    found.append(f"{os.cpu_count()} cores under a load of {os.getloadavg()[2]:.1f}")
    found.append(f"Python {platform.python_version()}")
    for name in ("jax", "torch", "equinox", "jaxopt", "optimistix", "scipy"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    today = dt.datetime.now(tz=dt.UTC).date()
    return f"{today.isoformat()}: {', '.join(found)}."


def summary(tables: dict[str, list[_table.Row]]) -> str:
    rows = [row for table in tables.values() for row in table]
    return f"{len(rows)} figures, {sum(not row.met for row in rows)} of them missed their target."


def page(tables: dict[str, list[_table.Row]]) -> str:
    """A page of the site for a run."""
    lines = [PAGE.format(setting=setting()), summary(tables)]
    for name, rows in tables.items():
        lines += ["", f"## {TABLES[name].TITLE}", "", *_table.lines(rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--quick", action="store_true", help="the main figures, roughly")
    parser.add_argument("--write", type=Path, metavar="FILE", help="make a page of it")
    options = parser.parse_args()
    chosen = options.tables or (QUICK if options.quick else list(TABLES))
    if unknown := set(chosen) - set(TABLES):
        parser.error(
            f"no such table: {', '.join(sorted(unknown))}; choose from {', '.join(TABLES)}"
        )
    if options.quick:
        _timing.hurry()

    print(setting())
    tables = {name: _table.show(TABLES[name].TITLE, TABLES[name].rows()) for name in chosen}
    print(f"\n{summary(tables)}")
    if options.write:
        options.write.write_text(page(tables))


if __name__ == "__main__":
    main()
