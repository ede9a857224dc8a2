"""The caller's `.grad` while a solver runs.

A solver may call `.backward()`, also through tensors that it captures itself or whose optimizer it
holds. Their `.grad` is the caller's: it is put aside before, and back after. Not here: the tensors
that `fun` captures, which the solver is given without history (`implicit.py`).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from freevars.torch import _compat, _hooks
from freevars.torch._convert.autograd_graph import leaves_behind
from freevars.torch._describe import Reachable

__all__ = ["caller_leaves", "preserve_grad"]


def caller_leaves(*reaching: object) -> list[Tensor]:
    """The tensors whose `.grad` a backward pass could change that runs through something the given
    objects can reach."""
    reachable = Reachable()
    reached = [t for x in reaching for t, _ in reachable.of(x)]
    found = [*reached, *map(_hooks.resolve, reached)]  # within a converted call, what that gives
    with _compat.unseen():
        plain = [t for t in found if not _compat.is_wrapped(t)]
        leaves = [t for t in plain if t.is_leaf or t.retains_grad]
        return list({id(t): t for t in (*leaves, *leaves_behind(plain))}.values())


@contextmanager
def preserve_grad(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Inside, each `.grad` is None; afterwards it is what it was, also where the solver fails."""
    with _compat.unseen():
        before = [(t, t.grad) for t in leaves]
        for t, _ in before:
            t.grad = None
    try:
        yield
    finally:
        with _compat.unseen():
            for t, grad in before:
                t.grad = grad
