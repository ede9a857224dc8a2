"""Arrays as plain data, with their type and device, and back.

JAX pickles the numbers of an array. Which devices it lay on is lost, 64 bits become 32 without a
word where those are switched off, and not every release takes an array of random keys. What is kept
here comes back as it was or not at all; only the devices may be others, since another process may
have none like them. Not here: programs.
"""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from freevars.jax import _compat

__all__ = ["Devices", "Stored", "Typed", "restore", "restore_mesh", "store", "store_mesh"]


class Devices(NamedTuple):
    """A mesh without its device objects, which exist in one process only."""

    platform: str
    ids: Any  # the numbers of the devices, in an array of the shape of the mesh
    names: tuple[Any, ...]
    types: tuple[Any, ...]


class Place(NamedTuple):
    """A sharding: over a mesh, or (`spec` None) on the one device that `devices` holds."""

    devices: Devices
    spec: Any
    memory_kind: str | None


class Stored(NamedTuple):
    """One array of JAX."""

    numbers: np.ndarray[Any, Any]
    weak: bool
    prng: str | None  # the generator, where the elements are its keys
    place: Place | None  # None for an array that is free to move


class Typed(NamedTuple):
    """A NumPy array with a JAX type, as JAX creates while tracing."""

    numbers: np.ndarray[Any, Any]
    weak: bool


def store(x: Any, what: str = "a constant") -> Any:
    """An array of JAX as data, anything else as it is; `what` is what an error calls it."""
    if isinstance(x, _compat.TYPED_NUMPY):
        return Typed(np.asarray(x), bool(x.weak_type))
    if isinstance(x, _compat.Tracer):
        message = f"{what} is a traced value, which exists only while a transformation runs: {x}."
        raise pickle.PicklingError(message)
    if not isinstance(x, _compat.Array):
        return x
    if x.is_deleted():
        message = f"{what}, an array of type {jax.typeof(x)}, was deleted or donated."
        raise pickle.PicklingError(message)
    if not x.is_fully_addressable:
        message = (
            f"{what}, an array of type {jax.typeof(x)}, lies on the devices of several processes."
            " Gather it first, or save it with a library for checkpoints."
        )
        raise pickle.PicklingError(message)
    prng = None
    place = _place(x.sharding) if x.committed else None
    weak = bool(getattr(x, "weak_type", False))
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        prng, x = str(jax.random.key_impl(x)), jax.random.key_data(x)
    return Stored(np.asarray(x), weak, prng, place)


def restore(x: Any) -> Any:
    """The value again."""
    if isinstance(x, Typed):
        return _compat.typed_numpy(x.numbers, weak=x.weak)
    if not isinstance(x, Stored):
        return x
    if jax.dtypes.canonicalize_dtype(x.numbers.dtype) != x.numbers.dtype:
        message = (
            f"a captured value has dtype {x.numbers.dtype}, and 64-bit types are switched off here:"
            ' jax.config.update("jax_enable_x64", True) before it is loaded.'
        )
        raise pickle.UnpicklingError(message)
    array = jax.numpy.asarray(x.numbers)
    if x.weak:
        array = _compat.cast(array, jax.ShapeDtypeStruct(array.shape, array.dtype, weak_type=True))
    if x.prng is not None:
        array = jax.random.wrap_key_data(array, impl=x.prng)
    sharding = None if x.place is None else _sharding(x.place)
    return array if sharding is None else jax.device_put(array, sharding)


def store_mesh(mesh: Mesh) -> Devices:
    """A mesh as data."""
    ids = np.vectorize(lambda d: d.id, otypes=[int])(mesh.devices)
    return Devices(mesh.devices.flat[0].platform, ids, mesh.axis_names, mesh.axis_types)


def restore_mesh(stored: Devices) -> Mesh | None:
    """The mesh again, or None where a device of it does not exist."""
    devices = _devices(stored)
    return None if devices is None else Mesh(devices, stored.names, axis_types=stored.types)


def _devices(stored: Devices) -> Any:
    try:
        here = {d.id: d for d in jax.devices(stored.platform)}
    except RuntimeError:  # no such platform
        return None
    if any(i not in here for i in stored.ids.flat):
        return None
    return np.vectorize(here.__getitem__, otypes=[object])(stored.ids)


def _place(sharding: Any) -> Place | None:
    kind = sharding.memory_kind
    if isinstance(sharding, NamedSharding):
        return Place(store_mesh(sharding.mesh), sharding.spec, kind)
    if isinstance(sharding, SingleDeviceSharding):
        (device,) = sharding.device_set
        return Place(Devices(device.platform, np.array(device.id), (), ()), None, kind)
    return None


def _sharding(place: Place) -> Any:
    if place.spec is None:
        device = _devices(place.devices)
        return None if device is None else SingleDeviceSharding(device.item())
    mesh = restore_mesh(place.devices)
    return None if mesh is None else NamedSharding(mesh, place.spec)
