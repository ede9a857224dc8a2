"""Where the search over objects stops: at libraries, which hold many objects but no names of the
user's. Not here: what an object that is entered leads to (`object_graph`)."""

from __future__ import annotations

import sys
from collections.abc import Callable

from freevars._names.introspection import class_module, mro

__all__ = ["FRAMEWORKS", "Bounds", "is_library"]

# Packages whose instances and functions are never entered; their containers and wrappers are.
FRAMEWORKS = frozenset({"jax", "jaxlib", "torch", "numpy", "scipy", "freevars"})

_STDLIB = frozenset(sys.stdlib_module_names)
_STDLIB_CONTAINERS = frozenset({"argparse", "collections", "types"})


def is_library(module: object) -> bool:
    """Whether a module is the standard library's or a framework's: its code is never entered."""
    root = module.partition(".")[0] if type(module) is str else ""
    return root in FRAMEWORKS or root in _STDLIB


class Bounds:
    """The classes whose instances the search never enters.

    Args:
        enters: whether instances of a class from a framework are entered nevertheless.
    """

    def __init__(self, enters: Callable[[type], bool] | None) -> None:
        self._enters = enters
        self._known: dict[int, bool] = {}  # by id: hashing a class can run code

    def is_opaque(self, cls: type) -> bool:
        """Whether instances of this class are never entered."""
        known = self._known.get(id(cls))
        if known is None:
            enters = self._enters is not None and self._enters(cls)
            known = not enters and any(_root(base) in FRAMEWORKS for base in mro(cls))
            own = _root(cls)
            known = known or (own in _STDLIB and own not in _STDLIB_CONTAINERS)
            self._known[id(cls)] = known
        return known


def _root(cls: type) -> str:
    return class_module(cls).partition(".")[0]
