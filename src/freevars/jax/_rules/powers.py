"""Powers of two, by the bits of a number: to scale by one rounds nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["exponent", "power_of_two", "two_to"]


def power_of_two(a: Any) -> Any:
    """The one below each positive number; 1 for what is no such number."""
    kind, mask, _, _ = _form(a.dtype)
    bits = jax.lax.bitcast_convert_type(a, kind) & jnp.asarray(mask, kind)
    power = jax.lax.bitcast_convert_type(bits, a.dtype)
    return jnp.where((power > 0) & (power < jnp.inf), power, 1)


def exponent(a: Any) -> Any:
    """Of the power of two below a positive number, int16."""
    kind, _, shift, bias = _form(a.dtype)
    bits = jax.lax.bitcast_convert_type(a, kind) >> jnp.asarray(shift, kind)
    return bits.astype(jnp.int16) - jnp.int16(bias)


def two_to(exponent: Any, dtype: Any) -> Any:
    """The power of two with an exponent, int16; the nearest that there is, for its inverse too."""
    kind, _, shift, bias = _form(dtype)
    within = jnp.clip(exponent, 1 - bias, bias - 1)
    bits = (within + jnp.int16(bias)).astype(kind) << jnp.asarray(shift, kind)
    return jax.lax.bitcast_convert_type(bits, dtype)


def _form(dtype: Any) -> tuple[Any, int, int, int]:
    """An unsigned integer for the bits of a number, the mask and the place of the exponent there,
    and what is added to it."""
    if dtype == jnp.float64:
        return jnp.uint64, 0x7FF0000000000000, 52, 1023
    return jnp.uint32, 0x7F800000, 23, 127
