"""What a host solver returns beside x: arrays of the types of an example."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import tree_util

from freevars.jax import _compat

__all__ = ["aux_leaves", "aux_type"]


def aux_leaves(aux: Any, example: Any, lead: tuple[int, ...], solver: str) -> list[Any]:
    """The leaves as copies, in arrays of the types of the example, with axes `lead` in front."""
    leaves, tree = tree_util.tree_flatten(aux)
    examples, expected = tree_util.tree_flatten(example)
    if tree != expected:
        message = f"{solver}: the solver returned aux {tree}, expected {expected}."
        raise TypeError(message)
    arrays = [np.array(leaf) for leaf in leaves]
    for a, one in zip(arrays, examples, strict=True):
        to = aux_type(one)
        if a.shape != (*lead, *to.shape) or _compat.kind(a.dtype) > _compat.kind(to.dtype):
            message = (
                f"{solver}: the solver returned {a!r} in aux where its example"
                f" {one!r} says {to.dtype}{[*lead, *to.shape]}."
            )
            raise TypeError(message)
    # To the dtype of the example only where the solve was called: a thread of its own knows
    # nothing of `jax.enable_x64`.
    return arrays


def aux_type(example: Any) -> Any:
    return jax.ShapeDtypeStruct(np.shape(example), jax.numpy.result_type(example))
