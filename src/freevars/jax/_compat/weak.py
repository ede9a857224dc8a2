"""Weak types: the dtype of a Python number gives way to that of what it meets."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.lax import convert_element_type_p as _convert_p

from freevars.jax._compat.params import nested_programs
from freevars.jax._compat.private import convert_element_type

__all__ = ["cast", "converts_weak_values", "kind"]


def cast(x: Any, expected: Any) -> Any:
    """`x` with the dtype and the weakness of `expected`. The public conversion only gives strong
    types."""
    return convert_element_type(x, expected.dtype, weak_type=expected.weak_type)


def converts_weak_values(jaxpr: Any) -> bool:
    """Whether a program, or one nested in it, turns a weakly typed value into a dtype that a value
    of strong type would not have led to: `1.0 * bfloat16` is computed in bfloat16, and
    `float32(1) * bfloat16` in float32."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is _convert_p:
            source, to = eqn.invars[0].aval, eqn.params["new_dtype"]
            # Promotion never turns a float into an integer: that is a cast, the same for both.
            promoted = kind(source.dtype) <= kind(to)
            if source.weak_type and promoted and _promoted(source.dtype, to) != to:
                return True
        for nested in nested_programs(eqn):
            if converts_weak_values(getattr(nested, "jaxpr", nested)):
                return True
    return False


def _promoted(a: Any, b: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # the question has no answer in strict mode
        return jax.numpy.promote_types(a, b)


def kind(dtype: Any) -> int:
    """The place of a dtype among bool, integer, floating, complex and other. NumPy's own `kind`
    does not know the dtypes that JAX adds."""
    kinds = (np.bool_, np.integer, np.floating, np.complexfloating)
    return next((i for i, k in enumerate(kinds) if jax.dtypes.issubdtype(dtype, k)), len(kinds))
