"""What a function captures, as a value that people read: text, HTML, plain data, error messages.

A host fills in ``CapturedValue`` and ``CaptureReport``; neither holds an array or a function, so a
report keeps nothing alive. Not here: finding the values, naming them (``_names.search``), reading
sources (``_source``), and the HTML itself (``_html``).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from freevars.report._columns import clean, columns, fit, size
from freevars.report._source import Read, ReadSite, Source, captured_by, read_site, source_of

__all__ = [
    "CaptureReport",
    "CapturedValue",
    "Read",
    "ReadSite",
    "Source",
    "captured_by",
    "describe",
    "read_site",
    "source_of",
]

LARGE = 1 << 20  # bytes of concrete captures from which a report warns

_WIDTH = 100  # columns of the text report
_ROWS = 40  # values that the text report shows
_SITES = 3  # lines of source shown for one value


@dataclass(frozen=True, kw_only=True)
class CapturedValue:
    """One value that a function reads from outside its arguments.

    Attributes:
        names: the ways a person would write it, shortest first; empty when it is not reachable.
        paths: the full capture path of each name.
        made_at: for a value that is not reachable, the line that made it or read it first.
        shape, dtype, nbytes: of the array; the size in bytes.
        device: device or sharding, as text; empty when it has none yet, as under a trace.
        kind: ``"leaf"``, or ``"derived"`` for one computed from others on the way.
        traced_by: the transformations that trace it, outermost first; empty for a concrete array.
        differentiable: whether a derivative can flow to it.
        hoisted: whether the conversion makes it an explicit argument.
        policy: the rule that decided so, such as ``"traced"``, ``"differentiable"`` or ``"all"``,
            or a reason in words.
        reads: how many operations read it.
        sites: the lines that do, each once, in order of first use.
        captured_by: the capturing function and where it is written, ``objective at model.py:41``.
    """

    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    made_at: ReadSite | None = None
    shape: tuple[int, ...] = ()
    dtype: str = ""
    nbytes: int = 0
    device: str = ""
    kind: Literal["leaf", "derived"] = "leaf"
    traced_by: tuple[str, ...] = ()
    differentiable: bool = False
    hoisted: bool = False
    policy: str = ""
    reads: int = 0
    sites: tuple[ReadSite, ...] = ()
    captured_by: str = ""

    @property
    def name(self) -> str:
        """The name that a person would use, or ``value made at model.py:41``."""
        if self.names:
            return self.names[0]
        if self.made_at is not None:
            return f"value made at {self.made_at}"
        return f"value read at {self.sites[0]}" if self.sites else "value of unknown origin"

    @property
    def type_text(self) -> str:
        """Element type and shape, ``float32[3,4]``."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def concrete(self) -> bool:
        """Whether no transformation traces it, so that compiling the function would bake it in."""
        return not self.traced_by


def describe(value: CapturedValue) -> str:
    """One captured value in one line, as every error message about one says it.

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


@dataclass(frozen=True, kw_only=True)
class CaptureReport:
    """Every value that a function captures: print it, look at it in a notebook, save it, query it.

    ``fun`` is the function's name, ``where`` the place that defines it, ``source`` its text if
    there is any, ``values`` what it captures, in order of first use, ``bakes_in`` whether a program
    that the host compiles holds a copy of each constant. The report holds no array and no function.

    >>> w = CapturedValue(names=("w",), paths=("f.__closure__['w']",), dtype="float32", shape=(3,),
    ...                   nbytes=12, traced_by=("grad",), differentiable=True, hoisted=True,
    ...                   policy="traced", reads=1)
    >>> print(CaptureReport(fun="f", values=(w,)))
    f captures 1 value, 12 B: 1 hoisted, 1 differentiable, 0 concrete
    <BLANKLINE>
    name  type        size  kind        grad  hoisted  reads
    w     float32[3]  12 B  leaf, grad  yes   traced       1
        path  f.__closure__['w']
    """

    fun: str
    where: ReadSite | None = None
    source: Source | None = None
    values: tuple[CapturedValue, ...] = ()
    bakes_in: bool = True

    @property
    def count(self) -> int:
        """How many values the function captures."""
        return len(self.values)

    @property
    def nbytes(self) -> int:
        """The bytes of all captured values together."""
        return sum(value.nbytes for value in self.values)

    def largest_first(self) -> "CaptureReport":
        """The same report with the largest values first."""
        ordered = sorted(self.values, key=lambda value: value.nbytes, reverse=True)
        return replace(self, values=tuple(ordered))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What deserves attention: concrete captures that stay constants and are large."""
        constants = [value for value in self.values if value.concrete and not value.hoisted]
        total = sum(value.nbytes for value in constants)
        if total < LARGE or not self.bakes_in:
            return ()
        largest = max(constants, key=lambda value: value.nbytes)
        hold = "1 concrete capture holds"
        if len(constants) > 1:
            hold = f"{len(constants)} concrete captures hold"
        warning = (
            f"{hold} {size(total)} and would be baked into a compiled program; the largest is "
            f"{clean(largest.name)} ({size(largest.nbytes)}). Make a Closure, which takes them as "
            'arguments, or convert with hoist="all".'
        )
        return (warning,)

    @property
    def device(self) -> str:
        """The device that all captured values are on, or an empty string where they differ."""
        devices = {value.device for value in self.values}
        return devices.pop() if len(devices) == 1 else ""

    @property
    def summary(self) -> str:
        """The totals in one line."""
        place = f" ({clean(str(self.where))})" if self.where else ""
        values = "1 value" if self.count == 1 else f"{self.count} values"
        if not self.values:
            return f"{clean(self.fun)}{place} captures nothing"
        hoisted, flows, concrete = (
            sum(getattr(value, fact) for value in self.values)
            for fact in ("hoisted", "differentiable", "concrete")
        )
        on = f", on {clean(self.device)}" if self.device else ""
        return (
            f"{clean(self.fun)}{place} captures {values}, {size(self.nbytes)}: {hoisted} hoisted, "
            f"{flows} differentiable, {concrete} concrete{on}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data that ``json.dumps`` takes."""
        values = [
            asdict(value) | {"name": value.name, "concrete": value.concrete}
            for value in self.values
        ]
        return {
            "fun": self.fun,
            "where": asdict(self.where) if self.where else None,
            "source": asdict(self.source) if self.source else None,
            "count": self.count,
            "nbytes": self.nbytes,
            "warnings": self.warnings,
            "values": values,
        }

    def save(self, path: str | Path) -> None:
        """Write the report as one self-contained HTML file, without scripts."""
        from freevars.report._html import page  # noqa: PLC0415 (used by few)

        Path(path).write_text(page(self), encoding="utf-8")

    def _repr_html_(self) -> str:
        from freevars.report._html import fragment  # noqa: PLC0415

        return fragment(self)

    def __str__(self) -> str:
        """The report as a table of at most 100 columns."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from _wrapped(self.summary)
        for warning in self.warnings:
            yield from _wrapped(f"warning: {warning}")
        if not self.values:
            return
        yield ""
        shown = self.values[:_ROWS]
        rows = [_HEADER, *map(_row, shown)]
        widths = [max(columns(row[i]) for row in rows) for i in range(len(_HEADER))]
        gaps = 2 * (len(widths) - 1)
        widths[0] = min(widths[0], _WIDTH - gaps - sum(widths[1:]))
        yield _table_line(rows[0], widths)
        for value, row in zip(shown, rows[1:], strict=True):
            yield _table_line(row, widths)
            if columns(clean(value.name)) > widths[0]:
                yield _detail("name", value.name)
            yield from _details(value, show_device=not self.device)
        if self.count > len(shown):
            rest = self.count - len(shown)
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
        space = " " * (width - columns(text))
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
        if line and columns(line) + 1 + columns(word) > _WIDTH:
            yield fit(line, _WIDTH)
            line = "  " + word
        else:
            line = f"{line} {word}" if line else word
    yield fit(line, _WIDTH)
