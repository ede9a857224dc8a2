"""What can be told from a captured value: what traces it, whether a derivative can flow to it.

Tracers nest: `grad` inside `vmap` inside `jit` wraps a value three times. Nothing here computes
with a value, waits for it, or keeps it. Not here: how each kind of tracer is built (`_compat`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freevars.jax import _compat

__all__ = ["can_flow", "device_of", "identity", "is_derived", "traced_by", "type_of"]


def traced_by(x: Any) -> tuple[str, ...]:
    """The transformations that trace a value, outermost first; none for a concrete array."""
    found: list[str] = []
    while isinstance(x, _compat.Tracer):
        transformation, x, _ = _compat.layer(x)
        found.append(transformation)
    return tuple(reversed(found))


def can_flow(x: Any, *, hoisted: bool) -> bool:
    """Whether a derivative can flow to a value: it is of real or complex type, and is either
    perturbed, or an argument by which a caller may differentiate."""
    _, dtype, _ = type_of(x)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return False
    unperturbed = False
    while isinstance(x, _compat.Tracer):
        _, x, perturbed = _compat.layer(x)
        if perturbed:
            return True
        unperturbed = unperturbed or perturbed is False
    return hoisted and not unperturbed


def is_derived(x: Any) -> bool | None:
    """Whether a traced value was computed from others, rather than being an input of what traces
    it; None where nothing tells."""
    return _compat.was_computed(x) if isinstance(x, _compat.Tracer) else None


def type_of(x: Any) -> tuple[tuple[int, ...], Any, int]:
    """Shape, dtype, and size in bytes of one value, as the function sees it."""
    aval = _compat.example_type(x)
    aval = getattr(aval, "inner_aval", aval)  # of a mutable reference
    shape, dtype = tuple(aval.shape), aval.dtype
    return shape, dtype, dtype.itemsize * aval.size


def device_of(x: Any) -> str:
    """The device or the sharding of a value, as text; empty while there is none."""
    outermost = x
    while isinstance(outermost, _compat.Tracer):
        _, outermost, _ = _compat.layer(outermost)
    sharding = getattr(outermost, "sharding", None)
    if outermost is None:
        sharding = _compat.typed_sharding(x)
    elif sharding is None:
        return "host"
    if sharding is None:
        return ""
    if isinstance(sharding, jax.sharding.NamedSharding):
        axes = ", ".join(f"{name}={size}" for name, size in sharding.mesh.shape.items())
        return f"{sharding.spec} on mesh({axes})"
    devices = sorted(sharding.device_set, key=lambda device: device.id)
    return ", ".join(f"{device.platform}:{device.id}" for device in devices)


def identity(value: Any) -> Any:
    """What distinguishes captured arrays. JAX wraps the same NumPy array anew in each trace, so a
    NumPy array is identified by its memory."""
    if not isinstance(value, (_compat.Array, _compat.Tracer)) and hasattr(value, "__array__"):
        value = np.asarray(value)  # older releases have a class of their own for it
        where = value.__array_interface__["data"][0]
        return (where, value.shape, value.strides, value.dtype.str)
    return id(value)
