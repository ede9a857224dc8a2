"""A converted function: `fun` run with given tensors in the places of those that it captured.

What a captured tensor stands for is told by its position among the hoisted values, and by the place
where `fun` keeps it (`places.py`). So a variable that was bound to another tensor since the
conversion changes nothing, and a copy, in this process or in another, finds the tensors of its own
`fun`.

Where the given values are those that were captured, there is nothing to replace, and `fun` runs as
it is. Not here: finding out what is captured (`convert.py`), and replacing it (`substitution.py`).
"""

import functools
import inspect
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from freevars._contract import Hoist
from freevars.errors import CaptureError, StructureError
from freevars.torch import _compat, _hooks, _modes
from freevars.torch._compat import pytree
from freevars.torch._convert import operators
from freevars.torch._convert.autograd_graph import check_autograd_graph
from freevars.torch._convert.draws import Draws
from freevars.torch._convert.kept import Kept
from freevars.torch._convert.outputs import outputs_of, refuse_hidden, refuse_late
from freevars.torch._convert.places import Places, Search
from freevars.torch._convert.steps import GONE, Place, follow
from freevars.torch._convert.structure import Structure
from freevars.torch._convert.substitution import (
    AllocationTracker,
    CarefulSubstitutionMode,
    ForeignTensors,
    SubstitutionMode,
)
from freevars.torch._describe import Line, describe, function_name, reachable
from freevars.torch._modes import resolve

__all__ = ["Converted", "Rng", "as_leaf"]

Rng = Literal["allow", "error", "replay"]
P = ParamSpec("P")
R = TypeVar("R")

_SIGNATURE = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])


class Converted(Generic[P, R]):
    """A function whose captured tensors are its last arguments; made by `closure_convert`.

    `converted.__wrapped__` is the function itself. `converted.hoisted` are the captured tensors as
    values, which a call uses that gives the arguments of the function alone.

    Example:
        >>> import torch, freevars.torch as fv
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> converted, hoisted = fv.closure_convert(lambda x: w * x, torch.tensor(1.0))
        >>> isinstance(converted, fv.Converted), converted.captured[0] is w
        (True, True)
    """

    __wrapped__: Callable[P, R]

    def __init__(
        self,
        fun: Callable[P, R],
        structure: Structure | None,
        search: Search,
        captured: Sequence[Tensor],
        *,
        declared: Sequence[Tensor] = (),
        gathered: Sequence[Tensor] = (),
        constants: Sequence[Tensor] = (),
        replay: Draws | None = None,
        makes_leaves: bool = False,
        kept: Kept | None = None,
        out_struct: Any = None,
        token: str | None = None,
    ) -> None:
        functools.update_wrapper(self, fun, updated=())
        self.__signature__ = _SIGNATURE  # not that of `fun`: the hoisted values follow
        self._fun: Callable[..., Any] = fun
        self._structure = structure
        self._captured = tuple(captured)
        self._keys = tuple(id(t) for t in captured)
        self._types = tuple((t.shape, t.dtype) for t in captured)
        self._declared = tuple(declared)
        # What modules of `fully_shard` read in place of their parameters, which therefore stand for
        # themselves alone; their gradients come by PyTorch's own hooks.
        self._gathered = tuple(gathered)
        pairs = _compat.sharded_parameters(node.obj for node in search.met.values())
        self._sharded = frozenset(id(pairs[id(t)][1]) for t in self._gathered)
        # Only those that `fun` keeps somewhere are held: another's would live on with us.
        self._constants = tuple(t for t in constants if id(t) in search.met)
        self._reads_constants = len(constants) > 0
        self._places = Places(search, [*self._captured, *self._constants])
        self._places.forget_removed()
        self._outside = ForeignTensors(fun, constants)
        self.replay = replay  # the draws that each call repeats
        self._makes_leaves = makes_leaves
        self._kept = kept or Kept(())
        # For errors and reports: the line that read each tensor first, and, within a `Closure`, the
        # example, `hoist` and `rng` that it was made with.
        self.first_reads: tuple[Line | None, ...] = (None,) * len(self._captured)
        self.origin: tuple[tuple[Any, ...], Hoist, Rng] | None = None
        self.in_struct = None if structure is None else structure.struct
        self.out_struct = out_struct
        # Each with a place of its own in the graph, as one may be computed from another.
        self._runs_as_it_is = self._reads_parameters_only()
        alias = operators.alias
        self.hoisted = tuple(
            t if self._runs_as_it_is or id(t) in self._sharded else alias(t) for t in self._captured
        )
        self._token = uuid.uuid4().hex if token is None else token

    @functools.cached_property
    def _name(self) -> str:
        return function_name(self._fun)

    def __repr__(self) -> str:
        name, n = self._name, len(self._keys)
        return f"<{name} with {n} captured values as trailing arguments>"

    @property
    def captured(self) -> tuple[Tensor, ...]:
        """The captured tensors themselves that `hoisted` stands for."""
        return self._captured

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """The captured tensors that are not hoisted, as far as `fun` still reaches them."""
        return self._constants

    # --- one conversion, and every copy of it, is one structure

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Converted) and self._token == other._token

    def __hash__(self) -> int:
        return hash(self._token)

    def __reduce__(self) -> Any:
        n = len(self._captured)
        found = (*self._captured, *self._constants)
        where = {id(t): p for t, p in zip(found, self._places.first, strict=True)}
        for i, t in enumerate((*self._captured, *self._declared)):
            if where.get(id(t)) is None:
                line = self.first_reads[i] if i < n else None
                message = (
                    "expected to copy a function that keeps each captured tensor in a variable, an "
                    f"attribute or an entry, got {describe(t, self._fun, line)}, which cannot be "
                    "found again in the copy. Keep it in one, or pass it as an argument."
                )
                raise CaptureError(message)
        if self.replay is not None and any(g is not None for g, _ in self.replay.before):
            message = (
                f"expected to copy a function that draws from PyTorch's own generator, got "
                f"{self._name!r}, converted with rng='replay', which draws from "
                "another one, of which the copy has a copy. Draw outside and capture the result."
            )
            raise CaptureError(message)
        origin = self.origin
        if origin is not None:
            origin = (pytree.tree_map_only(Tensor, as_leaf, origin[0]), *origin[1:])
        rest = {
            "replay": self.replay,
            "makes_leaves": self._makes_leaves,
            "kept": self._kept,
            "out_struct": self.out_struct,
            "token": self._token,
        }
        places = tuple(where[id(t)] for t in self._captured)
        declared = tuple(where[id(t)] for t in self._declared)
        facts = (self._types, self.first_reads, origin)
        return _copied, (self._fun, self._structure, places, declared, facts, rest)

    # --- calling

    def __call__(self, *args_and_hoisted: Any) -> R:
        result: R
        if _compat.compiling():
            result = self._eagerly(*args_and_hoisted)
        else:
            result = self._call(args_and_hoisted)
        return result

    @_compat.eagerly  # type: ignore[untyped-decorator]
    def _eagerly(self, *args: Any) -> Any:
        return self._call(args)

    def _call(self, args: tuple[Any, ...]) -> Any:
        arguments, values = self._split(args)
        if self._structure is None:
            leaves = pytree.tree_leaves(arguments)
        else:
            leaves = self._structure.check(arguments, self._name)
        if self._runs_as_it_is and self._is_at_rest(values, leaves):
            out = self._fun(*arguments)
            refuse_late(out)
            known = [
                *(x for x in leaves if isinstance(x, Tensor)),
                *self._declared,
                *self._gathered,
                *values,
            ]
            check_autograd_graph(outputs_of(out), known, self._is_unreachable, self._fun)
            return out
        if not self._kept:
            return self._substituted(arguments, leaves, values)[0]
        with self._kept.as_before(self._fun) as made:
            out, mode = self._substituted(arguments, leaves, values)
        mode.table.update(made)
        return out

    def _split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The arguments of `fun`, and the hoisted values; raises where the values do not fit."""
        n = len(args) - len(self._keys)
        count = max(n, 0) if self._structure is None else self._structure.count
        if n != count:
            if self._structure is not None and len(args) == count:
                self._check_reached(args)
                return args, self.hoisted
            raise StructureError(self._count_message(f"{len(args)} values in all"))
        values = args[n:]
        for i, (value, (shape, dtype)) in enumerate(zip(values, self._types, strict=True)):
            if value is self.hoisted[i]:
                continue
            if self._keys[i] in self._sharded and not _is_detached(value, self.hoisted[i]):
                raise CaptureError(self._sharded_message(i))
            is_plain = isinstance(value, Tensor) and not value.is_nested
            if not is_plain or value.shape != shape or value.dtype is not dtype:
                captured = describe(self._captured[i], self._fun, self.first_reads[i])
                message = (
                    f"hoisted value {i} expected like {captured}, got {Structure.shown(value)}."
                )
                raise StructureError(message)
        return args[:n], values

    def _count_message(self, got: str) -> str:
        expected = f"{self._structure.count if self._structure else 'some'} arguments and"
        return f"{self._name} expected {expected} {len(self._keys)} hoisted values, got {got}."

    def _check_reached(self, args: tuple[Any, ...]) -> None:
        """Refuses a call without hoisted values where derivatives would not reach them."""
        if any(x is t for x in args for t in self.hoisted) and not self._runs_as_it_is:
            raise StructureError(self._count_message("a hoisted value in place of an argument"))
        running = _hooks.forwards_running()
        given = {id(x) for _, values in running for x in values}
        for i, t in enumerate(self.hoisted if running else ()):
            now = resolve(t)
            if operators.may_carry_derivative(now) and given.isdisjoint((id(t), id(now))):
                name = running[-1][0].__name__
                lost = describe(self._captured[i], self._fun, self.first_reads[i])
                got = (
                    f"the arguments alone, in the forward of {name}, where no derivative reaches "
                    f"{lost}. Give the hoisted values to {name}.apply"
                )
                raise StructureError(self._count_message(got))

    def _sharded_message(self, i: int) -> str:
        named = describe(self._captured[i], self._fun, self.first_reads[i])
        return (
            f"expected the parameters of a sharded module (fully_shard) as hoisted values, got "
            f"another tensor for {named}: the module gathers its own. Give hoisted value {i} as it "
            "came from the conversion (or detached), and take derivatives by .backward(), into "
            ".grad."
        )

    def _reads_parameters_only(self) -> bool:
        """Whether `fun` is a module that reads its own parameters, and nothing else that it could
        change. These stand for themselves, and on them `fun` needs no watch: autograd sees every
        read that matters."""
        module = getattr(self._fun, "__self__", self._fun)
        return (
            isinstance(module, torch.nn.Module)
            and not isinstance(module, torch.jit.ScriptModule)
            and None not in self._places.first
            and {id(t) for t in module.parameters()}.issuperset(self._keys)
            and all(t.is_leaf and t.requires_grad for t in self._captured)
            and next(module.buffers(), None) is None
            and not (self._reads_constants or self._makes_leaves or self._kept or self.replay)
            and not _compat.transforms_active()
        )

    def _is_at_rest(self, values: Sequence[Any], leaves: Sequence[Any]) -> bool:
        """Whether replacing the captured tensors by `values` would change nothing, so that autograd
        alone sees every read that matters."""
        return (
            all(value is own for value, own in zip(values, self.hoisted, strict=True))
            and torch.is_grad_enabled()
            and not _compat.transforms_active()
            and not _modes.active()
            and not any(id(x) in self._keys for x in leaves)
            and self._places.unchanged()
        )

    def _is_unreachable(self, leaf: Tensor) -> bool:
        return id(leaf) not in reachable(self._fun)

    def _substituted(
        self, arguments: tuple[Any, ...], leaves: list[Any], values: tuple[Any, ...]
    ) -> tuple[Any, SubstitutionMode]:
        _hooks.hook_compiler()
        table = self._table(values)
        if any(id(x) in table for x in leaves):
            arguments = pytree.tree_map_only(
                Tensor, lambda t: operators.alias(t) if id(t) in table else t, arguments
            )
            leaves = pytree.tree_leaves(arguments)
        read = [
            *(x for x in leaves if isinstance(x, Tensor)),
            *self._declared,
            *self._gathered,
            *table.values(),
        ]
        # Within another converted call, what that gives.
        known = [resolve(t) for t in read] if _modes.active() else read
        mode = self._mode(table, known)
        replaying = nullcontext() if self.replay is None else self.replay.replayed()
        with self._memory(mode), mode.reraising_refusals(), replaying:
            out = self._fun(*arguments)
        if type(out) is Tensor:  # no pytree walk for a plain tensor
            out = table.get(id(out), out)
        else:
            refuse_hidden(out, lambda t: id(t) in table, self._fun)
            out = pytree.tree_map_only(Tensor, mode.replace, out)
        mode.known = ()  # a graph may keep the mode, but not the arguments
        check_autograd_graph(outputs_of(out), known, mode.has_made, self._fun, table)
        return out, mode

    def _memory(self, mode: SubstitutionMode) -> AbstractContextManager[Any]:
        if not self._makes_leaves:
            return nullcontext()
        mode.memory = AllocationTracker()
        return mode.memory

    def _mode(self, table: dict[int, Tensor], known: Sequence[Tensor]) -> SubstitutionMode:
        if torch.is_grad_enabled() and not _compat.transforms_active():
            return SubstitutionMode(self._fun, table, known, self._outside)
        return CarefulSubstitutionMode(self._fun, table, known, self._outside)

    def _table(self, values: Sequence[Tensor]) -> dict[int, Tensor]:
        """Which tensor to give for which that `fun` reads, by the id of the latter."""
        table = dict(zip(self._keys, values, strict=True))
        if not self._places.unchanged():
            table |= self._moved(values)
        for key, value in table.items():
            # Another captured tensor, which reading would replace again.
            if id(value) in table and id(value) != key:
                table[key] = operators.alias(value)
        return table

    def _moved(self, values: Sequence[Tensor]) -> dict[int, Tensor]:
        """The same for the tensors that are now where captured ones were at the conversion."""
        given = (*values, *self._constants)
        owner: dict[int, int] = {}
        lost: dict[int, Any] = {}
        for i, t in self._places.now(self._fun):
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
        was = describe(self._captured[i], self._fun, self.first_reads[i])
        if isinstance(t, Tensor):
            now = describe(t, self._fun)
        else:
            now = "nothing" if t is GONE else f"a {type(t).__name__}"
        also = ", which another captured tensor is bound to as well" * isinstance(t, Tensor)
        return (
            f"expected each captured tensor where it was when {self._name!r} was "
            f"converted, got another value in the place of {was}: {now}{also}. Convert again, or "
            "leave the variable as it is."
        )


def _is_detached(t: Any, of: Tensor) -> bool:
    """Whether `t` is what `of.detach()` gives."""
    if not isinstance(t, Tensor) or t.requires_grad:
        return False
    mine, its = ({_compat.storage_key(p) for p in _compat.parts(u)} for u in (t, of))
    return mine == its


def as_leaf(t: Any) -> Any:
    """`t` without its history, which no other process can have."""
    return t.detach().requires_grad_(t.requires_grad) if t.grad_fn is not None else t


def _copied(
    fun: Callable[..., Any],
    structure: Structure | None,
    places: Sequence[Place],
    declared: Sequence[Place],
    facts: tuple[Any, ...],
    rest: dict[str, Any],
) -> Converted[..., Any]:
    """A copy: the captured tensors are those that the copy of `fun` keeps in the same places."""
    types, first_reads, origin = facts
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
    copy: Converted[..., Any] = Converted(
        fun, structure, search, captured, declared=found, constants=found, **rest
    )
    copy.first_reads, copy.origin = first_reads, origin
    return copy
