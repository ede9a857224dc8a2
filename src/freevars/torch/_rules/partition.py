"""A pytree as its tensors and the rest of it, and back."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from freevars.torch._compat import pytree

__all__ = ["Remainder", "partition"]


class _Tensor:
    def __repr__(self) -> str:
        return "a tensor"


_A_TENSOR = _Tensor()


class Remainder:
    """A pytree without its tensors, which it does not hold: `leaves` have a mark in their places,
    `where`."""

    def __init__(self, leaves: Sequence[Any], spec: Any) -> None:
        self.leaves = [_A_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.spec = spec
        self.where = [i for i, leaf in enumerate(self.leaves) if leaf is _A_TENSOR]
        self.count = len(self.where)

    def __repr__(self) -> str:
        return repr(pytree.tree_unflatten(self.leaves, self.spec))

    def combine(self, tensors: Sequence[Any]) -> Any:
        """The pytree with these tensors."""
        leaves = list(self.leaves)
        for i, t in zip(self.where, tensors, strict=True):
            leaves[i] = t
        return pytree.tree_unflatten(leaves, self.spec)


def partition(tree: Any) -> tuple[list[Tensor], Remainder]:
    """The tensors in a pytree, in order, and the rest of it."""
    leaves, spec = pytree.tree_flatten(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], Remainder(leaves, spec)
