# ruff: noqa: SLF001 (with `_compat.py`, the only file of this host that reaches for private names)
"""Every function of PyTorch that is wrapped, and the mode that the wrappers talk to.

Function modes see the Python API of PyTorch, but not all of it. The gaps are closed here by
*stateless hooks*: wrappers around a few of PyTorch's own functions that look at the calling
thread's stack of function modes and do nothing unless one of ours (a `CaptureMode`) is on it. They
hold no state but which custom Functions run now, so there is nothing to undo when a function fails,
and threads do not see each other. `_selftest.py` tries each of them once, at first use. What a new
release of PyTorch has broken is refused by name where a function needs it.

Not here: what a mode does with what it sees (`discovery.py`, `substitution.py`).
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch._functorch.eager_transforms as _eager
import torch._functorch.vmap as _vmap
import torch.utils.checkpoint as _checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from freevars.errors import CaptureError
from freevars.torch._compat import (
    CheckpointFunction,
    checkpointing,
    compiling,
    transform_level,
    unwrap,
)

__all__ = [
    "HOOKS",
    "CaptureMode",
    "DispatchMode",
    "active",
    "broken",
    "broken_message",
    "forwards_running",
    "hook_compiler",
    "install_hooks",
    "keep_watching_backward",
    "resolve",
    "solver_running",
]

# The class whose `apply` is the entry in C++ for one level: that of the base class, which
# `Function.apply` calls last; of `Function` itself from PyTorch 2.14 on.
_OWNER: Any = torch.autograd.Function
if isinstance(_OWNER.__dict__.get("apply"), classmethod):  # written in Python
    _OWNER = torch.autograd.function._SingleLevelFunction

# What a release of PyTorch has broken, and how it shows; filled by the self-test.
broken: dict[str, str] = {}


def broken_message(point: str) -> str:
    """For whoever needs `point`."""
    return (
        f"expected a release of PyTorch in which freevars can see {point}, got "
        f"{torch.__version__}: {broken[point]}. Install a supported release (docs/pytorch.md "
        f"lists them), or leave {point} out of the function."
    )


# Without a hook, that something is used still shows, if later or less well.
_USED: dict[str, Callable[["CaptureMode"], bool]] = {
    "transforms of torch.func": lambda mode: transform_level() > mode.level,
    "checkpointing": lambda mode: checkpointing(),  # noqa: ARG005 (one signature)
    "compiled functions": lambda mode: compiling(),  # noqa: ARG005
}


class CaptureMode(TorchFunctionMode):
    """A function mode that the hooks of this file talk to."""

    refused: CaptureError | None = None
    paused: int = 0  # how many functions run now that are PyTorch's own business
    level: int = 0  # open transforms of torch.func when it was made
    solvers: int = 0  # how many solvers of a rule run now: theirs may call `.backward()`

    def refuse_broken(self) -> None:
        """Refuses what `fun` uses and a broken hook does not see."""
        for point, used in _USED.items():
            if point in broken and used(self):
                self.refuse(broken_message(point))

    def refuse(self, message: str) -> NoReturn:
        """Raises `CaptureError`, and remembers it: Python's operators turn a `TypeError` into
        'unsupported operand', and `fun` may catch it."""
        self.refused = CaptureError(message)
        raise self.refused

    @contextmanager
    def reraising_refusals(self) -> Iterator[None]:
        """Watches; what was refused inside is raised as itself."""
        try:
            with self:
                yield
        except Exception:
            if self.refused is not None:
                raise self.refused from None
            raise
        if self.refused is not None:
            raise self.refused

    def replace(self, value: Any) -> Any:
        """What `fun` shall get where it reads `value` (any nest of containers)."""
        raise NotImplementedError

    def is_foreign(self, t: Tensor) -> bool:
        """Whether `fun` did not make `t`."""
        raise NotImplementedError

    def given(self, t: Tensor) -> Tensor:
        """What stands for `t`; unlike `replace`, asking is no read."""
        return t

    def note(self, value: Any) -> None:
        """`value` was made while `fun` ran, on a road that function modes do not see."""

    def custom_function(self, cls: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments for the custom `autograd.Function` `cls`, before its forward runs."""
        raise NotImplementedError

    def begin(self, args: Sequence[Any]) -> Any:
        """An operation on `args` starts that function modes do not see; returns a token."""

    def end(self, token: Any) -> None:
        """That operation is over."""

    def resume(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """`fun`, run under this watch whenever it is called, also after the watch was left."""

        @functools.wraps(fun, updated=())
        def resumed(*args: Any, **kwargs: Any) -> Any:
            if self in active():
                return fun(*args, **kwargs)
            with self:
                return fun(*args, **kwargs)

        return resumed


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that does not wrap its handler for the compiler, which would import it: under
    a watch nothing is compiled."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def active() -> list[CaptureMode]:
    """The watches on this thread, the innermost first. The stack has no public reader."""
    n = torch._C._len_torch_function_stack()
    if not n:
        return []
    stack = (torch._C._get_function_stack_at(i) for i in range(n - 1, -1, -1))
    return [mode for mode in stack if isinstance(mode, CaptureMode) and not mode.paused]


@contextmanager
def solver_running() -> Iterator[None]:
    """A solver of a rule runs, on tensors without history: its `.backward()` reaches only its
    own."""
    watches = active()
    for watch in watches:
        watch.solvers += 1
    try:
        yield
    finally:
        for watch in watches:
            watch.solvers -= 1


def resolve(t: Tensor) -> Tensor:
    """What `t` stands for in the converted calls that run on this thread."""
    for watch in active():
        t = watch.given(t)
    return t


def keep_watching_backward(outputs: Any, watch: CaptureMode) -> None:
    """Runs the backward of the custom Function that made `outputs` under `watch`.

    The node of a custom Function looks up its class as an attribute of itself. An attribute of the
    instance shadows it, for this one node, which dies with the graph.
    """
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for output in outputs:
        if not isinstance(output, Tensor):
            continue
        for t in unwrap(output):
            node = t.grad_fn
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                node._forward_cls = _WatchedClass(node._forward_cls, watch)


class _WatchedClass:
    """A custom Function's class as its node uses it, with the user's code run under a watch."""

    def __init__(self, cls: Any, watch: CaptureMode) -> None:
        self._cls = cls
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._cls, name)
        # PyTorch compares with the base class to find out which of these a user has written.
        if name in {"backward", "vjp", "jvp"} and value is not getattr(
            torch.autograd.Function, name
        ):
            return self._watch.resume(value)
        return value


class _Forwards(threading.local):
    def __init__(self) -> None:
        self.running: list[tuple[Any, tuple[Any, ...]]] = []


_forwards = _Forwards()


def forwards_running() -> list[tuple[Any, tuple[Any, ...]]]:
    """The custom Functions whose forward runs on this thread, each with what it was given.

    What it reads besides has no derivative; but reentrant checkpointing runs its function again.
    """
    return [(cls, args) for cls, args in _forwards.running if cls is not CheckpointFunction]


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the `apply` of custom Functions, which no function mode sees."""
    watches = active()
    for watch in watches:
        args = watch.custom_function(cls, args)
    tokens = [(watch, watch.begin(args)) for watch in watches]
    running = _forwards.running
    running.append((cls, args))
    try:
        outputs = super(_OWNER, cls).apply(*args, **kwargs)
    finally:
        running.pop()
        for watch, token in tokens:
            watch.end(token)
    for watch in watches:
        watch.note(outputs)
        keep_watching_backward(outputs, watch)
    return outputs


def _seen(raw: Callable[..., Any]) -> Callable[..., Any]:
    """For the functions with which torch.func wraps and unwraps tensors: no function mode sees
    them."""

    @functools.wraps(raw)
    def hook(t: Any, *args: Any) -> Any:
        watches = active()
        if not watches:
            return raw(t, *args)
        for watch in watches:
            t = watch.replace(t)
        tokens = [(watch, watch.begin((t,))) for watch in watches]
        try:
            out = raw(t, *args)
        finally:
            for watch, token in tokens:
                watch.end(token)
        for watch in watches:
            watch.note(out)
        return out

    hook.__freevars__ = True  # type: ignore[attr-defined]
    return hook


def _recomputed(raw: Callable[..., Any]) -> Callable[..., Any]:
    """For non-reentrant checkpointing, whose recomputation runs in the backward pass: without the
    watch it would save the captured tensors where the forward pass had saved the given ones, a
    wrong gradient that no check of PyTorch catches."""

    @functools.wraps(raw)
    def hook(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for watch in active():
            fn = watch.resume(fn)
        return raw(fn, *args, **kwargs)

    hook.__freevars__ = True  # type: ignore[attr-defined]
    return hook


def _run_eagerly(raw: Callable[..., Any]) -> Callable[..., Any]:
    """For compiled callees: under a watch they run eagerly, and nothing is compiled or
    recompiled."""

    @functools.wraps(raw)
    def hook(callback: Any) -> Any:
        return None if active() else raw(callback)

    hook.__freevars__ = True  # type: ignore[attr-defined]
    return hook


def _unwatched(raw: Callable[..., Any]) -> Callable[..., Any]:
    """For what a sharded module does to its parameters before and after a pass: it gathers them in
    memory of its own, and its hooks on the graph scatter their gradients."""

    @functools.wraps(raw)
    def hook(*args: Any, **kwargs: Any) -> Any:
        watches = active()
        for watch in watches:
            watch.paused += 1
        try:
            return raw(*args, **kwargs)
        finally:
            for watch in watches:
                watch.paused -= 1

    hook.__freevars__ = True  # type: ignore[attr-defined]
    return hook


# Each wrapped function, by the names that it has had, and what is seen by it. Upstream:
# torch/_functorch/eager_transforms.py, torch/_functorch/vmap.py, torch/utils/checkpoint.py.
HOOKS: tuple[tuple[Any, tuple[str, ...], Callable[..., Any], str], ...] = (
    (_eager, ("_wrap_for_grad",), _seen, "transforms of torch.func"),
    (_eager, ("_unwrap_for_grad",), _seen, "transforms of torch.func"),
    (_vmap, ("_add_batch_dim",), _seen, "transforms of torch.func"),
    (_vmap, ("_remove_batch_dim",), _seen, "transforms of torch.func"),
    (
        _checkpoint,
        (
            "_checkpoint_without_reentrant_generator_impl",  # from 2.14 on
            "_checkpoint_without_reentrant_generator",
        ),
        _recomputed,
        "checkpointing",
    ),
)


_state = {"installed": False}


def install_hooks() -> None:
    """Installs the hooks that are not installed yet."""
    if not _state["installed"]:
        _state["installed"] = True
        for module, names, hook, _ in HOOKS:
            name = next((name for name in names if hasattr(module, name)), None)
            if name is not None:
                setattr(module, name, hook(getattr(module, name)))
    hook_compiler()
    hook_sharding()


def hook_sharding() -> None:
    """For `fully_shard`; waits until somebody else has imported it. Upstream:
    torch/distributed/fsdp/_fully_shard, _fsdp_param_group.py and _fsdp_state.py."""
    package = "torch.distributed.fsdp._fully_shard"
    groups: Any = sys.modules.get(f"{package}._fsdp_param_group")
    states: Any = sys.modules.get(f"{package}._fsdp_state")
    if states is None or hasattr(groups.FSDPParamGroup.pre_forward, "__freevars__"):
        return
    for name in ("pre_forward", "post_forward", "pre_backward", "post_backward"):
        setattr(groups.FSDPParamGroup, name, _unwatched(getattr(groups.FSDPParamGroup, name)))
    state = states.FSDPState
    state._register_pre_backward_hook = _unwatched(state._register_pre_backward_hook)


def hook_compiler() -> None:
    """The compiler's hook waits until somebody else has imported the compiler, which is slow."""
    compiler: Any = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None:
        return
    raw = getattr(compiler, "_callback_from_stance", None)
    if raw is None:
        broken["compiled functions"] = "torch._dynamo.eval_frame has no _callback_from_stance"
    elif not hasattr(raw, "__freevars__"):
        compiler._callback_from_stance = _run_eagerly(raw)


_APPLY: Any = classmethod(_apply)
_OWNER.apply = _APPLY  # at once: a name like `double = Double.apply` keeps what it finds
