"""What `vmap` does with a call of a host solver: one by one, or as its own rule says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import tree_util

__all__ = ["batched_by", "broadcast", "on_batch_of_one"]


def on_batch_of_one(query: Any) -> Any:
    def asked(kind: str, v: Any, d: Any = None) -> Any:
        return tuple(np.asarray(a)[None] for a in query(kind, v[0], None if d is None else d[0]))

    return asked


def batched_by(rule: Callable[..., Any] | None, fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun`, with `rule(size, batched, *args)` for what it gives on a batch; None: one by one."""
    whole: Any = jax.custom_batching.custom_vmap(fun)

    def one_by_one(size: int, batched: Any, *args: Any) -> Any:
        del size
        return _one_by_one(whole, batched, args)

    def batch(size: int, batched: Any, *args: Any) -> Any:
        out = (rule or one_by_one)(size, batched, *args)
        return out, jax.tree.map(lambda _: True, out)

    whole.def_vmap(batch)
    wrapped: Callable[..., Any] = whole
    return wrapped


def _one_by_one(fun: Callable[..., Any], batched: Any, args: Any) -> Any:
    """Call `fun` for each member of a batch in turn."""
    leaves, tree = tree_util.tree_flatten(args)
    is_batched = tree_util.tree_leaves(batched)

    def body(members: list[Any]) -> Any:
        left = iter(members)
        merged = [next(left) if b else x for x, b in zip(leaves, is_batched, strict=True)]
        return fun(*tree_util.tree_unflatten(tree, merged))

    return jax.lax.map(body, [x for x, b in zip(leaves, is_batched, strict=True) if b])


def broadcast(size: int, batched: Any, args: Any) -> Any:
    def lead(b: bool, x: Any) -> Any:  # noqa: FBT001
        return x if b else jax.numpy.broadcast_to(x, (size, *np.shape(x)))

    return jax.tree.map(lead, batched, args)
