"""Substitution: run `fun` with other tensors where it reads the captured ones.

One function mode replaces arguments by identity, for the time of one call and on one thread. What
happens later, in a backward pass, runs under the same mode again (`CaptureMode.resume`). A walk
over the autograd graph after the call catches what came past it.

Not here: finding out what is captured (`discovery.py`).
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from freevars.torch import _compat, _hooks, _modes
from freevars.torch._compat import CheckpointFunction, DispatchMode, storage_key
from freevars.torch._convert import contents, operators, refusals
from freevars.torch._convert.autograd_graph import not_hoisted
from freevars.torch._convert.contents import HOLDS_NONE, PLAIN
from freevars.torch._convert.operators import plain_calls
from freevars.torch._describe import describe, line_of_caller, reachable
from freevars.torch._modes import CaptureMode

__all__ = [
    "AllocationTracker",
    "CarefulSubstitutionMode",
    "ForeignTensors",
    "SubstitutionMode",
]

_SPECIAL: dict[Any, str] = (
    dict.fromkeys(operators.METADATA, "metadata")
    | dict.fromkeys(operators.BACKWARD, "backward")
    | dict.fromkeys(operators.MAKES_LEAF, "leaf")
    | dict.fromkeys(operators.BATCH_STATISTICS, "statistics")
)

# PyTorch's own functions in Python that were found to be nothing special, but may call functions
# that they are given; it only grows, and only by them.
_plain_python: set[Any] = set()

# With one of these a call may write to an argument, or make a leaf.
_TELLING = frozenset({"inplace", "max_norm", "out", "requires_grad"})


class SubstitutionMode(CaptureMode):
    """Replaces each tensor whose id is in `table`, as an argument of any operation."""

    def __init__(
        self,
        fun: Any,
        table: dict[int, Tensor],
        known: Iterable[Tensor] = (),
        outside: "ForeignTensors | None" = None,
    ) -> None:
        self.fun = fun
        self.level = _compat.transform_level()
        self.outside = outside or ForeignTensors(fun)
        self.table = table
        self.known = known  # the tensors given to this call, whose memory is not `fun`'s
        self.leaves: list[Tensor] = []  # made by `fun`: they end the tape, and are no captures
        self.memory: AllocationTracker | None = None
        self._keys: set[int] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The hot path: every line here is paid for at every operation of `fun`.
        if _modes.broken:
            return self._special(func, args, kwargs or {})
        if kwargs:
            if func in plain_calls and not self.paused and _TELLING.isdisjoint(kwargs):
                return func(*self.replace(args), **self.replace(kwargs))
            return self._special(func, args, kwargs)
        if func in plain_calls:
            get = self.table.get
            if len(args) == 2:  # noqa: PLR2004 (most have; no list is made)
                a, b = args
                if type(a) in PLAIN and type(b) in PLAIN:
                    return func(get(id(a), a), get(id(b), b))
            return func(*[get(id(a), a) if type(a) in PLAIN else self.replace(a) for a in args])
        if func in _plain_python and not self.paused:
            return func(*contents.resumed(self, self.replace(args)))
        return self._special(func, args, {})

    def _special(self, func: Any, args: Any, kwargs: Any) -> Any:
        if _modes.broken:
            self.refuse_broken()
        kind = _SPECIAL.get(func)
        if kind == "metadata" or self.paused:
            return func(*args, **kwargs)
        known = func in _plain_python or operators.is_plain_call(func)
        if not known or not _TELLING.isdisjoint(kwargs):
            self._refuse(kind, func, args, kwargs)
        special = known or kind or operators.writes_first(func)
        if not special and operators.is_pytorch_python(func):
            _plain_python.add(func)
        new_args, new_kwargs = self.replace(args), self.replace(kwargs)
        if operators.is_python(func):
            new_args = contents.resumed(self, new_args)
            new_kwargs = contents.resumed(self, new_kwargs)
        out = func(*new_args, **new_kwargs)
        if kind == "leaf" or kwargs.get("requires_grad"):
            self.leaves.append(new_args[0] if kind == "leaf" else out)
        if _compat.is_custom_function_call(func):
            _hooks.keep_watching_backward(out, self)
        return out

    def _refuse(self, kind: str | None, func: Any, args: Any, kwargs: Any) -> None:
        if kind == "backward" and not (_compat.in_backward() or self.solvers):
            self.refuse(refusals.backward_message(self.fun))
        if _compat.is_higher_order(func):
            self.refuse(refusals.higher_order_message(func, self.fun))
        body = refusals.operator_body(self, func)
        if body is not None and body not in self.outside.operators:
            refusals.refuse_reads_of_operator(self, func, body, self._matters, self.fun)
            self.outside.operators.add(body)
        if kind == "leaf":
            self._refuse_new_leaf(func, args, kwargs)
        if kind == "statistics":
            refusals.refuse_running_statistics(self, func, args, kwargs, self._named)
        for t in operators.written_by_call(func, args, kwargs):
            self._refuse_write(func, t)

    def replace(self, value: Any) -> Any:
        if type(value) in PLAIN or isinstance(value, Tensor):
            return self.table.get(id(value), value)
        if isinstance(value, tuple | list):
            for x in value:  # an index mostly holds numbers
                if type(x) not in HOLDS_NONE:
                    break
            else:
                return value
            new = [self.replace(x) for x in value]
            for a, b in zip(new, value, strict=True):
                if a is not b:
                    break
            else:
                return value
            if hasattr(value, "_fields"):
                return type(value)(*new)
            return new if isinstance(value, list) else type(value)(new)
        if isinstance(value, dict):
            changed = {k: y for k, x in value.items() if (y := self.replace(x)) is not x}
            return value | changed if changed else value
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            new_parts = self.replace(parts)
            return value if new_parts is parts else slice(*new_parts)
        return value

    def given(self, t: Tensor) -> Tensor:
        return self.table.get(id(t), t)

    def has_made(self, leaf: Tensor) -> bool:
        if self.memory is not None and self.memory.holds(leaf):
            return True
        return any(leaf is t for t in self.leaves)

    def is_foreign(self, t: Tensor) -> bool:
        return id(t) in reachable(self.fun)

    def _matters(self, t: Tensor) -> bool:
        return id(t) in self.table or operators.may_carry_derivative(t)

    def _refuse_new_leaf(self, func: Any, args: Any, kwargs: Any) -> None:
        t = self.given(args[0])
        if (t is not args[0] or self.outside.holds(t)) and operators.changes_requires_grad(
            t, args[1:], kwargs
        ):
            self.refuse(refusals.change_message(func, args[0], self.fun))

    def _refuse_write(self, func: Any, t: Tensor) -> None:
        direct = id(t) in self.table or self.outside.holds(t)
        if direct or (not operators.writes_metadata(func) and self._holds_memory_of(t)):
            whose = "a captured tensor, its argument, or a view of one"
            name = getattr(func, "__name__", func)
            self.refuse(refusals.write_message(name, whose, self._named(t)))

    def _named(self, t: Tensor) -> str:
        return describe(t, self.fun, line_of_caller())

    def _holds_memory_of(self, t: Tensor) -> bool:
        if self._keys is None:
            self._keys = {storage_key(u) for x in self.known for u in contents.inner(x)}
        keys = [storage_key(u) for u in contents.inner(t)]
        return any(key in self._keys or self.outside.holds_memory(key) for key in keys)

    # --- called by the hooks

    def note(self, value: Any) -> None:
        """Nothing to remember: the tape walk decides."""

    def custom_function(self, cls: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if cls is CheckpointFunction and isinstance(args[0], Callable):  # type: ignore[arg-type]
            return self._checkpointed(*args)
        return tuple(contents.resumed(self, self.replace(args)))

    def _checkpointed(self, fun: Any, preserve: Any, *inputs: Any) -> tuple[Any, ...]:
        """Reentrant checkpointing returns derivatives of its inputs only: the given values become
        some."""
        keys = tuple(self.table)
        given = tuple(self.table.values())

        def explicit(*values: Any) -> Any:
            split = len(values) - len(keys)
            table = dict(zip(keys, values[split:], strict=True))
            with type(self)(self.fun, table, self.known, self.outside):
                return fun(*values[:split])

        return (explicit, preserve, *self.replace(inputs), *given)


class CarefulSubstitutionMode(SubstitutionMode):
    """Also refuses to read a tensor that is differentiable and not hoisted, where no tape would
    tell: without gradient mode, in forward mode, under a torch.func transform. `left` are those
    that the first run has made and `fun` keeps, by id."""

    def __init__(self, *of: Any, left: "Mapping[int, weakref.ref[Tensor]]") -> None:
        super().__init__(*of)
        self._left = left
        self._made: dict[int, weakref.ref[Tensor]] = {}
        self._reachable: dict[int, tuple[Tensor, str]] | None = None
        self.note((*self.known, *self.table.values()))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and func in plain_calls and not _modes.broken:
            get = self.table.get
            given = [get(id(a), a) if type(a) in PLAIN else self.replace(a) for a in args]
            self.check(given)
            out = func(*given)
        else:
            if func not in operators.METADATA and not self.paused:
                self.check(self.replace(args), self.replace(kwargs) if kwargs else None)
            out = super().__torch_function__(func, types, args, kwargs)
        self.note(out)
        return out

    def check(self, args: Any, kwargs: Any = None) -> None:
        made = self._made.get
        for t in contents.given_tensors(args, kwargs):
            ref = made(id(t))
            if (ref is None or ref() is not t) and operators.may_carry_derivative(t):
                ref = self._left.get(id(t))
                if ref is not None and ref() is t:
                    self.refuse(refusals.kept_message(t, self.fun))
                if self._reachable is None:
                    self._reachable = reachable(self.fun)
                if id(t) in self._reachable:
                    self.refuse(not_hoisted(t, self.fun, line_of_caller()))

    def note(self, value: Any) -> None:
        if type(value) is Tensor:
            self._made[id(value)] = weakref.ref(value)
            return
        for t in contents.tensors(value):
            self._made[id(t)] = weakref.ref(t)

    def custom_function(self, cls: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        args = super().custom_function(cls, args)
        self.check(args)
        return args

    def _checkpointed(self, fun: Any, preserve: Any, *inputs: Any) -> tuple[Any, ...]:
        return tuple(contents.resumed(self, (fun, preserve, *self.replace(inputs))))


class ForeignTensors:
    """The tensors that `fun` reads as constants, or reaches without running: not its own, so it
    must not write to them. Held weakly, and looked for at the first write only."""

    def __init__(self, fun: Any, captured: Iterable[Tensor] = ()) -> None:
        self._fun = fun
        self._captured = [weakref.ref(t) for t in captured]
        # The functions of custom operators that were found to read nothing that matters.
        self.operators: weakref.WeakSet[Any] = weakref.WeakSet()
        self._found: tuple[dict[int, weakref.ref[Tensor]], dict[int, weakref.ref[Tensor]]] | None
        self._found = None

    def _look(self) -> tuple[dict[int, Any], dict[int, Any]]:
        if self._found is None:
            alive = [t for ref in self._captured if (t := ref()) is not None]
            every = [*alive, *(t for t, _ in reachable(self._fun).values() if t.grad_fn is None)]
            refs = {id(t): weakref.ref(t) for t in every}
            self._found = (refs, {key: refs[id(t)] for t in every for key in _memory(t)})
        return self._found

    def holds(self, t: Tensor) -> bool:
        ref = self._look()[0].get(id(t))
        return ref is not None and ref() is t

    def holds_memory(self, key: int) -> bool:
        ref = self._look()[1].get(key)
        t = None if ref is None else ref()  # memory that was freed may be another's now
        return t is not None and key in _memory(t)


def _memory(t: Tensor) -> list[int]:
    """The memory of `t`, and that of its `.grad`."""
    grad = t.grad if t.is_leaf else None
    return [storage_key(u) for x in (t, grad) if x is not None for u in contents.inner(x)]


class AllocationTracker(DispatchMode):  # type: ignore[no-untyped-call]
    """Which memory was made while `fun` ran. Dear, so only for functions that make leaves of
    their own in a way that function modes do not see (`torch.nn.Parameter`)."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage_key(t) for t in contents.tensors((args, kwargs))}
        self._keys |= {storage_key(t) for t in contents.tensors(out)} - given
        return out

    def holds(self, t: Tensor) -> bool:
        return any(storage_key(u) in self._keys for u in contents.inner(t))
