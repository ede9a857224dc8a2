"""The reads of a captured value: how many operations, and on which lines.

Not here: finding them (a host does).
"""

from dataclasses import dataclass, field

from freevars.report._source import ReadSite, read_site

__all__ = ["Line", "Reads"]

Line = tuple[str, int]  # file and number


@dataclass
class Reads:
    """How many operations read one value, and the lines that do, each once, in order."""

    count: int = 0
    sites: dict[Line, None] = field(default_factory=dict)

    def add(self, line: Line | None) -> None:
        """One more operation, of this line if that is known."""
        self.count += 1
        if line is not None:
            self.sites[line] = None

    def lines(self) -> tuple[ReadSite, ...]:
        """The lines, with their text."""
        return tuple(read_site(*line) for line in self.sites)
