"""What the functions of PyTorch's Python API mean to a watch: which read only metadata, which
write, which must not be called inside `fun` at all. Tables and small questions; no state.
"""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freevars.torch import _compat, _hooks
from freevars.torch._compat import is_wrapped, overloads, parts, schema, unwrap
from freevars.torch._compat import tangents as tangents_of
from freevars.torch._describe import caller, describe, function_name, line_of_caller, reachable
from freevars.torch._hooks import CaptureMode

__all__ = [
    "BACKWARD",
    "BATCH_STATISTICS",
    "CHANGES",
    "METADATA",
    "PLAIN",
    "REQUIRES_GRAD",
    "alias",
    "backward_message",
    "callables",
    "change_message",
    "changes_requires_grad",
    "given_tensors",
    "higher_order_message",
    "inner",
    "is_builtin",
    "is_factory",
    "may_carry_derivative",
    "operator_body",
    "refuse_reads_of_operator",
    "refuse_running_statistics",
    "resumed",
    "tensors",
    "traits",
    "write_message",
    "writes_first",
    "writes_metadata",
    "written",
    "written_by_call",
]

Func = Callable[..., Any]
# The types of arguments that hold no tensor, or are one: the hot path looks no further.
_PLAIN = (Tensor, torch.nn.Parameter, int, float, bool, complex, str, type(None), type(...))
PLAIN = frozenset({*_PLAIN, torch.Size, torch.dtype, torch.device, torch.layout})


def _getters(*names: str) -> set[Func]:
    return {getattr(Tensor, name).__get__ for name in names if hasattr(Tensor, name)}


# Reading these is no capture. `grad` and `is_leaf` stay those of the user's own tensor.
METADATA: frozenset[Func] = frozenset(
    _getters(
        *(
            "shape",
            "dtype",
            "device",
            "layout",
            "ndim",
            "grad",
            "_grad",
            "grad_fn",
            "is_leaf",
            "names",
        ),
        *(
            "_base",
            "_version",
            "is_sparse",
            "is_sparse_csr",
            "is_quantized",
            "is_meta",
            "is_nested",
        ),
        *("is_cpu", "is_cuda", "is_xpu", "is_mps", "is_mkldnn", "itemsize", "nbytes", "output_nr"),
        *("_backward_hooks", "retains_grad", "_is_view", "name", "requires_grad"),
    )
    | {
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.stride),
        *(Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed),
        *(Tensor.is_contiguous, Tensor.storage_offset, Tensor.data_ptr, Tensor.get_device),
        *(Tensor.is_conj, Tensor.is_neg, Tensor.is_inference, Tensor.__len__, Tensor.__hash__),
        *(Tensor.is_same_size, Tensor.retain_grad),
        *(torch.is_floating_point, torch.is_complex, torch.numel, torch.is_signed),
        *(torch.is_same_size, torch.is_inference, torch.is_conj, torch.is_neg),
    }
)

# Answered for the given tensor: a library decides by it what to differentiate.
REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
METADATA -= {REQUIRES_GRAD}

MAKES_LEAF = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__set__})  # type: ignore[attr-defined]
# These change a tensor itself, not its memory: no dispatch mode tells of them.
CHANGES = frozenset(
    {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
    | {Tensor.grad.__set__, Tensor.data.__set__}  # type: ignore[attr-defined,union-attr]
)
BACKWARD = frozenset({Tensor.backward, torch.autograd.backward})
BATCH_STATISTICS = frozenset(
    getattr(module, name)
    for module in (torch, torch.nn.functional)
    for name in (
        "batch_norm",
        "instance_norm",
        "native_batch_norm",
        "cudnn_batch_norm",
        "miopen_batch_norm",
    )
    if hasattr(module, name)
)
_SHARING = frozenset(
    {
        torch.from_numpy,
        torch.frombuffer,
        torch.as_tensor,
        torch.asarray,
        torch.utils.dlpack.from_dlpack,
    }
)


def is_factory(func: Func) -> bool:
    """Whether `func`, called without tensors, makes memory of its own."""
    return func not in _SHARING


@functools.lru_cache(maxsize=4096)
def _writes(name: str) -> bool:
    if name in {"__setitem__", "__delitem__"}:
        return True
    if name.startswith("__i") and name.endswith("__"):
        return name not in {"__int__", "__index__", "__invert__", "__iter__"}
    return name.endswith("_") and not name.endswith("__") and not name.startswith("_foreach_norm")


def writes_first(func: Func) -> bool:
    """Whether `func` writes to its first argument."""
    if func in MAKES_LEAF:
        return False
    name = getattr(func, "__name__", "") or ""
    return name == "__set__" or _writes(name) or func in CHANGES


class Traits(NamedTuple):
    """What an operator does, by its schema and tags; asked once for each operator."""

    writes: tuple[tuple[int, str], ...]  # position and name of the arguments that it writes to
    normalises: bool  # a batch norm, which writes to running statistics and declares no mutation
    changes_view: bool  # it writes metadata, not memory
    draws: bool


@functools.lru_cache(maxsize=8192)
def traits(func: Any) -> Traits:
    found = []
    for i, argument in enumerate(schema(func).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append((i, argument.name))
    name = schema(func).name
    return Traits(
        tuple(found),
        "batch_norm" in name and "backward" not in name,
        torch.Tag.inplace_view in func.tags,
        torch.Tag.nondeterministic_seeded in func.tags,
    )


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operator is about to write to."""
    what = traits(func)
    for i, name in what.writes:
        yield from tensors(args[i] if i < len(args) else kwargs.get(name))
    if what.normalises:
        names = [argument.name for argument in schema(func).arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("training", given.get("train")):
            yield from tensors((given.get("running_mean"), given.get("running_var")))


def written_by_call(func: Func, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that a function of the Python API is about to write to."""
    for overload in overloads(func):  # of `torch.ops`
        yield from written(overload, args, kwargs)
    if writes_first(func) or kwargs.get("inplace"):
        yield from tensors(args[:1])
    if kwargs.get("max_norm") is not None:  # an embedding renormalises its weights in place
        yield from tensors(args[1:2])
    yield from tensors(kwargs.get("out"))


_METADATA_WRITES = frozenset(
    {"__set__", "detach_", "rename_", "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_"}
    | {"swapdims_", "as_strided_", "share_memory_"}
    | {"register_hook", "register_post_accumulate_grad_hook"}
)


def writes_metadata(func: Func) -> bool:
    """Whether what `func` writes is no memory, so that an alias of a captured tensor may be."""
    return getattr(func, "__name__", "") in _METADATA_WRITES


def changes_requires_grad(t: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `t.requires_grad_(*args, **kwargs)`, or setting it to `args[0]`, would change `t`."""
    return t.requires_grad != bool(args[0] if args else kwargs.get("requires_grad", True))


def change_message(func: Func, t: Tensor, fun: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__set__":  # of `t.grad`, say
        name = f"setting .{getattr(getattr(func, '__self__', None), '__name__', 'an attribute')}"
    return (
        f"expected a function that leaves its captured values as they are, got {name} on "
        f"{describe(t, fun, line_of_caller())}. Nothing was written. Use t.detach(), which is "
        "another tensor."
    )


def is_builtin(func: Func) -> bool:
    """Whether `func` is one of PyTorch's own, written in C++."""
    if type(func) is types.BuiltinFunctionType:
        return isinstance(func.__self__, types.ModuleType | type)
    return type(func) in {types.MethodDescriptorType, types.WrapperDescriptorType}


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in any nest of the built-in containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | set):
        for x in value:
            yield from tensors(x)
    elif isinstance(value, dict):
        for x in value.values():
            yield from tensors(x)
    elif isinstance(value, slice):
        yield from tensors((value.start, value.stop, value.step))


def given_tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """The same for the arguments of one call, which mostly hold tensors and plain values."""
    found: list[Tensor] = []
    for x in args:
        if isinstance(x, Tensor):
            found.append(x)
        elif type(x) not in PLAIN:
            found.extend(tensors(x))
    if kwargs:
        found.extend(tensors(kwargs))
    return found


def inner(t: Tensor) -> list[Tensor]:
    """Every plain tensor that reading `t` may read: under transforms, tangents, parts of
    subclasses."""
    found: list[Tensor] = []
    for u in unwrap(t):
        found.append(u)
        if u.layout is not torch.strided or hasattr(u, "__tensor_flatten__"):
            found.extend(part for x in parts(u) for part in inner(x))
    found.extend(u for tangent in tangents_of(t) for u in unwrap(tangent))
    return found


def may_carry_derivative(t: Tensor) -> bool:
    """Whether a derivative could flow into `t` now: the default of what is hoisted."""
    return t.requires_grad or is_wrapped(t) or bool(tangents_of(t))


def alias(t: Tensor) -> Tensor:
    """`t` under another identity and with a place of its own on the tape, derivative one."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        if t.is_inference() or t.layout is not torch.strided or t.is_nested:
            return torch.ops.aten.alias(t) if t.layout is torch.strided else t.clone()
        return t.view_as(t)


def refuse_running_statistics(watch: CaptureMode, func: Func, args: Any, kwargs: Any) -> None:
    """Refuses a train-mode normalisation over foreign running statistics: it writes to them, and
    PyTorch declares no mutation."""
    names = ("input", "weight", "bias", "running_mean", "running_var", "training")
    if getattr(func, "__module__", "") == "torch.nn.functional":
        names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    given = dict(zip(names, args, strict=False)) | kwargs
    default = func is torch.nn.functional.instance_norm
    mean = given.get("running_mean")
    training = given.get("training", given.get("use_input_stats", default))
    if not (training and isinstance(mean, Tensor) and watch.is_foreign(mean)):
        return
    message = (
        "expected a function that leaves its captured values as they are, got a train-mode "
        f"{getattr(func, '__name__', func)} that updates captured running statistics in place. "
        f"{STATISTICS}"
    )
    watch.refuse(message)


# What to do with a module that writes to its buffers.
STATISTICS = (
    "Put a module that keeps statistics into eval mode (module.eval()); a batch norm may also take "
    "those of the batch and keep none (module.track_running_stats = False)."
)


def write_message(func: Any, whose: str, named: str) -> str:
    """For a write in place to the tensor `named`."""
    return (
        f"expected a function that writes to its own intermediates only, got {func} writing in "
        f"place to {whose}: {named}. Nothing was written. Write to a clone. {STATISTICS}"
    )


def callables(value: Any) -> Iterator[Any]:
    """The functions in any nest of the built-in containers."""
    if isinstance(value, tuple | list):
        for x in value:
            yield from callables(x)
    elif isinstance(value, dict):
        yield from callables(list(value.values()))
    elif _runs_python(value):
        yield value


def _runs_python(value: Any) -> bool:
    """Whether calling `value` runs code of Python's, which may read what it captures. PyTorch's own
    callable objects (a reduction of torch.distributed) are asked for by their very type."""
    kind = type(value)
    if kind in {types.FunctionType, types.MethodType, functools.partial}:
        return True
    if isinstance(value, Tensor | type):
        return False
    return type(getattr(kind, "__call__", None)) is types.FunctionType  # noqa: B004 (its type)


def resumed(watch: CaptureMode, value: Any) -> Any:
    """`value` with the functions in it run under `watch`, also after the watch was left."""
    if type(value) is tuple:
        return tuple(resumed(watch, x) for x in value)
    if type(value) is dict:
        return {k: resumed(watch, x) for k, x in value.items()}
    if type(value) is list or not any(x is value for x in callables(value)):
        return value
    return watch.resume(value)


def backward_message(fun: Any) -> str:
    return (
        f"expected a function that returns its result, got {function_name(fun)!r} "
        f"calling .backward() at {caller()}, which adds to the .grad of captured tensors. "
        "Use torch.autograd.grad."
    )


def higher_order_message(func: Any, fun: Any) -> str:
    return (
        f"expected operations of PyTorch's Python API, got the higher-order operator {func} at "
        f"{caller()} in {function_name(fun)!r}: what its branches read cannot be replaced. "
        "Use Python's own if, for, while."
    )


def operator_body(watch: CaptureMode, func: Any) -> Any:
    """The Python function of a custom operator, or None."""
    point = "custom operators"
    if point not in _hooks.broken:
        return _compat.operator_body(func)
    names = (_compat.schema(overload).name for overload in overloads(func))
    if any(not name.startswith(("aten::", "prims::")) for name in names):
        watch.refuse(_hooks.broken_message(point))
    return None


def refuse_reads_of_operator(
    watch: CaptureMode, func: Any, body: Any, matters: Callable[[Tensor], bool], fun: Any
) -> None:
    """Refuses a custom operator whose own function can reach a tensor that matters."""
    for t, _ in reachable(body).values():
        if matters(t):
            message = (
                "expected every read of a captured tensor to go through PyTorch's Python API, got "
                f"the custom operator {func} at {caller()} in {function_name(fun)!r}, whose "
                f"function can read {describe(t, body)}. "
                "Pass that tensor to the operator as an argument."
            )
            watch.refuse(message)


def is_python(func: Func) -> bool:
    """Whether `func` is written in Python, so may call functions that it was given."""
    return type(func) is types.FunctionType
