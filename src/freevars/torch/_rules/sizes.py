"""How large the components of a solution are: what a Newton step is measured against.

Not here: the measure itself (`dense.py`, `iterative.py`), and which component counts by which of
its sizes (`closer.py`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["PARTS", "Sizes"]

# Of x; so far F is straight where Newton's method works. One number alone may round well by chance.
PARTS = (1 / 16, 1 / 11, 1 / 7)


class Sizes(NamedTuple):
    """Of each component of an unknown, Float[Tensor, "problems n"]."""

    x: Tensor
    near: Tensor  # how large it is
    far: Tensor  # or how far the solver came with it, the larger
    # the same of the tensor that it belongs to, in given units (None: as it is)
    by_leaf: Callable[[Tensor | None], tuple[Tensor, Tensor]]
    nearby: Callable[[], Sequence[Tensor]]  # F at x - h for each of `PARTS`, where it is known
