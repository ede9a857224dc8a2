# ruff: noqa: SLF001 (with `_compat`, this is all that reaches for private names)
"""Every function of PyTorch that is wrapped.

Function modes see the Python API of PyTorch, but not all of it. The gaps are closed here by
*stateless hooks*: wrappers around a few of PyTorch's own functions that look at the calling
thread's stack of function modes and do nothing unless one of ours (a `CaptureMode`) is on it. Their
only state is which custom Functions are running, so there is nothing to undo when a function fails,
and threads do not affect each other. `_selftest.py` tries each of them once, at first use. A hook
that a new release of PyTorch has broken is refused by name where a function needs it.

A first derivative of a rule needs none of them: it comes from a recorded graph. A conversion does,
including the one by which a rule finds what is captured:

- `Function.apply` (torch/autograd/function.py) calls C++ at once. What a custom Function is given,
  and what its backward reads (`_forward_cls.backward` in `BackwardCFunction.apply`, there too), is
  replaced here or not at all;
- `_checkpoint_without_reentrant_generator` (torch/utils/checkpoint.py) runs its function again in
  the backward pass, when the modes of the forward pass are gone;
- `_wrap_for_grad`, `_add_batch_dim` and their inverses (torch/_functorch/eager_transforms.py and
  vmap.py) are functions in C++ that take a captured tensor to another level;
- `_callback_from_stance` (torch/_dynamo/eval_frame.py) decides whether a function is compiled;
- the passes of `FSDPParamGroup` (torch/distributed/fsdp/_fully_shard) write to parameters.

Not here: the mode that the wrappers talk to (`_modes.py`).
"""

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.eager_transforms as _eager
import torch._functorch.vmap as _vmap
import torch.utils.checkpoint as _checkpoint
from torch import Tensor

from freevars.torch import _modes
from freevars.torch._compat import CheckpointFunction, keeping_nothing_for_one, unwrap
from freevars.torch._modes import CaptureMode, active

__all__ = [
    "HOOKS",
    "forwards_running",
    "hook_compiler",
    "install_hooks",
    "keep_watching_backward",
]

# The class whose `apply` is the entry in C++ for one level: that of the base class, which
# `Function.apply` calls last; of `Function` itself from PyTorch 2.14 on.
_OWNER: Any = torch.autograd.Function
if isinstance(_OWNER.__dict__.get("apply"), classmethod):  # written in Python
    _OWNER = torch.autograd.function._SingleLevelFunction


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
        # PyTorch compares these with the base class to find which ones the user has defined.
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

    Anything else that it reads has no derivative; but reentrant checkpointing runs its function
    again.
    """
    return [(cls, args) for cls, args in _forwards.running if cls is not CheckpointFunction]


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces the `apply` of custom Functions, which no function mode sees."""
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

    return hook


def _recomputed(raw: Callable[..., Any]) -> Callable[..., Any]:
    """For non-reentrant checkpointing, whose recomputation runs in the backward pass: without the
    watch it would save the captured tensors where the forward pass had saved the given ones, which
    gives a wrong gradient that no check in PyTorch catches. In what a rule records, see
    `for_many_passes`."""
    run = keeping_nothing_for_one(raw)

    @functools.wraps(raw)
    def hook(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for watch in active():
            fn = watch.resume(fn)
        return run(fn, *args, **kwargs)

    return hook


def _run_eagerly(raw: Callable[..., Any]) -> Callable[..., Any]:
    """For compiled callees: under a watch they run eagerly, and nothing is compiled or
    recompiled. With `fullgraph=True` the compiler counts what is, and raises for nothing."""
    count = getattr(torch._C._dynamo.eval_frame, "set_fullgraph_compiled_frame_count", None)

    @functools.wraps(raw)
    def hook(callback: Any) -> Any:
        if not active():
            return raw(callback)
        if count is not None:
            count(-1)  # is not counting
        return None

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


# Each wrapped function, by the names that it has had, and what its hook sees. Upstream:
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
    """For `fully_shard`; waits until something else has imported it. Upstream:
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
    """The compiler's hook waits until something else has imported the compiler, which is slow to
    import."""
    compiler: Any = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None:
        return
    raw = getattr(compiler, "_callback_from_stance", None)
    if raw is None:
        _modes.broken["compiled functions"] = (
            "torch._dynamo.eval_frame has no _callback_from_stance"
        )
    elif not hasattr(raw, "__freevars__"):
        compiler._callback_from_stance = _run_eagerly(raw)


_APPLY: Any = classmethod(_apply)
_OWNER.apply = _APPLY  # at once: a name like `double = Double.apply` keeps what it finds
