"""The tangents that JAX gives a rule with `symbolic_zeros`: known zeros are not computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from freevars.jax import _compat

__all__ = ["dots_of", "full", "zero_tangents"]


def dots_of(tangents: Any) -> tuple[tuple[int, ...], list[Any]]:
    """Which leaves move, and their tangents."""
    leaves = jax.tree.leaves(tangents, is_leaf=_compat.is_symbolic_zero)
    moving = tuple(i for i, dot in enumerate(leaves) if not _compat.is_symbolic_zero(dot))
    return moving, [leaves[i] for i in moving]


def full(tangents: Any) -> Any:
    """Tangents or cotangents with arrays of zeros for symbolic ones."""
    zero = _compat.is_symbolic_zero
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if zero(leaf) else leaf,
        tangents,
        is_leaf=zero,
    )


def zero_tangents(out: Any) -> Any:
    """The tangents of a result that does not move."""
    return jax.tree.map(_compat.symbolic_zero, out)
