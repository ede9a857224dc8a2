"""A pytree in which only arrays are leaves: everything else is a static part of its structure.

JAX compiles once for each structure of its arguments, so a static string, function or Python number
is part of the program. Two static values are equal only if they have the same type and are equal
*now*, by Python's own rules:

- numbers, and containers and dataclasses by what is in them: 1, 1.0 and True differ, and so do 0.0
  and -0.0;
- what hashes by its content, by its own `==`; functions, classes and modules equal themselves;
- any other object can have changed since it was last seen, so that it counts with its state, in the
  form in which it would be pickled, and what in that cannot be pickled by identity. Where it has
  none and no hash either, it is refused, as `jax.jit` refuses it.

Not here: which leaves are to be static.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import io
import pickle
import struct
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
from jax import tree_util

__all__ = [
    "Same",
    "Static",
    "as_static",
    "from_static",
    "has_a_name",
    "scalar_key",
    "static_key",
    "tree_key",
]


class Same:
    """Equal only to another mark of the very same object."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return type(other) is Same and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def scalar_key(x: Any) -> Hashable:
    """A key for a Python number that compares type and bits: 1, 1.0, True, 0.0 and -0.0 all differ,
    and a NaN equals itself."""
    if isinstance(x, float):
        return (type(x), struct.pack("<d", x))
    if isinstance(x, complex):
        return (type(x), struct.pack("<dd", x.real, x.imag))
    return (type(x), x)


@tree_util.register_static
class Static:
    """One value as part of a structure."""

    __slots__ = ("_key", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self._key = _key(value, _by_state)

    def __eq__(self, other: object) -> bool:
        return type(other) is Static and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return repr(self.value)

    def __reduce__(self) -> Any:
        return Static, (self.value,)


def static_key(x: Any) -> Hashable:
    """A key for what does not change: by the type and `==`, and numbers as in `scalar_key`."""
    return _key(x, _by_hash)


def _key(x: Any, of_object: Callable[[Any], Hashable]) -> Hashable:
    kind = type(x)
    if x is None or kind in _SCALARS or isinstance(x, (float, complex)):
        return scalar_key(x)
    if isinstance(x, np.generic):
        return (kind, x.dtype, x.tobytes())
    if isinstance(x, (tuple, list)):
        return (kind, tuple([_key(y, of_object) for y in x]))
    if isinstance(x, (set, frozenset)):
        return (kind, len(x), frozenset([_key(y, of_object) for y in x]))
    if isinstance(x, dict):
        items = [(_key(k, of_object), _key(v, of_object)) for k, v in x.items()]
        return (kind, tuple(items))
    params = getattr(kind, "__dataclass_params__", None)
    if params is not None and params.eq:  # its fields are compared as Python compares them
        fields = [getattr(x, f.name) for f in dataclasses.fields(x) if f.compare]
        return (kind, tuple([_key(y, of_object) for y in fields]))
    return of_object(x)


_SCALARS = {bool, int, str, bytes}


def _by_hash(x: Any) -> Hashable:
    try:
        hash(x)
    except TypeError:
        return Same(x)
    return (type(x), x)


def _by_state(x: Any) -> Hashable:
    if isinstance(x, types.MethodType):
        return (type(x), x.__func__, _key(x.__self__, _by_state))
    if isinstance(x, functools.partial):
        parts = (x.func, x.args, x.keywords)
        return (type(x), tuple([_key(part, _by_state) for part in parts]))
    own_hash: Any = type(x).__hash__
    if isinstance(x, _NEVER_CHANGE) or own_hash not in (None, object.__hash__):
        return (type(x), x)
    state = _State(x)
    if own_hash is not None:
        return (type(x), Same(x), state.digest, state.by_identity)
    if not state.digest:
        message = (
            f"{x!r} is static, and it can neither be hashed nor pickled, so that a"
            " change to it would go unnoticed. Pass something that has a hash, such as a tuple, a"
            " frozenset or a frozen dataclass."
        )
        raise TypeError(message)
    return (type(x), state.digest, state.by_identity)


class _State(pickle.Pickler):
    """The state of an object, as it would be pickled; what in it does not pickle (a lambda, a lock,
    an open file) counts by identity, as it does for Python."""

    def __init__(self, x: Any) -> None:
        self._whole = x
        self._found: list[Same] = []
        file = io.BytesIO()
        super().__init__(file)
        try:
            self.dump(x)
            self.digest = hashlib.blake2b(file.getvalue()).digest()
        except Exception:  # noqa: BLE001 (what pickling raises has no common class)
            self.digest = b""  # not the object itself either
        self.by_identity = tuple(self._found)

    def reducer_override(self, x: Any) -> Any:
        if not isinstance(x, _NEVER_CHANGE):
            try:
                return x.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
            except Exception:
                if x is self._whole:
                    raise
        elif isinstance(x, enum.Enum | np.dtype) or has_a_name(x):
            return NotImplemented
        self._found.append(Same(x))
        return _position, (len(self._found),)


def has_a_name(x: Any) -> bool:
    """Whether a function or class is pickled as the name by which it is imported."""
    found: Any = sys.modules.get(getattr(x, "__module__", None) or "")
    for name in getattr(x, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is x


def _position(i: int) -> int:
    """The marker for an object that counts by identity."""
    return i


_NEVER_CHANGE = (
    enum.Enum,
    np.dtype,
    type,
    types.BuiltinFunctionType,
    types.FunctionType,
    types.ModuleType,
)


def tree_key(tree: Any) -> Hashable:
    """A key for a tree structure in which the metadata of its nodes count as in `static_key`."""
    try:
        hash(tree)
    except TypeError:
        # Metadata that does not hash: equal to itself alone.
        return object()
    return (tree, tuple(_metadata(tree)))


def _metadata(tree: Any) -> Iterator[Hashable]:
    node = tree.node_data()  # None for a leaf
    if node is None or node[1] is None:
        yield from ()
    elif isinstance(node[1], list):  # the keys of a dict
        yield tuple(map(static_key, node[1]))
    else:
        yield static_key(node[1])
    for child in tree.children():
        yield from _metadata(child)


def as_static(tree: Any, is_leaf: Callable[[Any], bool]) -> Any:
    """The pytree with every leaf made static, except those that are to stay leaves."""
    return tree_util.tree_map(lambda x: x if is_leaf(x) else Static(x), tree)


def from_static(tree: Any) -> Any:
    """The pytree as it was before `as_static`."""
    return tree_util.tree_map(
        lambda x: x.value if isinstance(x, Static) else x, tree, is_leaf=_is_static
    )


def _is_static(x: Any) -> bool:
    return isinstance(x, Static)
