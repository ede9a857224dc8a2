"""The tensors that a conversion captured: where `fun` keeps each, and what stands for it in a call.

What a captured tensor stands for is told by its position among the hoisted values, and by the place
where `fun` keeps it (`places.py`). So a variable that was bound to another tensor since the
conversion changes nothing.

Not here: which tensors these are (`convert.py`), and running `fun` with others (`converted.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from freevars.errors import CaptureError, StructureError
from freevars.torch import _compat
from freevars.torch._convert import operators
from freevars.torch._convert.places import Places, Search
from freevars.torch._convert.steps import GONE
from freevars.torch._convert.structure import Structure
from freevars.torch._describe import Line, describe, function_name

__all__ = ["Captured"]


class Captured:
    """What `fun` captured, in the order of the hoisted values.

    Attributes:
        tensors: those that are hoisted.
        ids: of these.
        constants: those that are not, as far as `fun` keeps them somewhere: only these are held,
            for another's would live on with us.
        places: where all of these are kept.
        first_reads: the line that read each hoisted one first, for errors and reports.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        search: Search,
        tensors: Sequence[Tensor],
        constants: Sequence[Tensor],
        first_reads: Sequence[Line | None] | None,
    ) -> None:
        self._fun = fun
        self.tensors = tuple(tensors)
        self.ids = tuple(id(t) for t in tensors)
        self.types = tuple((t.shape, t.dtype) for t in tensors)
        self._addresses = _compat.addresses(self.tensors)
        self.constants = tuple(t for t in constants if id(t) in search.met)
        self.places = Places(search, [*self.tensors, *self.constants])
        self.places.forget_removed()
        self.first_reads = tuple(first_reads or (None,) * len(self.tensors))

    def described(self, i: int) -> str:
        """What a person calls captured tensor `i`."""
        return describe(self.tensors[i], self._fun, self.first_reads[i])

    def check(self, i: int, value: Any) -> None:
        """Refuses what cannot stand for captured tensor `i`."""
        shape, dtype = self.types[i]
        is_plain = isinstance(value, Tensor) and not value.is_nested
        if not is_plain or value.shape != shape or value.dtype is not dtype:
            message = (
                f"hoisted value {i} expected like {self.described(i)}, got "
                f"{Structure.shown(value)}."
            )
            raise StructureError(message)

    def check_memory(self, values: Sequence[Tensor], hoisted: Sequence[Tensor]) -> None:
        """Refuses a hoisted value whose captured tensor has other memory since, unless that has
        moved with it (`share_memory_`): it has the values of the conversion."""
        now = _compat.addresses(self.tensors)
        if now == self._addresses:
            return
        moved = _compat.addresses(hoisted)
        for i in range(len(now)):
            if values[i] is hoisted[i] and now[i] not in (self._addresses[i], moved[i]):
                message = (
                    "expected captured tensors in the memory of the conversion, got "
                    f"{self.described(i)}, whose data was replaced since (t.data = ..., "
                    "t.set_(...), module.to(...), vector_to_parameters). Convert again, or write "
                    "to the tensor (t.data.copy_(...))."
                )
                raise CaptureError(message)

    def table(self, values: Sequence[Tensor]) -> dict[int, Tensor]:
        """Which tensor to give for which that `fun` reads, by the id of the latter."""
        table = dict(zip(self.ids, values, strict=True))
        if not self.places.unchanged():
            table |= self._moved(values)
        if not table.keys().isdisjoint(map(id, values)):
            for key, value in table.items():
                # Another captured tensor, which reading would replace again.
                if id(value) in table and id(value) != key:
                    table[key] = operators.alias(value)
        return table

    def _moved(self, values: Sequence[Tensor]) -> dict[int, Tensor]:
        """The same for the tensors that are now where captured ones were at the conversion."""
        given = (*values, *self.constants)
        owner: dict[int, int] = {}
        lost: dict[int, Any] = {}
        for i, t in self.places.now(self._fun):
            if isinstance(t, Tensor):
                other = owner.setdefault(id(t), i)
                if given[other] is not given[i] and min(i, other) < len(values):
                    raise CaptureError(self._rebound_message(min(i, other), t))
            elif i < len(values):
                lost[i] = t
        for i in set(lost).difference(owner.values()):
            raise CaptureError(self._rebound_message(i, lost[i]))
        return {key: given[i] for key, i in owner.items()}

    def _rebound_message(self, i: int, t: Any) -> str:
        if isinstance(t, Tensor):
            now = describe(t, self._fun)
        else:
            now = "nothing" if t is GONE else f"a {type(t).__name__}"
        also = ", which another captured tensor is bound to as well" * isinstance(t, Tensor)
        return (
            f"expected each captured tensor where it was when {function_name(self._fun)!r} was "
            f"converted, got another value in the place of {self.described(i)}: {now}{also}. "
            "Convert again, or leave the variable as it is."
        )
