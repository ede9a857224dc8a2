"""Arrays in the form in which a solver integrates them: a tuple, a vector, or number by number.

Not here: which form a solver takes (`freevars._solvers.integration`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from freevars.jax import _compat
from freevars.jax._rules.coordinates import Coordinates, split_like

__all__ = ["Flat"]


class Flat:
    """A list of floating and complex arrays as one real vector, and back; both are linear."""

    def __init__(self, types: Sequence[Any]) -> None:
        self._spread = [_compat.typed_sharding(t) if _compat.is_sharded(t) else None for t in types]
        types = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in types]
        self._coordinates = Coordinates(types)
        real = jax.eval_shape(self._coordinates.to_real, types)
        parts, self._tree = jax.tree.flatten(real)
        self._parts = parts
        self.dtype = self._coordinates.dtype
        self.eps = self._coordinates.eps
        self.size = sum(part.size for part in parts)

    def ravel(self, arrays: Sequence[Any]) -> Any:
        """Float[n]."""
        parts = jax.tree.leaves(self._coordinates.to_real(list(arrays)))
        parts = [jnp.ravel(_compat.whole(p)) for p in parts]
        return jnp.concatenate([jnp.zeros(0, self.dtype), *parts])

    def unravel(self, vector: Any) -> list[Any]:
        """Any axes in front of the vector's own stay in front."""
        parts = split_like(vector, self._parts)
        arrays = self._coordinates.from_real(self._tree.unflatten(parts))
        return [
            a if sharding is None else _compat.placed(a, sharding, vector.ndim - 1)
            for a, sharding in zip(arrays, self._spread, strict=True)
        ]
