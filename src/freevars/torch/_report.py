"""The report of what a function captures: run it once under a capture mode, like a conversion, then
describe.

A report has no side effects: it holds no tensor and leaves no mode behind. A read that a conversion
would refuse, because it bypasses PyTorch's Python API, is listed with the reason; what would change
a captured tensor raises, as in a conversion. Not here: finding the tensors (`discovery.py`), naming
them (`_describe.py`), and how a report looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from freevars._contract import Hoist, policy_name
from freevars._names.search import function_name
from freevars.errors import CaptureError
from freevars.report import CapturedValue, CaptureReport
from freevars.report._reads import Line, Reads
from freevars.report._source import read_site, source_of
from freevars.torch import _compat
from freevars.torch._convert.convert import (
    Converted,
    Rng,
    differentiable,
    discover,
    policy_of,
    prepare,
)
from freevars.torch._convert.discovery import DiscoveryMode
from freevars.torch._convert.places import Search
from freevars.torch._describe import captured_value, line_of_caller, names_of
from freevars.torch._modes import resolve

__all__ = ["report_of_converted", "report_of_function"]


@_compat.uncompiled
def report_of_function(
    fun: Callable[..., Any], example: tuple[Any, ...], hoist: Hoist, rng: Rng
) -> CaptureReport:
    """What `fun` captures on the example; `hoist` is the conversion that the report tells about."""
    return _report(fun, _run(fun, example, hoist, rng), resolve)


def report_of_converted(
    converted: Converted[..., Any], values: Sequence[Tensor] | None = None
) -> CaptureReport:
    """What a converted function captured; `values` are those that replace the captured ones now, if
    any."""
    fun, captured = converted.__wrapped__, converted.captured
    rule = "parameters"  # of `Closure.from_module`
    again: list[_Found] = []
    if converted.origin is not None:
        example, hoist, rng = converted.origin
        rule = policy_name(hoist)
        again = _run_again(fun, example, hoist, rng)
    known = {id(f.tensor): f.reads for f in again}
    found = [
        _Found(t, known.get(id(t), _first_read(line)), hoisted=True, policy=rule)
        for t, line in zip(captured, converted.first_reads, strict=True)
    ]
    constants = [f for f in again if not f.hoisted]
    if values is None:
        return _report(fun, [*found, *constants], lambda t: t)
    given = {id(t): value for t, value in zip(captured, values, strict=True)}
    return _report(fun, [*found, *constants], lambda t: given.get(id(t), t))


def _first_read(line: Line | None) -> Reads:
    """All that a conversion notes."""
    return Reads() if line is None else Reads(1, {line: None})


@_compat.uncompiled
def _run_again(
    fun: Callable[..., Any], example: tuple[Any, ...], hoist: Hoist, rng: Rng
) -> list[_Found]:
    """What a closure's function reads, with every line. By now it may read other tensors (a rebound
    name), fail, or belong to a transform that has ended: then only what the conversion recorded is
    used."""
    try:
        return _run(fun, example, hoist, rng)
    except Exception:  # noqa: BLE001 (a user's function may raise anything)
        return []


def _report(
    fun: Callable[..., Any], found: Sequence[_Found], given: Callable[[Tensor], Tensor]
) -> CaptureReport:
    """`given` gives the current value for a captured tensor; its name is that of the captured
    one."""
    values: list[CapturedValue] = []
    for f, names in zip(found, names_of(fun, [f.tensor for f in found]), strict=True):
        values.append(
            captured_value(
                fun,
                given(f.tensor),
                names,
                hoisted=f.hoisted,
                policy=f.policy,
                reads=f.reads.count,
                sites=f.reads.lines(),
            )
        )
    source = source_of(fun)
    return CaptureReport(
        fun=function_name(fun),
        where=None if source is None else read_site(source.file, source.line),
        source=source,
        values=tuple(values),
        bakes_in=False,
    )


@dataclass
class _Found:
    """One captured tensor, how often it was read, and what becomes of it."""

    tensor: Tensor
    reads: Reads
    hoisted: bool = False
    policy: str = ""


class _Recorder(DiscoveryMode):
    """A discovery that notes every read, and lists a read that a conversion refuses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reads: dict[int, Reads] = {}
        self.below_api: set[int] = set()
        self._operation: set[int] | None = set()  # what the running operation has read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self._reading(set()):
            return super().__torch_function__(func, types, args, kwargs)

    @contextmanager
    def _reading(self, operation: set[int] | None) -> Iterator[None]:
        before, self._operation = self._operation, operation
        try:
            yield
        finally:
            self._operation = before

    def read(self, t: Tensor) -> None:
        super().read(t)
        if id(t) in self.captured:
            self._count(t)

    def refuse_nested(self, t: Tensor) -> None:
        """Listed, with the reason."""

    def _count(self, t: Tensor) -> None:
        operation = self._operation
        if operation is None or id(t) in operation:
            return
        operation.add(id(t))
        self.reads.setdefault(id(t), Reads()).add(line_of_caller())

    def replace(self, value: Any) -> Any:
        """What the hooks of torch.func transforms read: an operation of its own."""
        with self._reading(set()):
            return super().replace(value)

    def custom_function(self, cls: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        with self._reading(set()):
            return super().custom_function(cls, args)

    def returned(self, outputs: Sequence[Tensor]) -> None:
        for t in outputs:
            super().read(t)

    def _read_reachable(self, fun: Any) -> None:
        with self._reading(None):  # it may be read later
            super()._read_reachable(fun)

    def _check_seen(self, func: Any, t: Tensor, key: int) -> None:
        try:
            super()._check_seen(func, t, key)
        except CaptureError:
            self.refused = None
            self.below_api.add(id(t))
            self.captured[id(t)] = t
            self.captured_keys[key] = t  # its views are seen from now on
        if id(t) in self.below_api:
            with self._reading(set()):
                self._count(t)


def _run(fun: Callable[..., Any], example: tuple[Any, ...], hoist: Hoist, rng: Rng) -> list[_Found]:
    prepare(fun, rng)
    policy = policy_of(hoist)
    recorder = discover(fun, example, policy, rng, _Recorder)[0]
    recorder.drop_unheld()
    for gathered, parameter in recorder.name_sharded(Search(fun)):
        recorder.reads[id(parameter)] = recorder.reads[id(gathered)]
    found = []
    for t in recorder.captured.values():
        reads = recorder.reads.get(id(t), Reads())
        if t.is_nested and policy(t):
            found.append(_Found(t, reads, policy="refused: a nested tensor"))
        elif id(t) in recorder.below_api:
            found.append(_Found(t, reads, policy="refused: read below PyTorch's Python API"))
        elif policy(t):
            found.append(_Found(t, reads, hoisted=True, policy=policy_name(hoist)))
        elif differentiable(t):
            found.append(_Found(t, reads, policy="constant: declared by hoist"))
        else:
            found.append(_Found(t, reads))
    return found
