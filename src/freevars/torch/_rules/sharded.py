"""A DTensor as a whole tensor, the same in every process of its mesh, and back.

The vectors of a rule are whole: each process solves the same system, so that norms, products and
decisions are the same everywhere, and no process waits for one that has raised an error. The
arguments of `fun` and the solver's result keep their placements. Both directions are
differentiable.

Not here: the unknown as a vector (`ravel.py`).
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freevars.torch._compat import is_custom_function_node
from freevars.torch._convert.autograd_graph import nodes_behind

__all__ = ["Layout", "communicates", "layout_of", "no_gradient", "spread", "whole"]


class Layout(NamedTuple):
    """Where the parts of a DTensor are."""

    mesh: Any
    placements: tuple[Any, ...]


def layout_of(t: Any) -> Layout | None:
    """None for a plain tensor. A sum that is still to be taken is taken: it is replicated."""
    if not _is_sharded(t):
        return None
    replicate = _distributed().Replicate()
    placements = tuple(replicate if p.is_partial() else p for p in t.placements)
    return Layout(t.device_mesh, placements)


def whole(t: Any) -> Any:
    """`t` with all its parts; a plain tensor, or what is none, as it is."""
    return _Whole.apply(t, layout_of(t)) if _is_sharded(t) else t  # type: ignore[no-untyped-call]


def spread(t: Tensor, layout: Layout | None) -> Tensor:
    """A whole tensor in parts."""
    parts: Tensor = t if layout is None else _Spread.apply(t, layout)  # type: ignore[no-untyped-call]
    return parts


class _Whole(torch.autograd.Function):
    """With `_Spread` as its derivative, and the other way round: those of PyTorch 2.11 have none
    themselves, so that a part of a second derivative is lost."""

    @staticmethod
    def forward(ctx: Any, t: Any, layout: Layout) -> Tensor:
        ctx.layout = layout
        full: Tensor = t.full_tensor()
        return full

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return spread(g, ctx.layout), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, t: Tensor, layout: Layout) -> Tensor:
        module = _distributed()
        everywhere = [module.Replicate()] * layout.mesh.ndim
        replicated = module.DTensor.from_local(t, layout.mesh, everywhere, run_check=False)
        parts: Tensor = replicated.redistribute(placements=layout.placements)
        return parts

    @staticmethod
    def backward(_: Any, g: Any) -> Any:
        return whole(g), None


def no_gradient(f: Tensor) -> Tensor | None:
    """What to return from a backward pass for an `f` that gets none.

    PyTorch walks the graph of `f` all the same, and gives a plain tensor of zeros to each custom
    Function there. Those of DTensors fail on it: they get zeros of their own kind.
    """
    if _distributed() is None or not any(map(is_custom_function_node, nodes_behind([f]))):
        return None
    return torch.zeros_like(f)


def communicates(f: Tensor) -> bool:
    """Whether a backward pass from `f` may exchange tensors with other processes.

    `torch.autograd.grad(is_grads_batched=True)` does not wait until these have arrived, and returns
    whatever was in memory. Collectives are custom Functions, of Python or of C++.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return any(is_custom_function_node(n) or "CppNode" in n.name() for n in nodes_behind([f]))


def _is_sharded(t: Any) -> bool:
    module = _distributed()
    return module is not None and isinstance(t, module.DTensor)


def _distributed() -> Any:
    """The module of DTensors, if anybody has imported it: that takes a while."""
    return sys.modules.get("torch.distributed.tensor")
