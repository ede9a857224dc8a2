"""Captured values as text: one in a line, for an error message, and a report as a table.

Not here: what is said (`_data`).
"""

from collections.abc import Iterator

from freevars.report._data import CapturedValue, ReportData
from freevars.report._strings import clean, fit, size

__all__ = ["describe", "table"]

_WIDTH = 100  # columns of the table
_ROWS = 40  # values that it shows
_SITES = 3  # lines of source shown for one value


def describe(value: CapturedValue) -> str:
    """One captured value in one line, as every error message about one says it.

    Example:
        >>> from freevars.report import ReadSite
        >>> site = ReadSite("/home/me/model.py", 44, "y = x @ w")
        >>> w = CapturedValue(names=("w",), paths=("f.__closure__['w']",), dtype="float32",
        ...                   captured_by="f at model.py:41", sites=(site,))
        >>> describe(w)  # doctest: +NORMALIZE_WHITESPACE
        "w (float32[] at f.__closure__['w'], captured by f at model.py:41,
         first read at model.py:44: 'y = x @ w')"
    """
    facts = [value.type_text]
    if value.paths and value.paths[0] != value.name:
        facts[0] += f" at {clean(value.paths[0])}"
    if value.captured_by:
        facts.append(f"captured by {clean(value.captured_by)}")
    if value.sites:
        text = f": '{fit(value.sites[0].text, _WIDTH)}'" if value.sites[0].text else ""
        facts.append(f"first read at {clean(str(value.sites[0]))}{text}")
    return f"{clean(value.name)} ({', '.join(facts)})"


def table(report: ReportData) -> str:
    """The report as a table of at most 100 columns."""
    return "\n".join(_lines(report))


def _lines(report: ReportData) -> Iterator[str]:
    yield from _wrapped(report.summary)
    for warning in report.warnings:
        yield from _wrapped(f"warning: {warning}")
    if not report.values:
        return
    yield ""
    shown = report.values[:_ROWS]
    rows = [_HEADER, *map(_row, shown)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    gaps = 2 * (len(widths) - 1)
    widths[0] = min(widths[0], _WIDTH - gaps - sum(widths[1:]))
    yield _table_line(rows[0], widths)
    for value, row in zip(shown, rows[1:], strict=True):
        yield _table_line(row, widths)
        if len(clean(value.name)) > widths[0]:
            yield _detail("name", value.name)
        yield from _details(value, show_device=not report.device)
    if report.count > len(shown):
        rest = report.count - len(shown)
        yield f"… and {rest} more; see largest_first(), values, to_dict() or save()"


_HEADER = ("name", "type", "size", "kind", "grad", "hoisted", "reads")
_CAPS = (_WIDTH, 18, 10, 20, 4, 14, 6)  # the name takes what the others leave
_TO_THE_RIGHT = (2, 6)


def _row(value: CapturedValue) -> tuple[str, ...]:
    traced = " ".join(value.traced_by) or "concrete"
    cells = (
        value.name,
        value.type_text,
        size(value.nbytes),
        f"{value.kind}, {traced}",
        "yes" if value.differentiable else "no",
        (value.policy or "yes") if value.hoisted else "no",
        str(value.reads),
    )
    return tuple(
        fit(cell, cap, keep_end=i == 0)
        for i, (cell, cap) in enumerate(zip(cells, _CAPS, strict=True))
    )


def _table_line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = []
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        text = fit(cell, width, keep_end=i == 0)
        space = " " * (width - len(text))
        cells.append(space + text if i in _TO_THE_RIGHT else text + space)
    return "  ".join(cells).rstrip()


def _details(value: CapturedValue, *, show_device: bool) -> Iterator[str]:
    for path in value.paths[:1]:
        yield _detail("path", path)
    for name in value.names[1:]:
        yield _detail("also", name)
    if show_device and value.device:
        yield _detail("on", value.device)
    if not value.hoisted and " " in value.policy:  # a reason in words
        yield _detail("kept", value.policy)
    for site in value.sites[:_SITES]:
        yield _detail("read", f"{site}  {site.text}")
    if len(value.sites) > _SITES:
        yield _detail("read", f"on {len(value.sites) - _SITES} more lines")


def _detail(label: str, text: str) -> str:
    return fit(f"    {label:<4}  {text}", _WIDTH, keep_end=label in ("name", "path", "also"))


def _wrapped(text: str) -> Iterator[str]:
    line = ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > _WIDTH:
            yield fit(line, _WIDTH)
            line = "  " + word
        else:
            line = f"{line} {word}" if line else word
    yield fit(line, _WIDTH)
