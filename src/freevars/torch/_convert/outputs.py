"""What a function returned: its tensors, and what is refused since it hides some.

Not here: where its derivatives lead (`autograd_graph.py`).
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from torch import Tensor

from freevars.errors import CaptureError
from freevars.torch._compat import pytree
from freevars.torch._describe import describe, reachable

__all__ = ["outputs_of", "refuse_hidden", "refuse_late"]

# What a function may return before it has run: generators, `map`, coroutines.
_LATER = (Iterator, AsyncIterator, Awaitable)


def refuse_late(out: Any) -> None:
    """Refuses what has yet to run."""
    for leaf in () if isinstance(out, Tensor) else pytree.tree_leaves(out):
        if not isinstance(leaf, Tensor):
            _refuse_late(leaf)


def _refuse_late(leaf: Any) -> None:
    if isinstance(leaf, _LATER):
        message = (
            f"expected a function that has run when it returns, got a {type(leaf).__name__}, "
            "which reads its values later, where they cannot be replaced. Return a list, or "
            "run it inside."
        )
        raise CaptureError(message)


def refuse_hidden(out: Any, captured: Callable[[Tensor], bool], fun: Any) -> None:
    """Refuses captured tensors that `fun` returned inside an object that is no pytree."""
    for leaf in pytree.tree_leaves(out):
        if isinstance(leaf, Tensor | int | float | complex | str | bytes | type(None)):
            continue
        _refuse_late(leaf)
        for t, name in reachable(leaf).values():
            if captured(t):
                message = (
                    "expected captured tensors to be returned in containers that PyTorch's pytrees "
                    f"know, got {describe(t, fun)} inside a {type(leaf).__name__} (at {name}), "
                    "where it cannot be replaced. Return a tuple, list or dict, or register the "
                    "class."
                )
                raise CaptureError(message)


def outputs_of(out: Any) -> list[Tensor]:
    """The tensors that a function returned."""
    if isinstance(out, Tensor):
        return [out]
    return [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
