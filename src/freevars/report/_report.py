"""The public capture report, which can be printed, shown in a notebook, saved and queried.

Not here: what it says (`_data`), and how it looks (`_text`, `_html`).
"""

from dataclasses import dataclass
from pathlib import Path

from freevars.report._data import ReportData
from freevars.report._html import fragment, page
from freevars.report._text import table

__all__ = ["CaptureReport"]


@dataclass(frozen=True, kw_only=True)
class CaptureReport(ReportData):
    """Every value that a function captures: print it, look at it in a notebook, save it, query it.

    ``fun`` is the function's name, ``where`` the place that defines it, ``source`` its text if
    there is any, ``values`` what it captures, in order of first use, ``bakes_in`` whether a program
    that the host compiles holds a copy of each constant. The report holds no array and no function.

    Example:
        >>> from freevars.report import CapturedValue
        >>> w = CapturedValue(names=("w",), paths=("f.__closure__['w']",), dtype="float32",
        ...                   shape=(3,), nbytes=12, traced_by=("grad",), differentiable=True,
        ...                   hoisted=True, policy="traced", reads=1)
        >>> print(CaptureReport(fun="f", values=(w,)))
        f captures 1 value, 12 B: 1 hoisted, 1 differentiable, 0 concrete
        <BLANKLINE>
        name  type        size  kind        grad  hoisted  reads
        w     float32[3]  12 B  leaf, grad  yes   traced       1
            path  f.__closure__['w']
    """

    def save(self, path: str | Path) -> None:
        """Write the report as one self-contained HTML file, without scripts."""
        Path(path).write_text(page(self), encoding="utf-8")

    def _repr_html_(self) -> str:
        return fragment(self)

    def __str__(self) -> str:
        """The report as a table of at most 100 columns."""
        return table(self)
