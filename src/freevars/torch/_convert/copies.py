"""A converted function in another process, or copied: its captured tensors are those that the copy
of its `fun` keeps in the same places.

Not here: the places themselves (`places.py`, `steps.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from freevars.errors import CaptureError
from freevars.torch._convert.captured import Captured
from freevars.torch._convert.draws import Draws
from freevars.torch._convert.places import Search
from freevars.torch._convert.steps import GONE, Place, follow
from freevars.torch._convert.structure import Structure
from freevars.torch._describe import describe, function_name

__all__ = ["as_leaf", "copied", "places_to_copy"]

C = TypeVar("C")


def as_leaf(t: Any) -> Any:
    """`t` without its history, which no other process can have."""
    return t.detach().requires_grad_(t.requires_grad) if t.grad_fn is not None else t


def places_to_copy(
    fun: Callable[..., Any], captured: Captured, declared: Sequence[Tensor], replay: Draws
) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    """Where a copy finds the captured tensors and the declared constants; refuses what cannot be
    copied."""
    found = (*captured.tensors, *captured.constants)
    where = {id(t): p for t, p in zip(found, captured.places.first, strict=True)}
    n = len(captured.tensors)
    for i, t in enumerate((*captured.tensors, *declared)):
        if where.get(id(t)) is None:
            line = captured.first_reads[i] if i < n else None
            message = (
                "expected to copy a function that keeps each captured tensor in a variable, an "
                f"attribute or an entry, got {describe(t, fun, line)}, which cannot be "
                "found again in the copy. Keep it in one, or pass it as an argument."
            )
            raise CaptureError(message)
    if any(g is not None for g, _ in replay.before):
        message = (
            f"expected to copy a function that draws from PyTorch's own generator, got "
            f"{function_name(fun)!r}, converted with rng='replay', which draws from "
            "another one, of which the copy has a copy. Draw outside and capture the result."
        )
        raise CaptureError(message)
    places: Any = tuple(where[id(t)] for t in captured.tensors)
    return places, tuple(where[id(t)] for t in declared)  # type: ignore[misc]


def copied(
    cls: Callable[..., C],
    fun: Callable[..., Any],
    structure: Structure | None,
    places: Sequence[Place],
    declared: Sequence[Place],
    types: Sequence[Any],
    rest: dict[str, Any],
) -> C:
    """The converted function, of class `cls`, made of the copy of `fun`."""
    captured = [follow(fun, place) for place in places]
    for t, place, (shape, dtype) in zip(captured, places, types, strict=True):
        if not isinstance(t, Tensor) or t.shape != shape or t.dtype is not dtype:
            where = "".join(f".{key}" if type(key) is str else f"[{key!r}]" for _, key in place)
            expected = f"{str(dtype).removeprefix('torch.')}{list(shape)}"
            got = "nothing" if t is GONE else Structure.shown(t)
            message = (
                f"expected a copy of {function_name(fun)!r} that keeps a tensor {expected} where "
                f"the original did, got {got} (at {where}). Make it the same there, or convert it "
                "there."
            )
            raise CaptureError(message)
    search = Search(fun)
    found = [follow(fun, place) for place in declared]
    return cls(fun, structure, search, captured, declared=found, constants=found, **rest)
