"""What JAX accepts as a value, and what its type says."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.ref import AbstractRef

from freevars.jax._compat.private import core, literals

__all__ = [
    "ARRAY_TYPES",
    "REF_TYPE",
    "TYPED_NUMPY",
    "VALUES",
    "Array",
    "Tracer",
    "example_type",
    "is_array",
    "is_array_literal",
    "is_opaque",
    "is_ref",
    "is_smooth",
    "is_symbolic_zero",
    "lowered",
    "symbolic_zero",
    "typed_numpy",
]

Array = jax.Array

Tracer = jax.core.Tracer


def example_type(x: Any) -> Any:
    """The abstract value that stands for an example argument while a function is traced."""
    return jax.typeof(x)


def is_array(x: Any) -> bool:
    """Whether JAX takes `x` as an array argument: arrays, tracers, NumPy values, Python numbers."""
    if isinstance(x, (Array, np.ndarray, np.generic, bool, int, float, complex)):
        return not (isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "OSUVmM")
    return isinstance(x, Tracer) or is_ref(x)


def is_ref(x: Any) -> bool:
    """Whether `x` is a mutable reference (`jax.new_ref`), concrete or traced.

    References have moved between modules; their abstract value has not.
    """
    if isinstance(x, (int, float, complex, np.ndarray, np.generic, str)):
        return False
    aval = getattr(x, "aval", None) if isinstance(x, Tracer) else _ref_aval(x)
    return isinstance(aval, REF_TYPE)


def _ref_aval(x: Any) -> Any:
    return x._aval if isinstance(x, _Ref) else None  # noqa: SLF001 (the public class hides it)


_Ref: Any = jax.Ref if hasattr(jax, "Ref") else core.Ref

REF_TYPE: Any = AbstractRef


def lowered(x: Any) -> Any:
    """The value behind `x`: without tracers that add nothing, and without the object that JAX put
    around a NumPy array until 0.10."""
    if type(x) in _NUMPY_WRAPPERS:
        return x.val
    lower: Any = getattr(x, "full_lower", None) if isinstance(x, Tracer) else None
    return x if lower is None else lower()


# A NumPy array with a type of JAX; its pickled form does not come back as it was. Until 0.10 it is
# no NumPy array itself.
TYPED_NUMPY = tuple(cls for cls in (getattr(literals, "TypedNdArray", None),) if cls is not None)

_NUMPY_WRAPPERS = tuple(cls for cls in TYPED_NUMPY if not issubclass(cls, np.ndarray))


def typed_numpy(numbers: Any, *, weak: bool) -> Any:
    """A NumPy array with a type of JAX."""
    (cls,) = TYPED_NUMPY
    if _NUMPY_WRAPPERS:
        return cls(numbers, weak)
    return cls(numbers, core.ShapedArray(numbers.shape, numbers.dtype, weak_type=weak))


def is_opaque(x: Any) -> bool:
    """Whether the elements of an array are of one of JAX's own types, such as PRNG keys."""
    return bool(jax.numpy.issubdtype(x.dtype, jax.dtypes.extended))


# For `issubclass(type(x), ...)`: `isinstance` would ask `x` itself, which may be anybody's object.
ARRAY_TYPES: tuple[type, ...] = (Tracer, np.ndarray, Array, _Ref)


def is_smooth(aval: Any) -> bool:
    """Whether values of this type have a derivative."""
    return bool(jax.dtypes.issubdtype(aval.dtype, np.inexact))


def is_array_literal(v: Any) -> bool:
    """Whether a literal is a captured value. A Python number or a NumPy scalar is part of the
    program."""
    return isinstance(v.val, Array) or np.ndim(v.val) > 0


# Compared by value: two that are equal mean the same.
VALUES: Any = (
    core.AbstractValue,
    jax.sharding.Mesh,
    jax.sharding.AbstractMesh,
    jax.sharding.Sharding,
)


def is_symbolic_zero(x: Any) -> bool:
    """Whether a tangent is known to be zero without looking at numbers."""
    return isinstance(x, SymbolicZero) or getattr(x, "dtype", None) == jax.dtypes.float0


def symbolic_zero(x: Any) -> Any:
    """The tangent of `x` that is known to be zero."""
    return SymbolicZero.from_primal_value(x)
