"""What scipy is given as vectors of JAX, for `freevars._solvers.scipy_constraints`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util
from jax.flatten_util import ravel_pytree

from freevars._solvers import scipy_constraints
from freevars._solvers.scipy_constraints import Function
from freevars.jax import _compat
from freevars.jax.scipy._scipy import refuse_derivatives

__all__ = ["as_functions", "as_sides"]


def as_sides(bounds: Any, x0: Any, name: str, *, pairs: bool = True) -> tuple[Any, Any]:
    """As `scipy_constraints.as_sides`."""
    return scipy_constraints.as_sides(bounds, x0, name, _Vectors(), pairs=pairs)


def as_functions(constraints: Any, name: str) -> tuple[Function | None, Function | None]:
    """As `scipy_constraints.as_functions`."""
    return scipy_constraints.as_functions(constraints, name, _Vectors())


class _Vectors:
    xp: Any = jnp
    refuse_derivatives = staticmethod(refuse_derivatives)

    def size(self, x: Any) -> int:
        return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(x))

    def ravel(self, x: Any) -> Any:
        return ravel_pytree(x)[0]

    def like(self, vector: Any, x: Any) -> Any:
        leaves, tree = jax.tree.flatten(x)
        sizes = [math.prod(np.shape(leaf)) for leaf in leaves]
        parts = jnp.split(jnp.asarray(vector), np.cumsum(sizes)[:-1])
        return tree.unflatten(
            [jnp.reshape(a, np.shape(leaf)) for a, leaf in zip(parts, leaves, strict=True)]
        )

    def array(self, a: Any, like: Any) -> Any:
        return jnp.asarray(a, jnp.result_type(like))

    def values(self, a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            return np.array([self.values(part) for part in a])
        if isinstance(a, _compat.Tracer):
            return np.full(a.shape, np.nan)
        return np.asarray(a)  # by NumPy: inside `jit` an operation of JAX gives what is traced

    def is_array(self, x: Any) -> bool:
        return tree_util.all_leaves([x])
