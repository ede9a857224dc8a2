"""The caller's `.grad` while a solver runs.

A solver may call `.backward()`, also through tensors that it captures itself or whose optimizer it
holds. Their `.grad` belongs to the caller: it is saved before, and restored after. Not here: which
tensors these are (`inputs.py`), and those that `fun` captures, which the solver is given without
history (`implicit.py`).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from freevars.torch import _compat

__all__ = ["preserve_grad"]


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
