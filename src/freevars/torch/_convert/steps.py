"""The steps of which a place is made: each reads one link again, on a function or on a copy of it.

Not here: which steps lead to what (`places.py`).
"""

from collections.abc import Callable
from typing import Any

from freevars._names.introspection import class_dict, mro

__all__ = [
    "GONE",
    "MISSING",
    "Link",
    "Place",
    "attribute",
    "cell",
    "default",
    "entry",
    "follow",
    "item",
    "keyword_default",
    "member",
    "part",
    "plain_member",
    "read",
    "slot",
    "variable",
]


def cell(fun: Any, i: int) -> Any:
    return fun.__closure__[i].cell_contents


def variable(fun: Any, name: str) -> Any:
    return fun.__globals__[name]


def default(fun: Any, i: int) -> Any:
    return fun.__defaults__[i]


def keyword_default(fun: Any, name: str) -> Any:
    return fun.__kwdefaults__[name]


def attribute(obj: Any, name: str) -> Any:
    return object.__getattribute__(obj, "__dict__")[name]


def slot(obj: Any, name: str) -> Any:
    return object.__getattribute__(obj, name)


def entry(obj: Any, key: Any) -> Any:
    return dict.__getitem__(obj, key)


def item(obj: Any, i: int) -> Any:
    return list.__getitem__(obj, i) if isinstance(obj, list) else tuple.__getitem__(obj, i)


def part(obj: Any, name: str) -> Any:
    """Of what Python itself defines, and is not bound anew: a method's `__self__`, the `func` of a
    partial."""
    return getattr(obj, name)


def member(cls: Any, where: tuple[int, str]) -> Any:
    """What a class, or one that it derives from, has under a name."""
    i, name = where
    return plain_member(class_dict(mro(cls)[i])[name])


def plain_member(x: Any) -> Any:
    """The function of a method or property in a class; anything else as it is."""
    x = x.fget if type(x) is property else x
    return getattr(x, "__func__", x)


Link = tuple[Callable[[Any, Any], Any], Any]
Place = tuple[Link, ...]


def follow(fun: Any, place: Place) -> Any:
    """What is at `place`, starting from `fun`, or `GONE`."""
    for step, key in place:
        fun = read(step, fun, key)
    return fun


def read(step: Callable[[Any, Any], Any], holder: Any, key: Any) -> Any:
    try:
        return GONE if holder is GONE else step(holder, key)
    except MISSING:
        return GONE


class _Gone:
    def __repr__(self) -> str:
        return "nothing"

    def __reduce__(self) -> str:
        return "GONE"  # there is one


GONE = _Gone()
MISSING = (AttributeError, IndexError, KeyError, TypeError, ValueError)
