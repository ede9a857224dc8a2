# ruff: noqa: SLF001 (with `_hooks.py`, the only file of this host that reaches for private names)
"""Private and version-dependent names of PyTorch, each with its reason.

Not here: what has to be wrapped to be seen at all (`_hooks.py`).
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch._functorch.pyfunctorch
import torch.utils.checkpoint as _checkpoint
from torch import Tensor
from torch._C import _functorch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "CheckpointFunction",
    "DispatchMode",
    "addresses",
    "checkpointing",
    "compiling",
    "eagerly",
    "function_mode_count",
    "function_modes",
    "functorch_active",
    "has_hooks",
    "in_backward",
    "is_custom_function_node",
    "is_higher_order",
    "is_legacy_batched",
    "is_plain",
    "is_reentrant_checkpoint_node",
    "is_wrapped",
    "layers",
    "not_inference",
    "operator_body",
    "owns_memory",
    "parts",
    "pytree",
    "sharded_parameters",
    "storage_key",
    "tangents",
    "transform_level",
    "transforms_active",
    "unwrap",
    "versions",
    "without_ended",
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

_custom_function_call = torch._functorch.autograd_function.custom_function_call
_HigherOrder = torch._ops.HigherOrderOperator


def function_mode_count() -> int:
    """How many function modes are active on this thread."""
    return torch._C._len_torch_function_stack()


def function_modes() -> list[Any]:
    """The function modes that are active on this thread, the innermost first. The stack has no
    public reader."""
    n = function_mode_count()
    return [torch._C._get_function_stack_at(i) for i in range(n - 1, -1, -1)]


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that does not wrap its handler for the compiler, which would import it: under
    a watch nothing is compiled."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


# --- reading a tensor's insides -------------------------------------------------------------------


def is_wrapped(t: Tensor) -> bool:
    """Whether a torch.func transform wraps `t`."""
    return bool(_functorch.is_functorch_wrapped_tensor(t))


def is_plain(t: Tensor) -> bool:
    """Whether `t` is a tensor of PyTorch's own that no transform can have wrapped: most are."""
    # Asked at every operation of a watched run, so without calls of our own.
    return (
        type(t) in _PLAIN_TENSORS
        and _functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
        and t.layout is torch.strided
        and not _functorch.is_functorch_wrapped_tensor(t)
        and not _functorch.is_legacy_batchedtensor(t)
    )


_PLAIN_TENSORS = {Tensor, torch.nn.Parameter}


def is_grad_tracking(t: Tensor) -> bool:
    """Whether a torch.func transform that differentiates wraps `t`, directly."""
    return bool(_functorch.is_gradtrackingtensor(t))


def is_grads_batch(t: Tensor) -> bool:
    """Whether `torch.autograd.grad(is_grads_batched=True)` batches `t`, by the vmap before
    torch.func's, which no custom Function is told of."""
    return bool(_functorch.is_legacy_batchedtensor(t))


def transforms_active() -> bool:
    """Whether a torch.func transform or a forward-mode level is open on this thread."""
    return functorch_active() or torch.autograd.forward_ad._current_level >= 0


def functorch_active() -> bool:
    """Whether a torch.func transform is open on this thread."""
    return _functorch.maybe_current_level() is not None


def transform_level() -> int:
    """How many torch.func transforms are open on this thread."""
    return _functorch.maybe_current_level() or 0


def checkpointing() -> bool:
    """Whether a non-reentrant checkpoint is open on this thread: by its hooks for saved tensors."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == _checkpoint.__name__


def is_custom_function_node(node: object) -> bool:
    """Whether `node` of an autograd graph is that of a custom Function."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def is_reentrant_checkpoint_node(node: Any) -> bool:
    """Whether `node` is that of a reentrant checkpoint. The type of a custom Function's node knows
    its class; the node itself may name another (`_hooks.py`)."""
    kind: Any = type(node)
    return is_custom_function_node(node) and kind._forward_cls is CheckpointFunction


def has_hooks(t: Tensor) -> bool:
    """Whether a backward pass that reaches `t` runs hooks of the user's. They have no public
    reader."""
    return bool(t._backward_hooks)


def not_inference(t: Tensor) -> Tensor:
    """`t`, or a copy that a graph can save: tensors of inference mode cannot be saved."""
    return t.clone() if t.is_inference() else t


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor, or a view of its memory, was written to; a tensor of inference mode
    does not count. The counter has no public reader."""
    try:
        return [t._version for t in tensors]
    except RuntimeError:
        return [0 if t.is_inference() else t._version for t in tensors]


def unwrap(t: Tensor) -> Iterator[Tensor]:
    """`t`, then what each torch.func transform wrapped, down to the plain tensor."""
    yield t
    while is_wrapped(t):
        t = _functorch.get_unwrapped(t)
        yield t


def without_ended(t: Tensor) -> Tensor:
    """`t` without what torch.func transforms that are over wrapped around it: such a wrapper is not
    a place in the graph of what it wraps."""
    while is_wrapped(t):
        inner = _functorch.unwrap_if_dead(t)
        if inner is t:
            break
        t = inner
    return t


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


def is_legacy_batched(t: Tensor) -> bool:
    """Whether the old vmap behind `torch.autograd.functional.jacobian(strategy="forward-mode")`
    batches `t`: few operations know how to."""
    return bool(_functorch.is_legacy_batchedtensor(t))


def _tangent(t: Tensor) -> list[Tensor]:
    if is_legacy_batched(t):  # it takes no second tangent, and cannot be asked for one
        return []
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
        inside = [getattr(t, name) for name in flatten()[0]] if flatten is not None else []
        return [x for x in inside if isinstance(x, Tensor)]  # a DTensor lists its mesh too


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


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where the memory of each tensor begins; 0 where it has none of its own."""
    with unseen():  # our own look is no read
        try:
            return [t.data_ptr() for t in tensors]
        except RuntimeError:
            return [_address(t) for t in tensors]


def _address(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError:  # wrapped by a transform, or sparse
        return 0


def sharded_parameters(objects: Iterable[Any]) -> dict[int, tuple[Tensor, Tensor]]:
    """For the modules among `objects` that `fully_shard` has sharded: by the id of each gathered
    parameter, which the forward pass reads, that one and the parameter that the user knows. Nothing
    public leads from one to the other."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return {}
    found = {}
    for module in objects:
        if issubclass(type(module), fsdp.FSDPModule):  # isinstance may ask the object for its class
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # from 2.13 on
            for group in [state._fsdp_param_group] if groups is None else groups:
                for p in () if group is None else group.fsdp_params:
                    gathered = getattr(p, "_unsharded_param", None)
                    if gathered is not None:
                        found[id(gathered)] = (gathered, p.sharded_param)
    return found


def owns_memory(t: Tensor) -> bool:
    """Whether PyTorch allocated the memory of `t`, not NumPy or another library."""
    try:
        with torch._C.DisableTorchFunction():
            return bool(t.untyped_storage().resizable())
    except (NotImplementedError, RuntimeError):
        return True


def in_backward() -> bool:
    """Whether the autograd engine runs on this thread now."""
    return torch._C._current_autograd_node() is not None


def is_higher_order(func: object) -> bool:
    """Whether `func` is a higher-order operator (`torch.cond`), custom Functions excepted."""
    return isinstance(func, _HigherOrder) and func is not _custom_function_call


def is_custom_function_call(func: object) -> bool:
    """Whether `func` is how a custom Function arrives while a torch.func transform is open."""
    return func is _custom_function_call
