"""Which unknowns the equations of one problem, or of one process, may depend on: their own.

The problems of a batch are independent, as `batch_dims=` states. And each process solves the system
of its own unknown: where a collective couples the unknowns of several, one system spans them, and
that of one process alone would give another derivative. It is the right one where they all have the
same unknown and the same derivative by it: where the program passes x through a function that sums
or averages over them backward, or every process computes the same.

Products with A^T show that, by the exchanges of the equations themselves: neither who is coupled
need be known, nor do others take part. With weights w and a number c of each process, A^T (c w) is
c A^T w where all that are coupled with it have the same c.

Not here: what is done with a batch (`batch.py`, `dense.py`), and an unknown in parts, which each
process has whole (`sharded.py`).
"""

import torch
from torch import Tensor

from freevars.errors import StructureError
from freevars.torch._rules.sharded import communicates

__all__ = ["check_independent", "check_same_steps", "check_shared"]


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
    that are coupled take the same steps here. `name` is that of the solver."""
    if not communicates(f):
        return
    product = _pulled(at, f, 1)
    unknowns = _differs(at, f, product, at)
    derivatives = _differs(at, f, product, product)
    if _told_any(at, f, unknowns or derivatives):
        kind = "unknowns" if unknowns else "derivatives by it" if derivatives else "some"
        message = (
            f"{name}: expected equations that a collective couples over processes to be of one "
            "unknown that all of these have, and to have one derivative by it, got "
            f"{kind} that differ between processes. The linear system of a derivative would span "
            "them. Make the unknown a DTensor, which is solved for as a whole, or give every "
            "process all of it and let the function begin with the mean of x over the processes, "
            "by an all_reduce with a derivative: that averages backward what comes of x in each."
        )
        raise NotImplementedError(message)


def check_same_steps(at: Tensor, f: Tensor, b: Tensor, name: str) -> None:
    """Refuses right sides `b` that differ between processes that `f` couples: the steps of an
    iteration, which products with A couple too, would be different ones in each."""
    if not communicates(f):
        return
    if _told_any(at, f, _differs(at, f, _pulled(at, f, 1), b)):
        message = (
            f"{name}: expected the derivative of a loss that a collective couples over processes "
            "to be the same in all of these where its linear system is too large for a matrix, "
            "got one of its own in each. Take the mean of the result over the processes, by an "
            "all_reduce with a derivative, before anything else: that averages its gradient."
        )
        raise NotImplementedError(message)


def _pulled(at: Tensor, f: Tensor, c: Tensor | float) -> Tensor:
    """A^T (c w)."""
    u = (c * _weights(f)).to(f.dtype)
    (product,) = torch.autograd.grad(f, at, u, retain_graph=True, materialize_grads=True)
    return product.detach().double()


def _differs(at: Tensor, f: Tensor, product: Tensor, own: Tensor) -> bool:
    """Whether a tensor differs between this process and those coupled with it; `product` is
    A^T w."""
    own = own.detach().double()
    weights = _weights(own)
    c = (weights * own).sum()
    apart = (_pulled(at, f, c) - c * product).abs().max()
    least = torch.finfo(at.dtype).eps ** 0.5 * (weights * own.abs()).sum()
    return bool(apart > least * product.abs().max())


def _told_any(at: Tensor, f: Tensor, found: bool) -> bool:  # noqa: FBT001
    """Whether this process, or one that is coupled with it, has found something."""
    return bool((_pulled(at, f, float(found)).abs() > 0).any()) or found


def _weights(like: Tensor) -> Tensor:
    """Positive float64 numbers without a pattern, the same in every process."""
    k = torch.arange(like.numel(), dtype=torch.float64, device=like.device)
    return (1.5 + torch.sin(k * k)).reshape(like.shape)
