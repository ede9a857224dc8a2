"""Unknowns: what a solver starts from and returns, as arrays of definite dtypes.

Not here: the vector that a linear system is solved for (`ravel`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from freevars.errors import StructureError
from freevars.jax import _compat
from freevars.jax._convert.arguments import ArgSpec, mismatch

__all__ = ["as_unknown", "is_array", "like"]


def as_unknown(x0: Any, name: str, *, what: str = "x0") -> Any:
    """`x0` as arrays of definite floating or complex dtypes; `what` an error calls it."""

    def convert(path: Any, leaf: Any) -> Any:
        where = f"{name}: {what}{tree_util.keystr(path)}"
        if not _compat.is_array(leaf):
            message = f"{where}: expected a floating or complex array or number, got {leaf!r}."
            raise StructureError(message)
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            message = (
                f"{where}: expected a floating or complex array or number, got dtype {dtype}, in"
                " which a solution has no derivative. Start from a float: 1.0, not 1."
            )
            raise StructureError(message)
        return jnp.asarray(leaf, dtype=dtype)

    return tree_util.tree_map_with_path(convert, x0)


_LIKE = " A solver returns an x of the structure, shapes and dtypes of its x0."


def like(x: Any, x0: Any, name: str, *, hint: str = _LIKE) -> Any:
    """`x`, if it is of the structure and types of `x0`; `name` is what an error calls it."""
    arrays, tree = tree_util.tree_flatten(x0)
    types = [_compat.example_type(a) for a in arrays]
    leaves, got = tree_util.tree_flatten(x)
    alike = got == tree and all(map(_compat.is_array, leaves))
    if not (alike and [_compat.example_type(leaf) for leaf in leaves] == types):
        spec = ArgSpec(tree, tuple(types), ())
        error = mismatch(spec, x, name=name, weak_matters=False, hint=hint)
        if error is not None:
            raise error
    return jax.tree.map(lambda a, b: jnp.asarray(a, dtype=b.dtype), x, x0)


def is_array(x: Any) -> bool:
    """Whether an option is an array: anything else is static."""
    return isinstance(x, (_compat.Array, np.ndarray, _compat.Tracer)) and _compat.is_array(x)
