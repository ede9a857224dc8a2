"""When do two functions compute the same thing? Turn a function into a key that decides it.

JAX and users re-create functions all the time, so identity says too little; a name and a line say
too much (two lambdas on one line). A key holds the code object, the captured cells, the defaults
and the globals that the code reads, each turned into a key in turn. What is unknown counts by
identity, and a walk that grows too large gives a key that equals nothing: unequal is always safe,
it only costs a compilation. Not here: anything about a host, which says through `look` what its own
objects mean.
"""

from __future__ import annotations

import enum
import functools
import struct
import sys
import sysconfig
import types
from collections.abc import Callable, Hashable
from typing import Any

__all__ = ["CallableKeys", "Same", "scalar_key"]

Look = Callable[[Any], "tuple[str, Any] | None"]

_LIMIT = 20_000
_INSTALLED = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib")})


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
            return (type(x), self._all(x))
        if type(x) is frozenset:
            return (type(x), frozenset(self._all(x)))
        if isinstance(x, (type, types.ModuleType, types.BuiltinFunctionType, enum.Enum)):
            return Same(x)
        return self._of_mutable(x)

    def _of_mutable(self, x: Any) -> Hashable:
        self.foreign = True
        # Two that are alike now can differ tomorrow, and the same one can have changed
        # since yesterday. So both identity and content count.
        if type(x) in (list, set):
            return (Same(x), self._all(x) if type(x) is list else frozenset(self._all(x)))
        if type(x) is dict:
            return (Same(x), self._of_dict(x))
        try:
            state = object.__getattribute__(x, "__dict__")
        except AttributeError:
            return Same(x)
        return (Same(x), self._of_dict(state)) if type(state) is dict else Same(x)

    def _of_dict(self, d: dict[Any, Any]) -> Hashable:
        return tuple((self.of(k), self.of(v)) for k, v in d.items())

    def _of_function(self, fun: types.FunctionType) -> Hashable:
        installed = fun.__code__.co_filename.startswith(_INSTALLED)
        if installed and fun.__closure__ is None:
            return Same(fun)
        self.foreign |= not installed
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
            cells.append(self.of(value))
        extra = {k: v for k, v in fun.__dict__.items() if k != "__wrapped__"}
        return (
            fun.__code__,
            tuple(cells),
            self._all(fun.__defaults__ or ()),
            self._of_dict(fun.__kwdefaults__ or {}),
            self._of_dict(extra),
            # Nobody rebinds the globals of an installed library.
            None if installed else (Same(fun.__globals__), self._of_globals(fun)),
        )

    def _of_globals(self, fun: types.FunctionType) -> Hashable:
        names = _names(fun.__code__)
        found = []
        for name in names:
            if name not in fun.__globals__:
                continue
            value = fun.__globals__[name]
            found.append((name, self.of(value)))
            if isinstance(value, types.ModuleType) and not _is_installed(value):
                read = (n for n in names if n in vars(value))
                found.append((name, tuple((n, self.of(vars(value)[n])) for n in read)))
        return tuple(found)


_FROZEN: dict[type, Callable[[Any], Any]] = {list: tuple, set: frozenset}
_PLAIN = (bool, int, str, bytes, float, complex)


def _is_installed(module: types.ModuleType) -> bool:
    if module.__name__.split(".")[0] in sys.stdlib_module_names:
        return True
    return (getattr(module, "__file__", None) or "").startswith(_INSTALLED)


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals and attributes that some code and the code nested in it read."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(_names(constant))
    return tuple(names)
