# ruff: noqa: SLF001 (with `_hooks.py`, `_compat` is all that reaches for private names)
"""What transforms wrap around a tensor, and the tangents that it carries."""

from collections.abc import Iterator
from typing import Any

import torch
import torch._functorch.pyfunctorch
from torch import Tensor
from torch._C import _functorch

__all__ = [
    "innermost",
    "is_grad_tracking",
    "is_legacy_batched",
    "is_plain",
    "is_wrapped",
    "layers",
    "primal_and_tangent",
    "tangents",
    "unwrap",
    "without_ended",
]


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


def is_legacy_batched(t: Tensor) -> bool:
    """Whether the vmap before torch.func's batches `t`: that of `is_grads_batched=True` and of
    `torch.autograd.functional.jacobian(strategy="forward-mode")`. Few operations support it, and
    custom Functions are not notified."""
    return bool(_functorch.is_legacy_batchedtensor(t))


def unwrap(t: Tensor) -> Iterator[Tensor]:
    """`t`, then what each torch.func transform wrapped, down to the plain tensor."""
    yield t
    while is_wrapped(t):
        t = _functorch.get_unwrapped(t)
        yield t


def innermost(t: Tensor) -> Tensor:
    """The plain tensor."""
    *_, plain = unwrap(t)
    return plain


def without_ended(t: Tensor) -> Tensor:
    """`t` without the wrappers of torch.func transforms that have ended: such a wrapper is not part
    of the graph of what it wraps."""
    while is_wrapped(t):
        inner = _functorch.unwrap_if_dead(t)
        if inner is t:
            break
        t = inner
    return t


def layers(t: Tensor) -> list[tuple[str, bool | None]]:
    """The transformations that trace `t`, outermost first: the tape, then the torch.func transforms
    that wrap it, and whether each differentiates with respect to it; None where it does not
    differentiate.

    A wrapper knows only its level; the stack of open transforms has the transform.
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
    """The forward-mode tangents that `t` carries, at every open level. PyTorch gives only those of
    the innermost torch.func transform, so the transforms are left one by one."""
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
    if is_legacy_batched(t):  # it takes no second tangent, and cannot be asked for one
        return []
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        tangent = primal_and_tangent(t).tangent
    return [] if tangent is None else [tangent]


_one_transform_less: Any = torch._functorch.pyfunctorch.temporarily_pop_interpreter_stack

primal_and_tangent: Any = torch.autograd.forward_ad.unpack_dual
