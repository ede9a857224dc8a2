"""A converted function: `fun` run with given tensors in the places of those that it captured.

Where the given values are those that were captured, there is nothing to replace, and `fun` runs as
it is. Not here: finding out what is captured (`convert.py`), which value stands for what
(`captured.py`), replacing it (`substitution.py`), and copies (`copies.py`).
"""

import functools
import inspect
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from freevars._contract import Hoist
from freevars.errors import CaptureError, StructureError
from freevars.torch import _compat, _hooks, _modes
from freevars.torch._compat import pytree
from freevars.torch._convert import operators
from freevars.torch._convert.at_rest import Rest, rest_of
from freevars.torch._convert.autograd_graph import check_autograd_graph
from freevars.torch._convert.captured import Captured
from freevars.torch._convert.copies import as_leaf, copied, places_to_copy
from freevars.torch._convert.draws import Draws
from freevars.torch._convert.kept import Kept
from freevars.torch._convert.outputs import outputs_of, refuse_hidden, refuse_late
from freevars.torch._convert.places import Search
from freevars.torch._convert.structure import Structure
from freevars.torch._convert.substitution import (
    AllocationTracker,
    CarefulSubstitutionMode,
    ForeignTensors,
    SubstitutionMode,
)
from freevars.torch._describe import Line, function_name, reachable
from freevars.torch._modes import resolve

__all__ = ["Converted", "Rng", "Run"]

Rng = Literal["allow", "error", "replay"]
P = ParamSpec("P")
R = TypeVar("R")

_NOTHING = nullcontext()
_SIGNATURE = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])


class Run(NamedTuple):
    """What the run on the example showed, beside the captured tensors."""

    out_struct: Any = None
    replay: Draws = Draws()  # what each call draws again
    makes_leaves: bool = False
    normalises: bool = False  # by a batch norm
    communicates: bool = False  # with other processes
    kept: Kept = Kept(())
    # What it made, by id, and `fun` keeps out of sight: not to be read. The tape tells where that
    # happens, but not of what a transform has wrapped: then care is needed.
    left: Mapping[int, "weakref.ref[Tensor]"] = {}
    careful: bool = False


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
        run: Run,
        *,
        declared: Sequence[Tensor] = (),
        gathered: Sequence[Tensor] = (),
        constants: Sequence[Tensor] = (),
        training: tuple[bool, ...] | None = None,
        token: str | None = None,
        first_reads: Sequence[Line | None] | None = None,
        origin: tuple[tuple[Any, ...], Hoist, Rng] | None = None,
    ) -> None:
        functools.update_wrapper(self, fun, updated=())
        self.__signature__ = _SIGNATURE  # not that of `fun`: the hoisted values follow
        self._fun: Callable[..., Any] = fun
        self._structure = structure
        self._own = Captured(fun, search, captured, constants, first_reads)
        self._declared = tuple(declared)
        # What modules of `fully_shard` read in place of their parameters, which therefore stand for
        # themselves alone; their gradients come by PyTorch's own hooks.
        self._gathered = tuple(gathered)
        pairs = _compat.sharded_parameters(node.obj for node in search.met.values())
        self._sharded = frozenset(id(pairs[id(t)][1]) for t in self._gathered)
        self._outside = ForeignTensors(fun, constants)
        self._run = run
        # Asked at each call.
        self._kept, self._careful = run.kept, run.careful
        self._is_plain = not (run.makes_leaves or run.replay)
        self.replay = run.replay
        self.communicates = run.communicates
        self.out_struct = run.out_struct
        # Within a `Closure`, the example, `hoist` and `rng` that it was made with.
        self.origin = origin
        self.in_struct = None if structure is None else structure.struct
        self._rest = None
        if not (run.makes_leaves or run.normalises or run.kept or run.replay):
            self._rest = rest_of(fun, self._own, training, sharded=bool(self._gathered))
        # Each with a place of its own in the graph, as one may be computed from another. What is
        # in no graph stands for itself, so that it gets its derivatives when it is unfrozen.
        self.hoisted = tuple(operators.alias(t) if self._needs_alias(t) else t for t in captured)
        self._token = uuid.uuid4().hex if token is None else token

    def _needs_alias(self, t: Tensor) -> bool:
        if self._rest is not None or id(t) in self._sharded:
            return False
        with _compat.unseen():  # our own look is no read
            return operators.may_carry_derivative(t)

    @functools.cached_property
    def _name(self) -> str:
        return function_name(self._fun)

    def __repr__(self) -> str:
        name, n = self._name, len(self.captured)
        return f"<{name} with {n} captured values as trailing arguments>"

    @property
    def captured(self) -> tuple[Tensor, ...]:
        """The captured tensors themselves that `hoisted` stands for."""
        return self._own.tensors

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """The captured tensors that are not hoisted, as far as `fun` still reaches them."""
        return self._own.constants

    @property
    def first_reads(self) -> tuple[Line | None, ...]:
        """The line that read each captured tensor first; None where that is not known."""
        return self._own.first_reads

    # --- one conversion, and every copy of it, is one structure

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Converted) and self._token == other._token

    def __hash__(self) -> int:
        return hash(self._token)

    def __reduce__(self) -> Any:
        places, declared = places_to_copy(self._fun, self._own, self._declared, self.replay)
        origin = self.origin
        if origin is not None:
            origin = (pytree.tree_map_only(Tensor, as_leaf, origin[0]), *origin[1:])
        rest = {
            "run": self._run._replace(left={}, careful=False),  # which are of this process
            "training": None if self._rest is None else self._rest.training,
            "token": self._token,
            "first_reads": self.first_reads,
            "origin": origin,
        }
        types = self._own.types
        return copied, (Converted, self._fun, self._structure, places, declared, types, rest)

    # --- calling

    @_compat.uncompiled
    def __call__(self, *args_and_hoisted: Any) -> R:
        arguments, values = self._split(args_and_hoisted)
        if self._structure is None:
            leaves = pytree.tree_leaves(arguments)
        else:
            leaves = self._structure.check(arguments, self._name)
        if self._rest is not None and self._rest.holds(values, leaves):
            return self._at_rest(self._rest, arguments, leaves)
        if not self._kept:
            return self._substituted(arguments, leaves, values)[0]
        with self._kept.as_before(self._fun) as made:
            out, mode = self._substituted(arguments, leaves, values)
        mode.table.update(made)
        return out

    def _split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The arguments of `fun`, and the hoisted values; raises where the values do not fit."""
        n = len(args) - len(self._own.ids)
        count = max(n, 0) if self._structure is None else self._structure.count
        if n != count:
            if self._structure is not None and len(args) == count:
                self._check_reached(args)
                self._own.check_memory(self.hoisted, self.hoisted)
                return args, self.hoisted
            raise StructureError(self._count_message(f"{len(args)} values in all"))
        values = args[n:]
        own = False
        for i, value in enumerate(values):
            if value is self.hoisted[i]:
                own = True
                continue
            is_sharded = self._own.ids[i] in self._sharded
            if is_sharded and not _is_detached(value, self.hoisted[i]):
                raise CaptureError(self._sharded_message(i))
            self._own.check(i, value)
        if own and self._rest is None:
            self._own.check_memory(values, self.hoisted)
        return args[:n], values

    def _count_message(self, got: str) -> str:
        expected = f"{self._structure.count if self._structure else 'some'} arguments and"
        return f"{self._name} expected {expected} {len(self._own.ids)} hoisted values, got {got}."

    def _check_reached(self, args: tuple[Any, ...]) -> None:
        """Refuses a call without hoisted values where derivatives would not reach them."""
        own = {id(t) for t in self.hoisted} - {id(t) for t in self.captured}
        if not own.isdisjoint(map(id, args)):
            raise StructureError(self._count_message("a hoisted value in place of an argument"))
        running = _hooks.forwards_running()
        given = {id(x) for _, values in running for x in values}
        for i, t in enumerate(self.hoisted if running else ()):
            now = resolve(t)
            if operators.may_carry_derivative(now) and given.isdisjoint((id(t), id(now))):
                name = running[-1][0].__name__
                got = (
                    f"the arguments alone, in the forward of {name}, where no derivative reaches "
                    f"{self._own.described(i)}. Give the hoisted values to {name}.apply"
                )
                raise StructureError(self._count_message(got))

    def _sharded_message(self, i: int) -> str:
        return (
            f"expected the parameters of a sharded module (fully_shard) as hoisted values, got "
            f"another tensor for {self._own.described(i)}: the module gathers its own. Give "
            f"hoisted value {i} as it came from the conversion (or detached), and take "
            "derivatives by .backward(), into .grad."
        )

    def _at_rest(self, rest: Rest, arguments: tuple[Any, ...], leaves: list[Any]) -> R:
        given = [x for x in leaves if isinstance(x, Tensor)]
        out: R = rest.run(self._fun, arguments, given)
        refuse_late(out)
        outputs = outputs_of(out)
        known = [*given, *self._declared, *self._gathered, *self.captured]
        check_autograd_graph(outputs, known, self._is_unreachable, self._fun)
        return out

    def _is_unreachable(self, leaf: Tensor) -> bool:
        return id(leaf) not in reachable(self._fun)

    def _substituted(
        self, arguments: tuple[Any, ...], leaves: list[Any], values: tuple[Any, ...]
    ) -> tuple[R, SubstitutionMode]:
        _hooks.hook_compiler()
        table = self._own.table(values)
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
        with self._beside(mode), mode.reraising_refusals():
            out = self._fun(*arguments)
        if type(out) is Tensor:  # no pytree walk for a plain tensor
            out = table.get(id(out), out)
        else:
            refuse_hidden(out, lambda t: id(t) in table, self._fun)
            out = pytree.tree_map_only(Tensor, mode.replace, out)
        mode.known = ()  # a graph may keep the mode, but not the arguments
        check_autograd_graph(outputs_of(out), known, mode.has_made, self._fun, table)
        return out, mode

    def _beside(self, mode: SubstitutionMode) -> AbstractContextManager[Any]:
        """What a call needs besides its mode; mostly nothing."""
        if self._is_plain:
            return _NOTHING
        stack = ExitStack()
        if self._run.makes_leaves:
            mode.memory = stack.enter_context(AllocationTracker())
        stack.enter_context(self.replay.replayed())
        return stack

    def _mode(self, table: dict[int, Tensor], known: Sequence[Tensor]) -> SubstitutionMode:
        of = (self._fun, table, known, self._outside)
        if torch.is_grad_enabled() and not self._careful and not _compat.transforms_active():
            return SubstitutionMode(*of)
        return CarefulSubstitutionMode(*of, left=self._run.left)


def _is_detached(t: Any, of: Tensor) -> bool:
    """Whether `t` is what `of.detach()` gives."""
    if not isinstance(t, Tensor) or t.requires_grad:
        return False
    mine, its = ({_compat.storage_key(p) for p in _compat.parts(u)} for u in (t, of))
    return mine == its
