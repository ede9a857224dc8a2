"""Weak types: a Python number takes the dtype of the arrays that it is combined with."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.lax import convert_element_type_p as _convert_p

from freevars.jax._compat.params import has_parts, nested_programs
from freevars.jax._compat.private import convert_element_type, core

__all__ = ["cast", "converts_weak_values", "is_weak", "keeps_dtype", "kind", "strong"]


def is_weak(aval: Any) -> bool:
    """Whether a type is weak."""
    return bool(getattr(aval, "weak_type", False))


def strong(aval: Any) -> Any:
    """The same type, not weak."""
    return aval.strip_weak_type() if is_weak(aval) else aval


def keeps_dtype(eqn: Any) -> bool:
    """Whether an equation is a conversion that changes the weakness of a type alone."""
    if eqn.primitive is not _convert_p or eqn.params.get("sharding") is not None:
        return False
    return bool(eqn.invars[0].aval.dtype == eqn.params["new_dtype"])


def cast(x: Any, expected: Any) -> Any:
    """`x` with the dtype and the weakness of `expected`. The public conversion only gives strong
    types."""
    return convert_element_type(x, expected.dtype, weak_type=expected.weak_type)


_CALLS = frozenset({"jit", "pjit"})  # the name of one primitive, older and newer


def converts_weak_values(jaxpr: Any) -> bool:
    """Whether a program, or one nested in it, turns an input of weak type, or a weak value that
    comes of one, into a dtype that a value of strong type would not have led to: `1.0 * bfloat16`
    is computed in bfloat16, and `float32(1) * bfloat16` in float32. The numbers that stand in the
    program are weak whatever its inputs are."""
    seen: dict[Any, Any] = {}  # programs share what they nest

    def converts(jaxpr: Any, weak: set[Any]) -> bool:
        places = tuple(v in weak for v in jaxpr.invars)
        if (id(jaxpr), places) in seen:
            return False
        seen[id(jaxpr), places] = jaxpr
        for eqn in jaxpr.eqns:
            given = [type(v) is not core.Literal and v in weak for v in eqn.invars]
            if not any(given):
                continue
            if _is_promotion(eqn):
                return True
            weak.update(v for v in eqn.outvars if is_weak(v.aval))
            for nested in nested_programs(eqn) if has_parts(eqn) else ():
                inner = getattr(nested, "jaxpr", nested)
                # In a loop, or where operands are not those of the program, any may come of any.
                one_by_one = eqn.primitive.name in _CALLS and len(given) == len(inner.invars)
                each = given if one_by_one else [True] * len(inner.invars)
                pairs = zip(inner.invars, each, strict=True)
                if converts(inner, {v for v, told in pairs if told and is_weak(v.aval)}):
                    return True
        return False

    return converts(jaxpr, {v for v in jaxpr.invars if is_weak(v.aval)})


def _is_promotion(eqn: Any) -> bool:
    if eqn.primitive is not _convert_p:
        return False
    source, to = eqn.invars[0].aval, eqn.params["new_dtype"]
    if not source.weak_type or source.dtype == to:
        return False
    # Promotion never turns a float into an integer: that is a cast, the same for both.
    return bool(kind(source.dtype) <= kind(to) and _promoted(source.dtype, to) != to)


def _promoted(a: Any, b: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # the question has no answer in strict mode
        return jax.numpy.promote_types(a, b)


def kind(dtype: Any) -> int:
    """The place of a dtype among bool, integer, floating, complex and other. NumPy's own `kind`
    does not know the dtypes that JAX adds."""
    kinds = (np.bool_, np.integer, np.floating, np.complexfloating)
    return next((i for i, k in enumerate(kinds) if jax.dtypes.issubdtype(dtype, k)), len(kinds))
