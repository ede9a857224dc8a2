"""A benchmark's rows, each with the figure that it has to reach, printed as a Markdown table.

Not here: measuring.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HEADER = ("case", "baseline", "freevars", "figure", "target", "met", "peers, same figure")


@dataclass(frozen=True)
class Row:
    """One figure: ``figure`` must not exceed ``target``; the other cells are text to go with it."""

    case: str
    figure: float
    target: float
    baseline: str = ""
    ours: str = ""
    peers: tuple[tuple[str, float], ...] = ()
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.figure <= self.target

    def cells(self) -> tuple[str, ...]:
        return (
            self.case,
            self.baseline,
            self.ours,
            f"{self.figure:.2f}{self.unit}",
            f"<= {self.target:g}{self.unit}",
            "yes" if self.met else "MISSED",
            ", ".join(f"{name} {figure:.2f}{self.unit}" for name, figure in self.peers),
        )


def seconds(value: float) -> str:
    """``value`` seconds for a reader: 12.3 us, 4.56 ms, 7.89 s."""
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        if value < 1000 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} s"


def lines(rows: Sequence[Row]) -> list[str]:
    """The table in Markdown, its columns aligned."""
    table: list[Sequence[str]] = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADER))]
    table.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in table
    ]


def show(title: str, rows: Iterable[Row]) -> list[Row]:
    """Prints the table, and returns its rows for the summary."""
    rows = list(rows)
    print(f"\n{title}\n")
    print("\n".join(lines(rows)), flush=True)
    return rows
