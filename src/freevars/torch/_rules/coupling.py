"""Which unknowns the equations of one problem, or of one process, may depend on: their own.

The problems of a batch are independent, as `batch_dims=` states. And each process solves the system
of its own unknown: where a collective couples the unknowns of several, one system spans them, and
that of one process alone would give another derivative. It is the right one where they all have the
same unknown, which a program passes through a function that sums or averages over them backward.

Not here: what is done with a batch (`batch.py`, `dense.py`), and an unknown in parts, which each
process has whole (`sharded.py`).
"""

from typing import Any

import torch
from torch import Tensor

from freevars.errors import StructureError
from freevars.torch._convert.autograd_graph import nodes_behind
from freevars.torch._rules.sharded import communicates

__all__ = ["check_independent", "check_shared"]


def check_independent(leaf: Tensor, f: Tensor, name: str) -> None:
    """Refuses problems of a batch that depend on each other: the equations `f` of every second one
    may not move with the unknowns `leaf` of the others. `name` is that of the solver."""
    if len(f) == 1 or not f.requires_grad:
        return
    others = torch.ones_like(f)
    others[::2] = 0
    for u, first in ((others, 0), (1 - others, 1)):
        (product,) = torch.autograd.grad(f, leaf, u, retain_graph=True, materialize_grads=True)
        if bool(product[first::2].any()):
            message = (
                f"{name}: expected independent problems along the batch_dims axes, "
                "got equations of one that depend on the unknown of another (a mean over the "
                "batch, train-mode batch statistics). Leave batch_dims out: it is one problem."
            )
            raise StructureError(message)


def check_shared(at: Tensor, f: Tensor, name: str) -> None:
    """Refuses equations `f` that couple an unknown `at` with another one of another process; all
    processes take the same steps here. `name` is that of the solver."""
    if not communicates(f):
        return
    distributed: Any = torch.distributed
    if not _is_coupled(at, f, distributed.get_rank(), distributed.get_world_size()):
        return
    x = at.detach().double()
    weights = _weights(x)
    told = torch.stack([(weights * x).sum(), torch.full_like(x[0, 0], x.numel())])
    extremes = torch.cat([told, -told])
    for group in _groups_of(f):
        distributed.all_reduce(extremes, distributed.ReduceOp.MAX, group=group)
    spread = extremes[:2] + extremes[2:]
    scale = torch.stack([(weights * x.abs()).sum(), torch.zeros_like(told[1])])
    if bool((spread > torch.finfo(at.dtype).eps ** 0.5 * scale).any()):
        message = (
            f"{name}: expected equations that a collective couples over processes to be of one "
            "unknown that all of these have, got unknowns that differ between processes. The "
            "linear system of a derivative would span them. Make the unknown a DTensor, which is "
            "solved for as a whole, or give every process all of it."
        )
        raise NotImplementedError(message)


def _is_coupled(at: Tensor, f: Tensor, rank: int, processes: int) -> bool:
    """Whether the equations of another process move with this one's unknown. In each round about
    half of the processes ask about none of their own; every two are told apart in one."""
    coupled = False
    for bit in range((processes - 1).bit_length()):
        for asked in (0, 1):
            mine = (rank >> bit) % 2 == asked
            u = _weights(f) if mine else torch.zeros_like(f)
            (product,) = torch.autograd.grad(f, at, u, retain_graph=True, materialize_grads=True)
            coupled |= not mine and bool(product.any())
    return coupled


def _weights(like: Tensor) -> Tensor:
    """Positive numbers without a pattern, the same in every process."""
    k = torch.arange(like.numel(), dtype=torch.float64, device=like.device)
    return (1.5 + torch.sin(k * k)).reshape(like.shape).to(like.dtype)


def _groups_of(f: Tensor) -> list[Any]:
    """The processes of the first collective that says so, of each axis of its mesh; of `[None]`,
    all."""
    for node in nodes_behind([f]):
        for x in getattr(node, "__dict__", {}).values():
            if isinstance(x, torch.distributed.ProcessGroup):
                return [x]
            mesh = getattr(x, "device_mesh", x)
            if isinstance(mesh, torch.distributed.device_mesh.DeviceMesh):
                return [mesh.get_group(axis) for axis in range(mesh.ndim)]
    return [None]
