# ruff: noqa: SLF001 (the one file of this host that may reach for private names)
"""Every private touch point of PyTorch, in one file, each with its reason.

Function modes see the Python API of PyTorch, but not all of it. The gaps are closed here by
*stateless hooks*: wrappers around a few of PyTorch's own functions that look at the calling
thread's stack of function modes and do nothing unless one of ours (a `CaptureMode`) is on it. They
hold no state, so there is nothing to undo when a function fails, and threads do not see each other.
`self_test` tries each touch point and says which one a new release of PyTorch has broken.

Not here: what a watch does with what it sees (`discovery.py`, `substitution.py`).
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch._functorch.eager_transforms as _eager
import torch._functorch.pyfunctorch
import torch._functorch.vmap as _vmap
import torch.utils.checkpoint as _checkpoint
from torch import Tensor
from torch._C import _functorch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from freevars.errors import CaptureError

__all__ = [
    "CaptureMode",
    "CheckpointFunction",
    "DispatchMode",
    "active",
    "compiling",
    "eagerly",
    "functorch_active",
    "hook_compiler",
    "in_backward",
    "install_hooks",
    "is_higher_order",
    "is_wrapped",
    "layers",
    "operator_body",
    "parts",
    "pytree",
    "resolve",
    "self_test",
    "solver_running",
    "storage_key",
    "tangents",
    "transforms_active",
    "unwrap",
]

# The pytree module that torch.func itself uses. Its name is private; its functions are the
# documented way to make torch.func accept a class (`register_pytree_node`).
pytree = torch.utils._pytree

# `torch.compiler.disable` without the import of the compiler, which takes seconds.
eagerly: Any = getattr(torch, "_disable_dynamo")  # noqa: B009 (not exported, says the type checker)


def compiling() -> bool:
    """Whether `torch.compile` traces now, or would compile each function that is called next, as it
    does after a graph break inside a torch.func transform: our own modes must not be compiled."""
    return torch.compiler.is_compiling() or _compiler_callback() is not None


_compiler_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback

# Reentrant checkpointing, a custom Function: told apart because its backward runs `fun` once more.
CheckpointFunction = _checkpoint.CheckpointFunction

_CustomFunctionBase = (
    torch.autograd.function._SingleLevelFunction
)  # what `Function.apply` calls last
_custom_function_call = torch._functorch.autograd_function.custom_function_call
_HigherOrder = torch._ops.HigherOrderOperator


class CaptureMode(TorchFunctionMode):
    """A function mode that the hooks of this file talk to."""

    refused: CaptureError | None = None
    solvers: int = 0  # how many solvers of a rule run now: theirs may call `.backward()`

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
    return [mode for mode in stack if isinstance(mode, CaptureMode)]


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


# --- reading a tensor's insides -------------------------------------------------------------------


def is_wrapped(t: Tensor) -> bool:
    """Whether a torch.func transform wraps `t`."""
    return bool(_functorch.is_functorch_wrapped_tensor(t))


def transforms_active() -> bool:
    """Whether a torch.func transform or a forward-mode level is open on this thread."""
    return functorch_active() or torch.autograd.forward_ad._current_level >= 0


def functorch_active() -> bool:
    """Whether a torch.func transform is open on this thread."""
    return _functorch.maybe_current_level() is not None


def unwrap(t: Tensor) -> Iterator[Tensor]:
    """`t`, then what each torch.func transform wrapped, down to the plain tensor."""
    yield t
    while is_wrapped(t):
        t = _functorch.get_unwrapped(t)
        yield t


def layers(t: Tensor) -> list[tuple[str, bool | None]]:
    """The transformations that trace `t`, outermost first: the tape, then the torch.func transforms
    that wrap it, and whether each takes a derivative by it; None where that is not its business.

    A wrapper knows its level only; which transform that is, the stack of open transforms tells.
    """
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        stack = _functorch.get_interpreter_stack() or ()
        names = {entry.level(): entry.key().name.lower() for entry in stack}
        found: list[tuple[str, bool | None]] = []
        for u in unwrap(t):
            if not is_wrapped(u):
                if tangents(u):
                    found.append(("jvp", True))
                if u.requires_grad:
                    found.append(("autograd", True))
            elif _functorch.is_batchedtensor(u):
                found.append(("vmap", None))
            else:  # without its transform, which is over, it is called by the more common one
                name = names.get(_functorch.maybe_get_level(u), "grad")
                perturbed = _has_tangent(u) if name == "jvp" else bool(u.requires_grad)
                found.append((name, perturbed))
    return found[::-1]


def _has_tangent(t: Tensor) -> bool:
    """Whether a wrapper of `torch.func.jvp` carries a tangent; told for the innermost only."""
    stack = _functorch.get_interpreter_stack() or ()
    if not stack or _functorch.maybe_get_level(t) != stack[-1].level():
        return True
    return primal_and_tangent(t).tangent is not None


def tangents(t: Tensor) -> list[Tensor]:
    """The forward-mode tangents that `t` carries, at every open level. PyTorch tells those of the
    innermost torch.func transform only, so the transforms are left one by one."""
    if torch.autograd.forward_ad._current_level < 0:
        return []
    level = _functorch.maybe_current_level()
    if level is None:
        return [] if is_wrapped(t) else _tangent(t)  # wrapped by a transform that is over
    is_jvp = _functorch.peek_interpreter_stack().key() == _functorch.TransformType.Jvp
    found = _tangent(t) if is_jvp and _functorch.maybe_get_level(t) == level else []
    here = [(u, _functorch.maybe_get_level(u) == level) for u in (t, *found)]
    with _one_transform_less():
        for u, wrapped in here:
            found += tangents(_functorch.get_unwrapped(u) if wrapped else u)
    return found


def _tangent(t: Tensor) -> list[Tensor]:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        tangent = primal_and_tangent(t).tangent
    return [] if tangent is None else [tangent]


def parts(t: Tensor) -> list[Tensor]:
    """The tensors that a sparse tensor or a wrapper subclass is made of, read without being
    watched."""
    names: tuple[str, ...] = ()
    if t.layout is torch.sparse_coo:
        names = ("_values", "_indices")
    elif t.layout in {torch.sparse_csr, torch.sparse_bsr}:
        names = ("values", "crow_indices", "col_indices")
    elif t.layout in {torch.sparse_csc, torch.sparse_bsc}:
        names = ("values", "ccol_indices", "row_indices")
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        if names:
            return [getattr(t, name)() for name in names]
        flatten = getattr(t, "__tensor_flatten__", None)
        return [getattr(t, name) for name in flatten()[0]] if flatten is not None else []


_one_transform_less: Any = torch._functorch.pyfunctorch.temporarily_pop_interpreter_stack
primal_and_tangent: Any = torch.autograd.forward_ad.unpack_dual

# Forward mode is off while PyTorch calls a custom Function's `jvp`; this turns it on again.
forward_mode: Any = torch.autograd.forward_ad._set_fwd_grad_enabled

# Inside, no function mode takes notice: our own look is no read.
unseen: Any = torch._C.DisableTorchFunction


def is_operator(func: object) -> bool:
    """Whether `func`, as a dispatch mode sees it, is an operator with a schema."""
    return isinstance(func, torch._ops.OpOverload)


def overloads(func: Any) -> list[Any]:
    """The operators that calling `func` of `torch.ops` may mean; none for any other function."""
    if isinstance(func, torch._ops.OpOverloadPacket):
        names: list[str] = func.overloads()  # type: ignore[no-untyped-call]
        return [getattr(func, name) for name in names]
    return [func] if is_operator(func) else []


def operator_body(func: Any) -> Any:
    """The Python function that a custom operator (`torch.library.custom_op`) runs, or None: it runs
    below every mode. The registry of these operators is private."""
    defined = torch._library.custom_ops.OPDEFS
    found = (defined.get(schema(overload).name) for overload in overloads(func))
    return next((op._init_fn for op in found if op is not None), None)


def schema(func: Any) -> Any:
    """An operator's name and arguments, each with what it may write to."""
    return func._schema


def storage_key(t: Tensor) -> int:
    """A number that two live plain tensors share when they share memory."""
    try:
        with torch._C.DisableTorchFunction():  # our own look is no read
            return int(t.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without one storage
        inside = parts(t)
        return storage_key(inside[0]) if inside else id(t)


def in_backward() -> bool:
    """Whether the autograd engine runs on this thread now."""
    return torch._C._current_autograd_node() is not None


def is_higher_order(func: object) -> bool:
    """Whether `func` is a higher-order operator (`torch.cond`), custom Functions excepted."""
    return isinstance(func, _HigherOrder) and func is not _custom_function_call


def is_custom_function_call(func: object) -> bool:
    """Whether `func` is how a custom Function arrives while a torch.func transform is open."""
    return func is _custom_function_call


# --- the hooks ------------------------------------------------------------------------------------


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


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of `_SingleLevelFunction.apply`: no function mode sees a custom Function applied."""
    watches = active()
    for watch in watches:
        args = watch.custom_function(cls, args)
    tokens = [(watch, watch.begin(args)) for watch in watches]
    try:
        outputs = super(_CustomFunctionBase, cls).apply(*args, **kwargs)
    finally:
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


_HOOKS = (
    (_eager, "_wrap_for_grad", _seen),
    (_eager, "_unwrap_for_grad", _seen),
    (_vmap, "_add_batch_dim", _seen),
    (_vmap, "_remove_batch_dim", _seen),
    (_checkpoint, "_checkpoint_without_reentrant_generator", _recomputed),
)


def install_hooks() -> None:
    """Installs the hooks that are not installed yet."""
    if _CustomFunctionBase.__dict__.get("apply") is not _APPLY:
        _CustomFunctionBase.apply = _APPLY  # type: ignore[attr-defined]
        for module, name, hook in _HOOKS:
            setattr(module, name, hook(getattr(module, name)))
    hook_compiler()


def hook_compiler() -> None:
    """The compiler's hook waits until somebody else has imported the compiler, which is slow."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    raw = getattr(compiler, "_callback_from_stance", None)
    if raw is not None and not hasattr(raw, "__freevars__"):
        compiler._callback_from_stance = _run_eagerly(raw)  # type: ignore[union-attr]


_APPLY: Any = classmethod(_apply)


# --- the self-test --------------------------------------------------------------------------------


def self_test() -> list[str]:
    """Tries every touch point; returns a line for each that this release of PyTorch has broken."""
    from freevars.torch._selftest import broken  # noqa: PLC0415 (only when asked for)

    return broken()
