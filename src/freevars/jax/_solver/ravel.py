"""A pytree of floating and complex arrays as one real vector, and back.

A complex number counts as two real ones, because the equations need not be holomorphic. Not here:
anything about solving.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import tree_util
from jax.flatten_util import ravel_pytree

from freevars.jax import _compat

__all__ = ["to_vector"]


def to_vector(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The real vector of a pytree, and the linear function that turns such a vector back.

    It is of float32 at least: no linear algebra is done in half precision.
    """
    tree = jax.tree.map(_compat.whole, tree)
    is_complex = [jnp.iscomplexobj(x) for x in jax.tree.leaves(tree)]
    if not any(is_complex):
        vector, from_vector = ravel_pytree(tree)
        half = vector.dtype
        if jnp.finfo(half).bits >= 32:  # noqa: PLR2004
            return vector, from_vector
        return vector.astype(jnp.float32), lambda vector: from_vector(vector.astype(half))
    leaves, treedef = tree_util.tree_flatten(tree)
    parts = [(x.real, x.imag) if c else x for x, c in zip(leaves, is_complex, strict=True)]
    vector, from_vector = ravel_pytree(parts)

    def back(vector: Any) -> Any:
        parts = from_vector(vector)
        joined = [jax.lax.complex(*p) if c else p for p, c in zip(parts, is_complex, strict=True)]
        return tree_util.tree_unflatten(treedef, joined)

    return vector, back
