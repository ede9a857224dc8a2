"""Describe captured values, with their names, for reports and error messages.

Runs only when asked for. Names come from searching what the function can reach
(`freevars._names.search`), lines from the traced program (`reads`), the rest from the value itself
(`tracers`). Not here: finding the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from freevars._names.search import Name, name_values
from freevars.jax import _compat
from freevars.jax._describe import tracers
from freevars.jax._describe.reads import reads_of
from freevars.jax._describe.tracers import identity
from freevars.report import CapturedValue, captured_by, describe
from freevars.report._reads import Reads
from freevars.report._source import ReadSite, read_site

__all__ = ["captured_value", "captured_values", "describe_capture", "names_of"]


def names_of(fun: Callable[..., Any] | None, values: Sequence[Any]) -> list[tuple[Name, ...]]:
    """The names under which `fun` reaches each value; none of any if there is no `fun`."""
    if fun is None or not values:
        return [()] * len(values)
    values = [_compat.lowered(value) for value in values]
    found = name_values(fun, values, is_leaf=_is_array, identity=_identity)
    # JAX may have copied an array, such as NumPy's float64 to float32. Then the bytes decide.
    copied = [i for i, names in enumerate(found) if not names and _is_plain(values[i])]
    if copied:
        alike = _Alike([values[i] for i in copied])
        again = name_values(fun, alike.values, is_leaf=_is_array, identity=alike.identity)
        for i, names in zip(copied, again, strict=True):
            found[i] = names
    return found


def captured_values(
    fun: Callable[..., Any] | None,
    values: Sequence[Any],
    reads: Sequence[Reads],
    policy: Callable[[Any], tuple[bool, str]],
) -> tuple[CapturedValue, ...]:
    """What is known of each value; `policy` says whether it is hoisted, and by which rule."""
    captured = []
    for value, names, own_reads in zip(values, names_of(fun, values), reads, strict=True):
        hoisted, rule = policy(value)
        captured.append(captured_value(fun, value, names, own_reads, hoisted=hoisted, policy=rule))
    return tuple(captured)


def captured_value(
    fun: Callable[..., Any] | None,
    value: Any,
    names: Sequence[Name],
    reads: Reads,
    *,
    hoisted: bool,
    policy: str,
) -> CapturedValue:
    """What is known of one captured value."""
    shape, dtype, nbytes = tracers.type_of(value)
    derived = tracers.is_derived(value)
    return CapturedValue(
        names=tuple(name.name for name in names),
        paths=tuple(name.path for name in names),
        made_at=None if names else _made_at(value),
        shape=shape,
        dtype=f"ref {dtype}" if _compat.is_ref(value) else str(dtype),
        nbytes=nbytes,
        device=tracers.device_of(value),
        kind="derived" if derived or (derived is None and not names) else "leaf",
        traced_by=tracers.traced_by(value),
        differentiable=tracers.can_flow(value, hoisted=hoisted),
        hoisted=hoisted,
        policy=policy,
        reads=reads.count,
        sites=reads.lines(),
        captured_by="" if fun is None else captured_by(fun),
    )


def describe_capture(
    fun: Callable[..., Any] | None, value: Any, jaxpr: Any, values: Sequence[Any]
) -> str:
    """One value in words, for an error: name, type, path, who captures it, where it is read first.

    `jaxpr` reads `values` first; `value` need not be one of them.
    """
    position = next((i for i, other in enumerate(values) if other is value), None)
    reads = Reads() if position is None else reads_of(jaxpr, len(values))[position]
    return describe(
        captured_value(fun, value, names_of(fun, [value])[0], reads, hoisted=False, policy="")
    )


def _made_at(x: Any) -> ReadSite | None:
    """The line that computed a traced value, where JAX knows it."""
    info = _compat.made_by(x) if isinstance(x, _compat.Tracer) else None
    line = _compat.user_line(info) if info is not None else None
    return read_site(*line) if line is not None else None


def _is_array(x: Any) -> bool:
    return issubclass(type(x), _compat.ARRAY_TYPES)


def _identity(x: Any) -> Any:
    return identity(_compat.lowered(x))


def _is_plain(x: Any) -> bool:
    """Whether the bytes of a value can be read: a concrete array of this process only."""
    if isinstance(x, np.ndarray):
        return True
    is_concrete = isinstance(x, _compat.Array) and not isinstance(x, _compat.Tracer)
    return is_concrete and not _compat.is_opaque(x) and bool(x.is_fully_addressable)


class _Alike:
    """An identity by content: the bytes that an array has once it is cast to what was captured."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = [np.asarray(value) for value in values]
        self._dtypes: dict[tuple[int, ...], set[np.dtype[Any]]] = {}
        for value in self.values:
            self._dtypes.setdefault(value.shape, set()).add(value.dtype)

    def identity(self, x: Any) -> Any:
        """The key of an array; only NumPy arrays are copied, so only they are looked into."""
        if not isinstance(x, np.ndarray):
            return id(x)
        known = self._dtypes.get(x.shape, set())
        dtypes = {x.dtype} & known or {dtype for dtype in known if dtype.kind == x.dtype.kind}
        for dtype in dtypes:
            return (x.shape, dtype, np.ascontiguousarray(x, dtype).tobytes())
        return id(x)
