"""What scipy is given as vectors of PyTorch, for `freevars._solvers.scipy_constraints`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from freevars._solvers import scipy_constraints
from freevars._solvers.scipy_constraints import Function
from freevars.torch._compat import pytree
from freevars.torch.scipy._scipy import as_tensor, refuse_derivatives

__all__ = ["as_functions", "as_sides"]


def as_sides(bounds: Any, x0: Any, name: str, *, pairs: bool = True) -> tuple[Any, Any]:
    """As `scipy_constraints.as_sides`."""
    return scipy_constraints.as_sides(bounds, x0, name, _Vectors(), pairs=pairs)


def as_functions(constraints: Any, name: str) -> tuple[Function | None, Function | None]:
    """As `scipy_constraints.as_functions`."""
    return scipy_constraints.as_functions(constraints, name, _Vectors())


class _Vectors:
    xp: Any = torch
    refuse_derivatives = staticmethod(refuse_derivatives)

    def size(self, x: Any) -> int:
        return sum(leaf.numel() for leaf in pytree.tree_leaves(x))

    def ravel(self, x: Any) -> Tensor:
        return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(x)])

    def like(self, vector: Any, x: Any) -> Any:
        leaves, tree = pytree.tree_flatten(x)
        parts = torch.split(self.array(vector, leaves[0]), [leaf.numel() for leaf in leaves])
        return pytree.tree_unflatten(
            [part.reshape(leaf.shape).to(leaf) for part, leaf in zip(parts, leaves, strict=True)],
            tree,
        )

    def array(self, a: Any, like: Tensor) -> Tensor:
        return as_tensor(a).to(like)

    def values(self, a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            return np.array([self.values(part) for part in a])
        if not isinstance(a, Tensor):
            return np.asarray(a)
        try:
            return np.array(a.tolist())
        except RuntimeError:  # of a batch that torch.func.vmap runs through at once
            return np.full(tuple(a.shape), np.nan)

    def is_array(self, x: Any) -> bool:
        return isinstance(x, Tensor)
