# ruff: noqa: SLF001 (with `_hooks.py`, `_compat` is all that reaches for private names)
"""Where a tensor's data are in memory, and how often they were written to."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from freevars.torch._compat.running import unseen

__all__ = [
    "addresses",
    "not_inference",
    "owns_memory",
    "parts",
    "sharded_parameters",
    "storage_key",
    "versions",
]


def not_inference(t: Tensor) -> Tensor:
    """`t`, or a copy that a graph can save: tensors of inference mode cannot be saved."""
    if not t.is_inference():
        return t
    with torch.inference_mode(mode=False):  # it may be on
        return t.clone()


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor, or a view of its memory, was written to; a tensor of inference mode
    does not count. The counter has no public reader."""
    try:
        return [t._version for t in tensors]
    except RuntimeError:
        return [0 if t.is_inference() else t._version for t in tensors]


def parts(t: Tensor) -> list[Tensor]:
    """The tensors of which a sparse tensor or a wrapper subclass consists, read without being
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


def owns_memory(t: Tensor) -> bool:
    """Whether PyTorch allocated the memory of `t`, not NumPy or another library."""
    try:
        with torch._C.DisableTorchFunction():
            return bool(t.untyped_storage().resizable())
    except (NotImplementedError, RuntimeError):
        return True


def sharded_parameters(objects: Iterable[Any]) -> dict[int, tuple[Tensor, Tensor]]:
    """For the modules among `objects` that `fully_shard` has sharded: by the id of each gathered
    parameter, which the forward pass reads, it and the user's own parameter. No public name leads
    from one to the other."""
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
