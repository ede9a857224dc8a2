"""The contents of a report: plain data about captured values, without any array or function.

Not here: how it looks (`_text`, `_html`), and how the values are found.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from freevars.report._source import ReadSite, Source
from freevars.report._strings import clean, size

__all__ = ["CapturedValue", "ReportData"]

LARGE = 1 << 20  # bytes of concrete captures from which a report warns


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


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What a report says, without how it looks; see `CaptureReport`."""

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

    def largest_first(self) -> Self:
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
