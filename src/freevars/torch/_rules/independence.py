"""Check that the problems of a batch are independent, as `batch_dims=` states.

Not here: what is done with a batch (`batch.py`, `dense.py`).
"""

import torch
from torch import Tensor

from freevars.errors import StructureError

__all__ = ["check_independent"]


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
