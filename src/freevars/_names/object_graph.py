"""What is inside an object that code can read: the links from one object to the next.

A function leads to its cells, the globals that its code mentions, and its defaults; a bound method
to its ``self``; an instance to its attributes; a container to its entries. Each link knows how a
person would write it. No code of the objects runs (see ``introspection``). Not here: the order of
the search, its limits and its targets (see ``search``).
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import (
    BuiltinFunctionType,
    CellType,
    FunctionType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any

from freevars._names.bounds import Bounds, is_library
from freevars._names.callables import (
    codes,
    compiled_module,
    function_name,
    home_name,
    partial_parts,
    positional,
    scope,
    unwrapped,
)
from freevars._names.introspection import (
    MODULE_PARTS,
    by_name,
    class_dict,
    class_module,
    instance_dict,
    is_a,
    is_exactly,
    module_name,
    module_parts,
    mro,
    slot_values,
    stored_members,
)
from freevars._names.links import (
    Attribute,
    Bound,
    Cell,
    Default,
    Global,
    Home,
    Item,
    Link,
    Member,
    Node,
    Owner,
    Through,
)
from freevars._names.mentions import Mentions

__all__ = ["ObjectGraph"]

_WIDEST = 20_000  # entries looked at in one container, so that a huge one does not use up the walk
_MOST_INSTANCES = 2  # of one class, that are looked at for what the class itself holds
_NOT_IMPLICIT = frozenset({"__init__", "__new__", "__del__", "__init_subclass__", "__repr__"})
# Instances of these hold nothing but their entries; by id, for hashing a class can run code.
_PLAIN_CONTAINERS = frozenset(map(id, (dict, list, tuple, set, frozenset, deque)))
_MISSING: Any = object()


class ObjectGraph:
    """The links out of each object, for walks that start at one function after the other.

    It remembers which variables it has met, for a variable is followed once in a walk, and what the
    code read so far mentions (see ``mentions``).
    """

    def __init__(
        self,
        enters: Callable[[type], bool] | None = None,
        implicit: frozenset[str] = frozenset(),
        *,
        sets: bool = False,
    ) -> None:
        self.bounds = Bounds(enters)
        self.implicit = implicit
        self.sets = sets
        self.once: set[object] = set()  # cells and globals: a variable has one name
        self.mentions = Mentions()
        self.instances: dict[int, int] = {}  # how many of each class have been met
        self.members: dict[int, dict[str, Any]] = {}  # by id: hashing a class can run code

    def start(self, fun: object) -> Node:
        """Where a walk begins that asks about ``fun``."""
        inner = unwrapped(fun)
        self.scope = scope(inner)
        self.globals = inner.__globals__ if type(inner) is FunctionType else None
        self.once.clear()  # a variable may hold something else by now
        return Node(fun, None, Home(home_name(fun), function_name(fun)), home=True)

    def inside(self, node: Node) -> Iterator[Node]:
        """The links out of ``node``: one method below for each kind of object."""
        obj: Any = node.obj
        kind = type(obj)
        if id(kind) in _PLAIN_CONTAINERS:
            yield from self.entries(node, obj)
        elif kind is FunctionType:
            yield from self.function(node, obj)
        elif kind is MethodType:
            yield from self.method(node, obj.__self__, obj.__func__)
        elif is_exactly(obj, BuiltinFunctionType, MethodWrapperType):  # `w.dot`, `w.__matmul__`
            yield Node(obj.__self__, node, Attribute("__self__"))
        elif kind is CellType:
            yield from self.cell(node, obj, Through("cell_contents"))
        elif is_a(obj, ModuleType):
            if not is_library(module_name(obj)):
                yield from self.mentions.holder(node, instance_dict(obj))
        elif is_a(obj, type):
            yield from self.class_attributes(node, obj)
        else:
            if is_a(obj, functools.partial):
                yield from self.partial(node)
            yield from self.entries(node, obj)
            yield from self.instance(node)

    def entries(self, node: Node, obj: Any) -> Iterator[Node]:
        if is_a(obj, dict):
            yield from self.dictionary(node, obj)
        elif is_a(obj, list, tuple, deque):
            yield from self.sequence(node)
        elif self.sets and is_a(obj, set, frozenset):
            yield from self.unordered(node)

    def function(self, node: Node, fun: FunctionType) -> Iterator[Node]:
        attrs = instance_dict(fun)
        if "__wrapped__" in attrs:  # first, so that a wrapped function goes by its own names
            yield from self.wrapped(node, attrs["__wrapped__"], "__wrapped__")
        module = dict.get(fun.__globals__, "__name__")
        asked_about = node.home and "__wrapped__" not in attrs
        if is_library(module) and not asked_about:
            return
        bare = node.home or (self.scope != "" and scope(fun) == self.scope)
        for variable, cell in zip(fun.__code__.co_freevars, fun.__closure__ or (), strict=True):
            yield from self.cell(node, cell, Cell(variable, bare))
        arguments = fun.__code__.co_varnames[: fun.__code__.co_argcount]
        defaults = fun.__defaults__ or ()
        optional = arguments[len(arguments) - len(defaults) :]
        for argument, value in zip(optional, defaults, strict=False):
            yield Node(value, node, Default("__defaults__", argument))
        for argument, value in by_name(fun.__kwdefaults__ or {}).items():
            yield Node(value, node, Default("__kwdefaults__", argument))
        local = fun.__globals__ is self.globals or type(module) is not str
        names = {name: None for code in codes(fun.__code__) for name in code.co_names}
        for name in names:
            value = dict.get(fun.__globals__, name, _MISSING)
            if value is not _MISSING and (id(fun.__globals__), name) not in self.once:
                self.once.add((id(fun.__globals__), name))
                yield Node(value, node, Global("" if local else str(module), name))
        yield from self.attributes(node, attrs)
        yield from self.mentions.read(names)

    def wrapped(self, node: Node, inner: object, attribute: str) -> Iterator[Node]:
        """What it wraps goes by the wrapper's name, or by its own in the function asked about."""
        link = Through(attribute, home_name(inner) if node.home else "")
        yield Node(inner, node, link, home=node.home)

    def cell(self, node: Node, cell: CellType, link: Link) -> Iterator[Node]:
        if id(cell) in self.once:
            return
        self.once.add(id(cell))
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            return
        yield Node(value, node, link)

    def method(self, node: Node, owner: object, fun: object) -> Iterator[Node]:
        argument = next(iter(positional(fun)), "self")
        # The function first: what it mentions is followed before what it could have read.
        yield Node(fun, node, Through("__func__"), home=node.home)
        yield Node(owner, node, Owner(argument, node.home))

    def partial(self, node: Node) -> Iterator[Node]:
        func, args, keywords = partial_parts(node.obj)
        names = positional(func)
        for index, value in enumerate(args):
            name = names[index] if index < len(names) else f"args[{index}]"
            yield Node(value, node, Bound(name, index, node.home))
        for name, value in by_name(keywords).items():
            yield Node(value, node, Bound(name, name, node.home))
        if node.home:
            yield from self.wrapped(node, func, "func")
        else:
            yield Node(func, node, Attribute("func"))

    def dictionary(self, node: Node, items: dict[object, object]) -> Iterator[Node]:
        for key, value in list(islice(dict.items(items), _WIDEST)):
            yield Node(value, node, Item(key))

    def sequence(self, node: Node) -> Iterator[Node]:
        obj: Any = node.obj
        base = next(cls for cls in (list, tuple, deque) if is_a(obj, cls))
        fields = next((d["_fields"] for d in map(class_dict, mro(type(obj))) if "_fields" in d), ())
        named = base is tuple and type(fields) is tuple and all(type(f) is str for f in fields)
        for index, value in enumerate(list(islice(base.__iter__(obj), _WIDEST))):
            field = named and index < len(fields)
            yield Node(value, node, Attribute(fields[index]) if field else Item(index))

    def unordered(self, node: Node) -> Iterator[Node]:
        """The members of a set, which have no name of their own."""
        obj: Any = node.obj
        base = set if is_a(obj, set) else frozenset
        for value in list(islice(base.__iter__(obj), _WIDEST)):
            yield Node(value, node, Member())

    def instance(self, node: Node) -> Iterator[Node]:
        obj = node.obj
        attrs = instance_dict(obj)
        layers = module_parts(obj)
        compiled = compiled_module(obj)
        if compiled is not None:  # it gives the attributes of what it wraps as its own
            yield from self.wrapped(node, compiled, "_orig_mod")
            return
        if self.bounds.is_opaque(type(obj)) and layers is None:
            yield from self.framework_wrapper(node, attrs)
            return
        items = _wrapped_items(type(obj), attrs)
        if "__self__" in attrs and "__func__" in attrs:  # a library's own kind of bound method
            yield from self.method(node, attrs["__self__"], attrs["__func__"])
        elif layers is not None:
            yield from self.layers(node, layers)
            skip: tuple[str, ...] = MODULE_PARTS
            # It may hold a second list of the parameters, say.
            if is_library(class_module(type(obj))):
                private = (key for key in attrs if key.startswith("_") and "hooks" not in key)
                skip = (*skip, *private)
            yield from self.attributes(node, attrs, skip=skip)
        elif items is not None:
            yield from self.dictionary(node, items)
        else:
            yield from self.attributes(node, attrs)
        for name, value in slot_values(obj):
            yield Node(value, node, Attribute(name))
        yield from self.class_attributes(node, type(obj), hidden=attrs)

    def layers(self, node: Node, parts: list[dict[str, object]]) -> Iterator[Node]:
        """The parameters, buffers and children of a module of layers; numbers are entries, and
        so is everything in one that is a mapping."""
        own = [class_dict(cls) for cls in mro(type(node.obj))]
        is_mapping = all(any(name in d for d in own) for name in ("__getitem__", "keys"))
        for part in parts:
            for key, value in by_name(part).items():
                number = int(key) if key.isdecimal() else None
                link = (
                    Item(key) if is_mapping else Attribute(key) if number is None else Item(number)
                )
                yield Node(value, node, link)

    def framework_wrapper(self, node: Node, attrs: dict[str, Any]) -> Iterator[Node]:
        """What a framework's object wraps, and functions of the user that it holds, no more."""
        for key, value in list(attrs.items()):
            if key == "__wrapped__":
                yield from self.wrapped(node, value, "__wrapped__")
            elif is_a(value, FunctionType, MethodType, functools.partial):
                # Such as the two rules of a custom derivative.
                yield Node(value, node, Attribute(key))
        if class_module(type(node.obj)).partition(".")[0] == "freevars":  # a `Closure`
            for key, value in (*slot_values(node.obj), *attrs.items()):
                if key == "_values" and type(value) is tuple:
                    yield Node(value, node, Attribute("values"))

    def attributes(
        self, node: Node, attrs: dict[str, object], skip: tuple[str, ...] = ()
    ) -> Iterator[Node]:
        for key, value in list(islice(dict.items(attrs), _WIDEST)):
            if key == "__wrapped__" and type(node.obj) is not FunctionType:
                yield from self.wrapped(node, value, "__wrapped__")
            elif key not in skip and not key.startswith("__"):
                yield Node(value, node, Attribute(key))

    def class_attributes(
        self, node: Node, cls: type, hidden: dict[str, object] | None = None
    ) -> Iterator[Node]:
        """Attributes and methods that live on a class, where some code mentions their names."""
        if hidden is not None:
            met = self.instances[id(cls)] = self.instances.get(id(cls), 0) + 1
            if met > _MOST_INSTANCES:
                return
        members = self.members.get(id(cls))
        if members is None:
            bases = [base for base in mro(cls) if not is_library(class_module(base))]
            self.members[id(cls)] = members = stored_members(bases)
        yield from self.mentions.holder(node, members, hidden or {})
        for key in (key for key in members if key.startswith("__") or key in self.implicit):
            # Operators and `__call__` run without a mention; `__init__` when a class is called.
            implicit = hidden is None or key not in _NOT_IMPLICIT
            if implicit and type(members[key]) is FunctionType:
                home = node.home and (key == "__call__" or key in self.implicit)
                yield Node(members[key], node, Attribute(key), home=home)


def _wrapped_items(cls: type, attrs: dict[str, Any]) -> dict[object, object] | None:
    """The entries of a user's mapping class that keeps them in one plain dict."""
    if any(base is Mapping for base in mro(cls)):
        for key in ("data", "_dict"):
            if is_a(attrs.get(key), dict):
                return attrs[key]  # type: ignore[no-any-return]
    return None
