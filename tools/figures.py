"""Bring the README's table of comparison up to date with ``docs/benchmarks.md``.

    python tools/figures.py            write it into the README, between its two marks
    python tools/figures.py --check    fail if it would change

The page is what ``make bench`` wrote last. Not here: measuring.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
MARKED = re.compile(r"(<!-- figures -->\n).*?(<!-- /figures -->)", re.DOTALL)
PEERS = {
    "jax.closure_convert": "`jax.closure_convert`",
    "equinox": "`equinox.filter_closure_convert`",
}
PEER = re.compile(rf"({'|'.join(map(re.escape, PEERS))}) ([\d.]+)")
# What the README says of a figure: (the table, the case), in the words of the benchmarks.
ROWS = {
    "conversion of 300 equations, over `jax.make_jaxpr` of the same function": (
        "convert",
        "Closure, 300 equations",
    ),
    "a converted call as it comes, 3 captured arrays, over a hand-jitted function": (
        "call",
        "Closure, 3 captured 8x8",
    ),
    "jitted gradient by captured values, 30 weights, over hand-threaded": (
        "gradient",
        "30 weights 64x64, batch 64",
    ),
    "50 fresh lambdas through one jitted solver, over hand-threaded": (
        "solver",
        "50 fresh lambdas",
    ),
    "the same with fresh partials of a jitted function": (
        "solver",
        "50 fresh partials of a jitted objective",
    ),
    "memory kept after 200 conversions over 4 MB arrays": ("memory", "Closure, converted"),
    "hypergradient through a solver, jitted, over a rule by hand": ("rules", "jitted"),
    "PyTorch: a transformer block, forward and backward, over explicit arguments": (
        "PyTorch",
        "transformer block, d = 512",
    ),
}


def cells(page: str) -> dict[tuple[str, str], list[str]]:
    """The cells of each row of the page, by (first word of the table's title, case)."""
    found = {}
    table = ""
    for line in page.splitlines():
        if line.startswith("## "):
            table = re.split(r"[:\s]", line[3:])[0]
        elif line.startswith("| "):
            row = [cell.strip() for cell in line.strip("|").split(" | ")]
            found.setdefault((table, row[0]), [cell.strip() for cell in row])
    return found


def comparison(page: str) -> str:
    """The README's table."""
    run = re.search(r"Written by `make bench`\. (.*)\.$", page, re.MULTILINE)
    if run is None:
        raise SystemExit(f"{PAGE} does not say when it was written")
    found = cells(page)
    lines = [
        f"From [the last `make bench`](docs/benchmarks.md), {run[1]}. The sides take turns in one",
        "run, and a figure is the median of their quotients; lower is better.",
        "",
        f"| | freevars | {' | '.join(PEERS.values())} |",
        f"|---|---|{'---|' * len(PEERS)}",
    ]
    for words, case in ROWS.items():
        if case not in found:
            raise SystemExit(f"{PAGE} has no figure for {case}")
        _, _, _, figure, _, _, others = found[case]
        peers = dict(PEER.findall(others))
        unit = " MB" if figure.endswith(" MB") else ""
        shown = [f"{peers[name]}{unit}" if name in peers else "" for name in PEERS]
        lines.append(f"| {words} | {figure} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if it would change")
    check = parser.parse_args().check
    readme = README.read_text()
    table = comparison(PAGE.read_text())
    updated = MARKED.sub(lambda marks: f"{marks[1]}{table}{marks[2]}", readme)
    if check and updated != readme:
        print("README.md: the figures are not those of docs/benchmarks.md: run tools/figures.py")
        return 1
    README.write_text(updated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
