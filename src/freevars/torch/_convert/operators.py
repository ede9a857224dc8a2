"""What the functions of PyTorch's Python API mean to a watch: which read only metadata, which
write, which must not be called inside `fun` at all. Tables and small questions; no state.
"""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freevars.torch._compat import is_wrapped, overloads, schema
from freevars.torch._compat import tangents as tangents_of
from freevars.torch._convert import contents

__all__ = [
    "BACKWARD",
    "BATCH_STATISTICS",
    "CHANGES",
    "METADATA",
    "REQUIRES_GRAD",
    "alias",
    "changes_requires_grad",
    "is_builtin",
    "is_factory",
    "is_plain_call",
    "is_pytorch_python",
    "may_carry_derivative",
    "plain_calls",
    "traits",
    "writes_first",
    "writes_metadata",
    "written",
    "written_by_call",
]

Func = Callable[..., Any]


_GETTERS = """
    shape dtype device layout ndim grad _grad grad_fn is_leaf names _base _version is_sparse
    is_sparse_csr is_quantized is_meta is_nested is_cpu is_cuda is_xpu is_mps is_mkldnn itemsize
    nbytes output_nr _backward_hooks retains_grad _is_view name
"""

# Reading these is no capture. `grad` and `is_leaf` stay those of the user's own tensor.
METADATA: frozenset[Func] = frozenset(
    {getattr(Tensor, name).__get__ for name in _GETTERS.split() if hasattr(Tensor, name)}
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

MAKES_LEAF = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__set__})  # type: ignore[attr-defined]
# These change a tensor itself, not its memory: no dispatch mode tells of them.
CHANGES = frozenset(
    {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
    | {Tensor.grad.__set__, Tensor.data.__set__}  # type: ignore[attr-defined,union-attr]
)
BACKWARD = frozenset({Tensor.backward, torch.autograd.backward})
_NORMS = "batch_norm instance_norm native_batch_norm cudnn_batch_norm miopen_batch_norm"
BATCH_STATISTICS = frozenset(
    getattr(module, name)
    for module in (torch, torch.nn.functional)
    for name in _NORMS.split()
    if hasattr(module, name)
)
_SHARING = frozenset(
    {
        *(torch.from_numpy, torch.frombuffer, torch.as_tensor, torch.asarray),
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


# What `torch.distributed` and its functional collectives call.
_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})


class Traits(NamedTuple):
    """What an operator does, by its schema and tags; asked once for each operator."""

    writes: tuple[tuple[int, str], ...]  # position and name of the arguments that it writes to
    normalises: bool  # a batch norm, which writes to running statistics and declares no mutation
    changes_view: bool  # it writes metadata, not memory
    draws: bool
    communicates: bool  # with other processes


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
        func.namespace in _COLLECTIVES,
    )


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operator is about to write to."""
    what = traits(func)
    for i, name in what.writes:
        yield from contents.tensors(args[i] if i < len(args) else kwargs.get(name))
    if what.normalises:
        names = [argument.name for argument in schema(func).arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("training", given.get("train")):
            yield from contents.tensors((given.get("running_mean"), given.get("running_var")))


def written_by_call(func: Func, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that a function of the Python API is about to write to."""
    for overload in overloads(func):  # of `torch.ops`
        yield from written(overload, args, kwargs)
    if writes_first(func) or kwargs.get("inplace"):
        yield from contents.tensors(args[:1])
    if kwargs.get("max_norm") is not None:  # an embedding renormalises its weights in place
        yield from contents.tensors(args[1:2])
    yield from contents.tensors(kwargs.get("out"))


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


def is_builtin(func: Func) -> bool:
    """Whether `func` is one of PyTorch's own, written in C++."""
    if type(func) is types.BuiltinFunctionType:
        # Those of `torch` itself are static methods, which belong to nothing.
        return func.__self__ is None or isinstance(func.__self__, types.ModuleType | type)
    return type(func) in {types.MethodDescriptorType, types.WrapperDescriptorType}


# What `is_plain_call` has found; it only grows, and only by PyTorch's own functions.
plain_calls: set[Func] = set()


def is_plain_call(func: Func) -> bool:
    """Whether `func` is one of PyTorch's own, written in C++, whose arguments alone matter."""
    if func in plain_calls:
        return True
    special = func in METADATA or func == REQUIRES_GRAD or func in BATCH_STATISTICS
    if special or func in MAKES_LEAF or writes_first(func) or not is_builtin(func):
        return False
    plain_calls.add(func)
    return True


def may_carry_derivative(t: Tensor) -> bool:
    """Whether a derivative could flow into `t` now: the default of what is hoisted."""
    return t.requires_grad or is_wrapped(t) or bool(tangents_of(t))


def alias(t: Tensor) -> Tensor:
    """`t` under another identity and with a place of its own on the tape, derivative one."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _alias(t)
    with torch.inference_mode(mode=False), torch.enable_grad():
        return _alias(t)


def _alias(t: Tensor) -> Tensor:
    if t.is_inference() or t.layout is not torch.strided or t.is_nested:
        return torch.ops.aten.alias(t) if t.layout is torch.strided else t.clone()
    return t[...]  # unlike a view, it lets sparse gradients through


def is_pytorch_python(func: Func) -> bool:
    """Whether `func` is one of PyTorch's own, written in Python."""
    module = getattr(func, "__module__", None) or ""
    return is_python(func) and module.partition(".")[0] == "torch"


def is_python(func: Func) -> bool:
    """Whether `func` is written in Python, so may call functions that it was given."""
    return type(func) is types.FunctionType
