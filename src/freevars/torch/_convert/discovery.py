"""Discovery: which tensors does `fun` read from outside while it runs on the example?

Two modes watch one run. The function mode sees every tensor that the Python API reads, wrapped by
torch.func or not; what it did not see made, and what lives in memory that was not made inside, is
captured. The dispatch mode lies below autograd: it sees memory being made, random draws, in-place
writes before they happen, and reads that did not come through the Python API.

Not here: calling `fun` with other values (`substitution.py`).
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from freevars.torch import _compat, _modes
from freevars.torch._compat import DispatchMode, storage_key
from freevars.torch._convert import contents, operators, refusals
from freevars.torch._convert.autograd_graph import hidden_path
from freevars.torch._convert.provenance import Hoist, Provenance
from freevars.torch._describe import (
    Reachable,
    caller,
)

__all__ = ["DiscoveryMode"]


class DiscoveryMode(Provenance):
    """One watched run. After it, `captured` holds what was read, in order of first use."""

    def __init__(
        self, fun: Any, arguments: Sequence[Tensor], hoist: Hoist, *, rng: str, constants: bool
    ) -> None:
        super().__init__(fun, arguments, hoist)
        self.constants = constants  # whether tensors without derivatives may be hoisted too
        self.rng = rng
        self.drew: str | None = None  # the first random operation
        self.normalises = False  # by a batch norm
        self.communicates = False  # with other processes
        self.generators: dict[int, tuple[torch.Generator, Tensor]] = {}
        self._reachable: Reachable | None = None
        self._later: dict[int, Any] = {}  # by id: what may be called after the run
        self._call: set[int] | None = None  # memory that the running operation was given

    def watching(self) -> AbstractContextManager[Any]:
        """Both modes, and no cache of cast weights: a hit would be a read that nobody sees."""
        stack = ExitStack()
        cached = torch.is_autocast_cache_enabled()
        stack.callback(torch.set_autocast_cache_enabled, cached)
        torch.set_autocast_cache_enabled(False)
        stack.enter_context(DispatchDiscovery(self))
        stack.enter_context(self.reraising_refusals())
        return stack

    # --- what the Python API reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _modes.broken:
            self.refuse_broken()
        plain = operators.is_plain_call(func)
        if self.paused or not (plain or self._reads(func)):
            return func(*args, **kwargs)
        if not plain:
            self._refuse(func, args, kwargs)
        given = contents.given_tensors(args, kwargs)
        for t in given:
            self.read(t)
        if not plain:
            args, kwargs = self._looked_at(func, args, kwargs)
        token = self.begin(given)
        try:
            out = func(*args, **kwargs)
        finally:
            self.end(token)
        self.note(out)
        if not (plain and given) or kwargs:
            self._note_memory(func, args, kwargs, out, factory=not given)
        return out

    @staticmethod
    def _reads(func: Any) -> bool:
        return func not in operators.METADATA and func != operators.REQUIRES_GRAD

    def _looked_at(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments for a function that may do more than read them."""
        self._refuse_change(func, args, kwargs)
        if func is torch.autograd.grad:
            outputs, inputs = ([*contents.tensors(x)] for x in args[:2])
            inputs = [t for t in inputs if id(t) in self.captured]
            problem = hidden_path(outputs, inputs, self.captured.values(), self.fun)
            if problem is not None:
                self.refuse(problem)
        if operators.is_python(func):
            args, kwargs = contents.resumed(self, args), contents.resumed(self, kwargs)
            self._read_of_callables((args, kwargs))
        if _compat.is_custom_function_call(func):
            self._read_of_class(args[0])
        return args, kwargs

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        if func in operators.BACKWARD and not (_compat.in_backward() or self.solvers):
            self.refuse(refusals.backward_message(self.fun))
        if _compat.is_higher_order(func):
            self.refuse(refusals.higher_order_message(func, self.fun))
        body = refusals.operator_body(self, func)
        if body is not None:
            refusals.refuse_reads_of_operator(self, func, body, self.hoist, self.fun)
        if func in operators.BATCH_STATISTICS:
            refusals.refuse_running_statistics(self, func, args, kwargs, self._named)

    def _note_memory(self, func: Any, args: Any, kwargs: Any, out: Any, *, factory: bool) -> None:
        """Leaves that `fun` makes, and memory that the dispatch mode does not see being made."""
        if func in operators.MAKES_LEAF or kwargs.get("requires_grad"):
            self.leaves.append(args[0] if func in operators.MAKES_LEAF else out)
        if (factory and operators.is_factory(func)) or func is Tensor.__deepcopy__:
            self.made_keys.update(storage_key(t) for t in contents.tensors(out))

    def _refuse_change(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuses to change a captured tensor itself; writes to its memory are told below."""
        if func not in operators.CHANGES and func not in operators.MAKES_LEAF:
            return
        t = args[0]
        if id(t) not in self.captured or torch.nn.parameter.is_lazy(t):
            return  # the first run of a lazy module gives it its parameters
        new_leaf = func in operators.MAKES_LEAF and operators.changes_requires_grad(
            t, args[1:], kwargs
        )
        if new_leaf or func in operators.CHANGES:
            self.refuse(refusals.change_message(func, t, self.fun))

    def _read_of_callables(self, value: Any) -> None:
        for x in contents.callables(value):
            self._read_reachable(getattr(x, "__wrapped__", x))

    def _read_of_class(self, cls: Any) -> None:
        """A backward body may read what the forward body does not."""
        for name in ("backward", "vjp", "jvp", "vmap"):
            self._read_reachable(getattr(cls, name, None))

    def _read_reachable(self, fun: Any) -> None:
        if fun is None:
            return
        self._later[id(fun)] = fun
        self._reachable = self._reachable or Reachable()  # one for the run: each object is met once
        for t, _ in self._reachable.of(fun):
            if self.hoist(t):
                self.read(t)

    def run_is_over(self) -> None:
        """What is called after the run, in a backward pass, reads what it can reach by now."""
        self._reachable = None
        for fun in list(self._later.values()):
            self._read_reachable(fun)

    # --- what it does not see (called by the hooks)

    def custom_function(self, cls: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        for t in contents.tensors(args):
            self.read(t)
        self._read_of_class(cls)
        return tuple(contents.resumed(self, args))

    def begin(self, args: Sequence[Any]) -> set[int] | None:
        before = self._call
        given = args if type(args) is list else contents.tensors(args)
        self._call = {storage_key(u) for t in given for u in self._inner(t)}
        if _compat.transforms_active():  # tangents of tensors seen before
            self._call |= self.captured_keys.keys()
        return before

    def end(self, token: set[int] | None) -> None:
        self._call = token

    # --- what the dispatch mode tells

    def on_dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = contents.given_tensors(args, kwargs)
        keys = [storage_key(t) for t in given]
        what = operators.traits(func)
        if func is torch.ops.aten.lift_fresh.default:
            self.made_keys.update(keys)  # memory of a literal, `torch.tensor([1.0])`
        self.normalises |= what.normalises
        self.communicates |= what.communicates
        if what.writes or what.normalises:
            for t in operators.written(func, args, kwargs):
                own = storage_key(t) in self.made_keys
                if what.changes_view:  # an alias is its own
                    own = id(t) not in self.captured and id(t) not in self.arguments
                if not own:
                    self.refuse(refusals.write_message(func, *self._whose(t)))
        if what.draws:
            self._draw(func, args, kwargs)
        if not _compat.in_backward():
            for t, key in zip(given, keys, strict=True):
                self._check_seen(func, t, key)
        out = func(*args, **kwargs)
        made = [*map(storage_key, (out,) if type(out) is Tensor else contents.tensors(out))]
        self.made_keys.update(set(made).difference(keys))
        self.note(out)
        return out

    def _check_seen(self, func: Any, t: Tensor, key: int) -> None:
        if key in self.made_keys or key in self.argument_keys:
            return
        if self._call is not None:
            seen = key in self._call
        else:
            # Outside any call of the Python API: TorchScript reads the captured tensor itself,
            # while leaving a torch.func transform reads views of what was seen before.
            seen = key in self.captured_keys and id(t) not in self.captured
        if not seen and (t.requires_grad or (self.constants and self.hoist(t))):
            named = self._named(t)
            message = (
                "expected every read of a captured tensor to go through PyTorch's Python API, "
                f"got {func} reading {named} below it, where it cannot be replaced. Pass that "
                "tensor as an argument, or detach it to declare it constant."
            )
            self.refuse(message)

    def _draw(self, func: Any, args: Any, kwargs: Any) -> None:
        if self.rng == "error":
            message = (
                f"expected a function without randomness (rng='error'), got {func} at {caller()}. "
                "Draw outside and capture the result, or choose rng='allow' or rng='replay'."
            )
            self.refuse(message)
        self.drew = self.drew or str(func)
        generator = kwargs.get("generator")
        if generator is None:
            generator = _generator_of(kwargs.get("device"), contents.tensors(args))
        if generator is not None and id(generator) not in self.generators:
            self.generators[id(generator)] = (generator, generator.get_state())

    def _whose(self, t: Tensor) -> tuple[str, str]:
        """What a tensor that is not the function's own is to it, and its name."""
        key = storage_key(t)
        argument = self.argument_keys.get(key)
        found = self.captured_keys.get(key, t) if argument is None else argument
        kind = "a captured tensor" if argument is None else "its argument"
        return kind, self._named(found)


class DispatchDiscovery(DispatchMode):  # type: ignore[no-untyped-call]
    """The dispatch mode, below autograd and torch.func."""

    def __init__(self, discovery: DiscoveryMode) -> None:
        super().__init__()
        self.discovery = discovery

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        discovery = self.discovery
        if discovery.looking or discovery.paused or not _compat.is_operator(func):
            return func(*args, **(kwargs or {}))
        with _compat.unseen():
            return self.discovery.on_dispatch(func, args, kwargs or {})


def _generator_of(device: Any, given: Iterable[Tensor]) -> torch.Generator | None:
    """The default generator that a draw without one uses, of a CUDA device; that of the CPU is
    always looked after."""
    device = device or next((t.device for t in given), None)
    device = torch.device(device or "cpu")
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
