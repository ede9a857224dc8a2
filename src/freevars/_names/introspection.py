"""Look inside an object without running any code of its own.

Reading ``obj.attr``, ``len(obj)``, ``obj == other`` or even ``isinstance(obj, C)`` can run code
that the object's class defines: properties, ``__getattr__``, ``__eq__``, a ``__class__`` that lies.
The functions here go to the interpreter's own slots instead, so that looking has no effect. Not
here: what to look for.
"""

import enum
import functools
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any, TypeGuard, TypeVar

__all__ = [
    "MODULE_PARTS",
    "by_name",
    "class_dict",
    "class_module",
    "class_name",
    "instance_dict",
    "is_a",
    "is_exactly",
    "key_text",
    "module_name",
    "module_parts",
    "mro",
    "slot_values",
    "stored_members",
]

T = TypeVar("T")

# The getters of `type` itself: a metaclass cannot override these, as it can `cls.__dict__`.
_dict_of = type.__dict__["__dict__"].__get__
_mro_of = type.__dict__["__mro__"].__get__
_name_of = type.__dict__["__name__"].__get__
_module_of = type.__dict__["__module__"].__get__
_globals_of = _dict_of(ModuleType)["__dict__"].__get__

# A module of layers is known by these dicts: its parameters, buffers and children.
MODULE_PARTS = ("_parameters", "_buffers", "_modules")

_LONGEST_KEY = 80
_DEEPEST_KEY = 4
_PLAIN_KEYS = (int, float, complex, bool, bytes, type(None))


def mro(cls: type) -> tuple[type, ...]:
    """The classes of ``cls``, most derived first."""
    found: tuple[type, ...] = _mro_of(cls)
    return found


def class_dict(cls: type) -> Mapping[str, Any]:
    """The class's own attributes, as they are stored."""
    found: Mapping[str, Any] = _dict_of(cls)
    return found


def class_name(cls: type) -> str:
    """The class's name, as its ``class`` statement gave it."""
    return str.__str__(_name_of(cls))


def class_module(cls: type) -> str:
    """The dotted name of the module that a class says it is from, or an empty string."""
    try:
        module = _module_of(cls)
    except AttributeError:  # deleted from the class
        return ""
    return str.__str__(module) if is_a(module, str) else ""


def is_a(obj: object, *classes: type[T]) -> TypeGuard[T]:
    """Whether the true type of ``obj`` derives from one of ``classes``, plain classes all."""
    return issubclass(type(obj), classes)


def is_exactly(obj: object, *classes: type) -> bool:
    """Whether the type of ``obj`` is one of ``classes`` itself."""
    # `type(obj) in classes` could call the `__eq__` or `__hash__` of a metaclass.
    cls = type(obj)
    return any(cls is other for other in classes)


def by_name(items: dict[Any, Any]) -> dict[str, Any]:
    """The entries of ``items`` under plain strings: any other key may run code of its own."""
    found = list(dict.items(items))
    if type(items) is dict and all(type(key) is str for key, _ in found):
        return items
    return {key: value for key, value in found if type(key) is str}


def instance_dict(obj: object) -> dict[str, Any]:
    """The object's own ``__dict__``, or an empty dict where it has none (or hides it)."""
    for cls in mro(type(obj)):
        descriptor = class_dict(cls).get("__dict__")
        if descriptor is None:
            continue
        if not is_exactly(descriptor, GetSetDescriptorType, MemberDescriptorType):
            return {}  # a property in disguise: leave it alone
        found = descriptor.__get__(obj)
        return by_name(found) if is_a(found, dict) else {}
    return {}


def module_name(module: ModuleType) -> object:
    """What a module says it is called. Its other names, of which there may be thousands, are not
    looked at."""
    return dict.get(_globals_of(module), "__name__")


def module_parts(obj: object) -> list[dict[Any, Any]] | None:
    """The parameters, buffers and children of a module of layers; `None` for anything else."""
    attrs = instance_dict(obj)
    parts = [attrs.get(part) for part in MODULE_PARTS]
    return parts if all(is_a(part, dict) for part in parts) else None  # type: ignore[return-value]


def slot_values(obj: object) -> Iterator[tuple[str, Any]]:
    """Name and value of each ``__slots__`` entry that is set."""
    for cls in mro(type(obj)):
        for name, member in list(class_dict(cls).items()):
            if type(member) is MemberDescriptorType and not name.startswith("__"):
                try:
                    yield name, member.__get__(obj)
                except AttributeError:
                    continue


def stored_members(classes: Sequence[type]) -> dict[str, Any]:
    """What the attributes of a class lead to, given its bases, itself first.

    A method leads to its function, a property to its getter. Other descriptors are left out,
    because what they hold is not the attribute's value.
    """
    stored = {name: member for cls in reversed(classes) for name, member in class_dict(cls).items()}
    members: dict[str, Any] = {}
    for name, member in stored.items():
        kind = type(member)
        if type(name) is not str:
            continue
        if kind is property:
            members[name] = member.fget
        elif is_exactly(member, staticmethod, classmethod):
            members[name] = member.__func__
        elif kind is functools.cached_property:
            members[name] = member.func
        elif kind is FunctionType or not any("__get__" in class_dict(cls) for cls in mro(kind)):
            members[name] = member
    return members


def key_text(key: object, depth: int = 0) -> str:
    """A dict key as a person would write it; its type where a repr could run foreign code."""
    if is_a(key, str):
        text = str.__str__(key)
        return repr(text if len(text) <= _LONGEST_KEY else text[: _LONGEST_KEY - 1] + "…")
    if is_exactly(key, *_PLAIN_KEYS):
        return repr(key)
    if type(key) is tuple and depth < _DEEPEST_KEY:
        inner = [key_text(part, depth + 1) for part in key]
        return f"({inner[0]},)" if len(inner) == 1 else f"({', '.join(inner)})"
    if is_a(key, enum.Enum):
        return f"{class_name(type(key))}.{instance_dict(key).get('_name_')}"
    return f"<{class_name(type(key))} object>"
