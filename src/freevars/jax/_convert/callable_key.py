"""When do two functions compute the same thing? Turn a function into a key that decides it.

JAX and users re-create functions all the time, so identity says too little; a name and a line say
too much (two lambdas on one line). A key holds the code object, the captured cells, the defaults
and the globals that the code reads, each turned into a key in turn; an object that can change
counts by identity and by what it and its class hold now. What is unknown counts by identity, and a
walk that grows too large, or meets code that looks up names at run time, gives a key that equals
nothing: unequal is always safe, it only costs a compilation. Not here: anything about a host, which
says through `look` what its own objects mean.
"""

from __future__ import annotations

import collections
import enum
import functools
import os
import struct
import sys
import sysconfig
import types
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

__all__ = ["CallableKeys", "Same", "scalar_key"]

Look = Callable[[Any], "tuple[str, Any] | None"]

_LIMIT = 20_000
# Libraries, this one among them wherever it lies.
_INSTALLED = (
    *{sysconfig.get_paths()[name] + os.sep for name in ("purelib", "platlib", "stdlib")},
    str(Path(__file__).parents[2]) + os.sep,
)


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


class CallableKeys:
    """Keys for functions and whatever they hold.

    `look(x)` is the host's word about an object of its own: `("parts", objects)` for one that means
    no more than these, `("key", key)` for one whose key is known, None for one that is not its own.
    """

    def __init__(self, look: Look) -> None:
        self._look = look
        self.foreign = False  # whether anything but the functions of installed libraries was met
        self._left = _LIMIT
        # The objects are kept beside their keys so that no id is used again during the walk.
        self._known: dict[int, tuple[object, Hashable]] = {}

    def of(self, x: Any) -> Hashable:
        """The key of any object that a function can hold."""
        if x is None or (
            isinstance(x, (bool, int, str, bytes, float, complex)) and type(x) in _PLAIN
        ):
            return scalar_key(x)
        if isinstance(x, type):
            return self._of_class(x)
        known = self._known.get(id(x))
        if known is not None:
            return known[1]
        self._left -= 1
        if self._left < 0:
            return Same(object())
        self._known[id(x)] = (x, ("again", len(self._known)))  # ends a cycle
        key = self._of_object(x)
        self._known[id(x)] = (x, key)
        return key

    def _all(self, xs: Any) -> tuple[Hashable, ...]:
        return tuple(self.of(x) for x in xs)

    def _of_object(self, x: Any) -> Hashable:
        said = self._look(x)
        if said is not None:
            what, value = said
            return value if what == "key" else (type(x), self._all(value))
        if isinstance(x, types.FunctionType):
            return self._of_function(x)
        if isinstance(x, types.MethodType):
            return ("method", self.of(x.__func__), self.of(x.__self__))
        if isinstance(x, functools.partial):
            return ("partial", self.of(x.func), self._all(x.args), self._of_dict(x.keywords))
        if isinstance(x, tuple) and not hasattr(x, "__dict__"):
            return (self._of_class(type(x)), self._all(x))
        if type(x) is frozenset:
            return (type(x), len(x), frozenset(self._all(x)))
        if isinstance(x, (types.ModuleType, types.BuiltinFunctionType)):
            return Same(x)
        if isinstance(x, enum.Enum) and _is_installed(type(x).__module__):
            return Same(x)
        return self._of_mutable(x)

    def _of_mutable(self, x: Any) -> Hashable:
        """Two that are alike now can differ tomorrow, and the same one can have changed since
        yesterday. So both identity and content count, and what the class holds."""
        self.foreign = True
        content: list[Hashable] = []
        for kind, read in _CONTENT.items():
            if isinstance(x, kind):
                content.append(frozenset(self._all(read(x))) if kind is set else self.of(read(x)))
        try:
            state = object.__getattribute__(x, "__dict__")
        except AttributeError:
            state = None
        if type(state) is dict:
            content.append(self._of_dict(state))
        for slot in _slots(type(x)):
            try:
                content.append((Same(slot), self.of(slot.__get__(x))))
            except AttributeError:  # nothing in it yet
                continue
        return (Same(x), self._of_class(type(x)), tuple(content))

    def _of_class(self, kind: type) -> Hashable:
        if _is_installed(kind.__module__):
            return Same(kind)
        known = self._known.get(id(kind))
        if known is None:
            self.foreign = True
            self._known[id(kind)] = (kind, Same(kind))  # ends a cycle
            held = {k: v for k, v in vars(kind).items() if k not in _NO_MEANING}
            key = (Same(kind), self._of_dict(held), tuple(map(self._of_class, kind.__bases__)))
            known = self._known[id(kind)] = (kind, key)
        return known[1]

    def _of_dict(self, d: dict[Any, Any]) -> Hashable:
        return tuple([(self.of(k), self.of(v)) for k, v in list(d.items())])

    def _of_function(self, fun: types.FunctionType) -> Hashable:
        installed = fun.__code__.co_filename.startswith(_INSTALLED)
        if installed and fun.__closure__ is None:
            return Same(fun)
        self.foreign |= not installed
        names = _names(fun.__code__)
        if not installed and not _LOOKS_UP.isdisjoint(names):
            return Same(object())
        met: set[int] = set()  # modules
        cells: list[Hashable] = []
        for cell in fun.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # a cell that is still empty
                cells.append(Same(cell))
                continue
            # Lists and sets in a library's own wrappers are made afresh with them and never change.
            if installed and type(value) in _FROZEN:
                value = _FROZEN[type(value)](value)
            cells.append(self.of(value) if installed else self._of_read(value, names, met))
        extra = {k: v for k, v in fun.__dict__.items() if k != "__wrapped__"}
        return (
            fun.__code__,
            tuple(cells),
            self._all(fun.__defaults__ or ()),
            self._of_dict(fun.__kwdefaults__ or {}),
            self._of_dict(extra),
            # Nobody rebinds the globals of an installed library.
            None if installed else (Same(fun.__globals__), self._of_globals(fun, names, met)),
        )

    def _of_globals(self, fun: types.FunctionType, names: Any, met: set[int]) -> Hashable:
        space = fun.__globals__
        found = [(n, self._of_read(space[n], names, met)) for n in names if n in space]
        # A function may import by itself: absolutely, or relative to a package around its own.
        package = space.get("__package__") or ""
        parents = ["", *(f"{p}." for p in _around(package))]
        modules = {p + n: sys.modules.get(p + n) for n in names for p in parents}
        found += [(n, self._of_read(m, names, met)) for n, m in modules.items() if m is not None]
        return tuple(found)

    def _of_read(self, x: Any, names: tuple[str, ...], met: set[int]) -> Hashable:
        """What code that reads these names can see of one value: of a module no more than that."""
        if not isinstance(x, types.ModuleType) or id(x) in met or _is_installed(x.__name__):
            return self.of(x)
        met.add(id(x))
        space = vars(x)
        read = tuple([(n, self._of_read(space[n], names, met)) for n in names if n in space])
        return (Same(x), read)


_FROZEN: dict[type, Callable[[Any], Any]] = {list: tuple, set: frozenset}
_PLAIN = (bool, int, str, bytes, float, complex)
# What the containers hold, read past whatever a class of the user makes of it.
_CONTENT: dict[type, Callable[[Any], Any]] = {
    list: lambda x: tuple(list.__iter__(x)),
    tuple: lambda x: tuple(tuple.__iter__(x)),
    dict: lambda x: tuple(dict.items(x)),
    set: lambda x: tuple(set.__iter__(x)),
    collections.deque: lambda x: tuple(collections.deque.__iter__(x)),
    bytearray: bytes,
}
_NO_MEANING = {"__doc__", "__annotations__", "__dataclass_fields__", "__dict__", "__weakref__"}
# Code that reads one of these finds values by names that are not in it.
_LOOKS_UP = {"globals", "vars", "eval", "exec", "__import__", "import_module"}


def _slots(kind: type) -> list[Any]:
    """What reads the values that an object keeps outside of its `__dict__`."""
    held = (v for cls in kind.__mro__ for v in vars(cls).values())
    return [v for v in held if type(v) is types.MemberDescriptorType]


def _around(package: str) -> list[str]:
    """A package and those that it lies in."""
    parts = package.split(".") if package else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_installed(name: str) -> bool:
    """Whether the module of this name belongs to Python or to a library."""
    top = name.split(".", maxsplit=1)[0]
    if top in sys.stdlib_module_names:
        return True
    module = sys.modules.get(name) or sys.modules.get(top)
    return (getattr(module, "__file__", None) or "").startswith(_INSTALLED)


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals, attributes and imports that some code and the code nested in it
    read."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(_names(constant))
    return tuple(names)
