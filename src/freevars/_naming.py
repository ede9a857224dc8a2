"""Who is called what: find the names under which a function can reach given objects.

The walk starts at a function and follows what its code can read: closure cells, the globals that it
mentions, default arguments, the bound ``self``, attributes, partial arguments, containers, and the
functions among them. It goes breadth first, so the shortest way comes first, and compares objects by
identity alone. It runs no code of what it meets (see ``_inert``), visits a bounded number of objects,
and stays out of framework internals. Not here: which values a function captures (the host finds them
by running it) and how a report shows the names.
"""

import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any

from freevars._inert import (
    class_dict,
    class_module,
    class_name,
    instance_dict,
    is_a,
    key_text,
    mro,
    slot_values,
)

__all__ = ["Name", "function_name", "name_values"]

# Whose instances and functions are never entered; their containers and wrappers are looked through.
FRAMEWORKS = frozenset({"jax", "jaxlib", "torch", "numpy", "scipy", "freevars"})

_BUDGET = 100_000  # objects looked at in one walk
_BUDGET_AFTER = 10_000  # objects still looked at for second names, once every value has a first
_WIDEST = 20_000  # entries looked at in one container, so that a huge one does not eat the budget
_MOST_NAMES = 4  # names listed for one value
_MOST_VISITS = 2  # how often one container is opened: a second way to it gives second names
_LONGEST_ANCESTRY = 200  # links followed upwards when looking for a cycle

_NO_IDENTITY = (bool, int, str, bytes, type(None))  # shared by the interpreter: identity says nothing
_ATOMS = frozenset({*_NO_IDENTITY, float, complex, range, slice, CodeType, type(...), object})
_STDLIB = frozenset(sys.stdlib_module_names)
_STDLIB_CONTAINERS = frozenset({"argparse", "collections", "types"})
_MODULE_PARTS = ("_parameters", "_buffers", "_modules")  # a module of layers is known by these dicts
_NOT_IMPLICIT = frozenset({"__init__", "__new__", "__del__", "__init_subclass__", "__repr__"})
_MISSING: Any = object()


@dataclass(frozen=True)
class Name:
    """One way to reach a captured value: ``name`` as a person writes it, ``path`` in full."""

    name: str
    path: str


def name_values(
    fun: Callable[..., object],
    values: Sequence[object],
    *,
    is_leaf: Callable[[object], bool] | None = None,
    opaque: frozenset[str] = FRAMEWORKS,
) -> list[tuple[Name, ...]]:
    """The names under which ``fun`` reaches each of ``values``, in the order of the values.

    The shortest honest path comes first, and a value reachable under several names lists up to four;
    an unreachable one gets an empty tuple. Values are compared by identity, so pass the very objects
    that the function can reach. Integers, strings, booleans and ``None`` have no identity and are
    never named. Nothing that the walk meets is called, compared, hashed or iterated with its own code.

    Arguments: ``fun``, any callable; ``values``, the objects to name; ``is_leaf``, says of an object
    whether it is an array that the walk must not enter (it is called with every object, so it must
    look at ``type(obj)`` alone); ``opaque``, the root packages whose functions and instances are not
    entered (``__wrapped__`` is followed, and so are containers, partials and modules of layers).

    >>> w = object()
    >>> params = {"dense": {"kernel": w}}
    >>> name_values(lambda x: (x, params), [w])[0][0].name
    "params['dense']['kernel']"
    """
    return _Walk(fun, values, is_leaf, opaque).names()


def function_name(fun: object) -> str:
    """A short name for any callable: ``objective``, ``Model.loss``, ``partial(loss)``, ``<Model object>``."""
    if type(fun) is FunctionType:
        return fun.__qualname__.rpartition("<locals>.")[2]
    if type(fun) is MethodType:
        return function_name(fun.__func__)
    if is_a(fun, functools.partial):
        return f"partial({function_name(_partial_parts(fun)[0])})"
    if is_a(fun, type):
        return class_name(fun)  # type: ignore[arg-type]
    attrs = instance_dict(fun)
    for inner in (attrs.get("__wrapped__"), attrs.get("__func__")):
        if inner is not None and inner is not fun:
            return function_name(inner) if type(inner) is FunctionType else class_name(type(inner))
    return f"<{class_name(type(fun))} object>"


class _Node:
    """One object on the way, with the link that led to it. Names are put together only when asked."""

    __slots__ = ("home", "obj", "parent", "path", "show")

    def __init__(
        self, obj: object, parent: "_Node | None", show: str | None, path: str, *, home: bool = False
    ) -> None:
        self.obj = obj
        self.parent = parent
        self.show = show  # added to the parent's name; a leading NUL starts a new name
        self.path = path  # added to the parent's path
        self.home = home  # the function asked about, or what it wraps: its variables go by bare names

    def lineage(self) -> Iterator["_Node"]:
        node: _Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def name(self) -> Name:
        shown: list[str] = []
        for node in self.lineage():
            if node.show is not None and node.show.startswith("\0"):
                shown.append(node.show[1:])
                break
            shown.append(node.show or "")
        path = [node.path for node in self.lineage()]
        return Name("".join(reversed(shown)), "".join(reversed(path)))


class _ExhaustedError(Exception):
    """The walk has looked at as many objects as it may."""


class _Walk:
    """One breadth-first walk. Keeps every object that it has met alive, so that no id is reused."""

    def __init__(
        self,
        fun: Callable[..., object],
        values: Sequence[object],
        is_leaf: Callable[[object], bool] | None,
        opaque: frozenset[str],
    ) -> None:
        self.values = values
        self.is_leaf = is_leaf
        self.opaque = opaque
        self.found: dict[int, list[Name]] = {
            id(value): [] for value in values if type(value) not in _NO_IDENTITY
        }
        self.unnamed = len(self.found)
        self.budget = _BUDGET
        self.queue: deque[_Node] = deque()
        self.visits: dict[int, int] = {}
        self.kept: list[object] = []
        self.once: set[object] = set()  # cells and globals: a variable has one name
        self.mentioned: dict[str, None] = {}  # every name in the code read so far
        self.namespaces: list[tuple[_Node, Mapping[str, Any]]] = []
        self.opacity: dict[type, bool] = {}
        root = _Node(fun, None, _home_name(fun), function_name(fun), home=True)
        inner = _unwrapped(fun)
        self.scope = _scope(inner) if type(inner) is FunctionType else ""
        self.globals = inner.__globals__ if type(inner) is FunctionType else None
        self.root = root

    def names(self) -> list[tuple[Name, ...]]:
        if self.found:
            try:
                self.push(self.root)
                while self.queue:
                    self.expand(self.queue.popleft())
            except _ExhaustedError:
                pass
        users: dict[str, set[int]] = {}
        for key, names in self.found.items():
            for name in names:
                users.setdefault(name.name, set()).add(key)

        def told_apart(name: Name) -> Name:  # two values under one name: only the paths tell them apart
            return name if len(users[name.name]) == 1 else Name(name.path, name.path)

        named = (self.found.get(id(value), []) for value in self.values)
        return [tuple(told_apart(name) for name in names) for names in named]

    def push(self, node: _Node) -> None:
        """Take note of one object: is it looked for, and is there anything inside?"""
        self.budget -= 1
        if self.budget < 0:
            raise _ExhaustedError
        obj = node.obj
        names = self.found.get(id(obj))
        if names is not None:
            self.match(node, names)
            return
        if type(obj) in _ATOMS or (self.is_leaf is not None and self.is_leaf(obj)):
            return
        visits = self.visits.get(id(obj), 0)
        if visits:
            shared = is_a(obj, FunctionType, ModuleType, type)
            if shared or visits >= _MOST_VISITS or self.inside_itself(node):
                return
        else:
            self.kept.append(obj)
        self.visits[id(obj)] = visits + 1
        self.queue.append(node)

    def match(self, node: _Node, names: list[Name]) -> None:
        if len(names) >= _MOST_NAMES:
            return
        name = node.name()
        if all(name.name != other.name for other in names):
            names.append(name)
        if len(names) == 1:
            self.unnamed -= 1
            if self.unnamed == 0:
                self.budget = min(self.budget, _BUDGET_AFTER)

    def inside_itself(self, node: _Node) -> bool:
        ancestors = islice(node.lineage(), 1, _LONGEST_ANCESTRY + 1)
        depth = 0
        for depth, ancestor in enumerate(ancestors, 1):  # noqa: B007 (used after the loop)
            if ancestor.obj is node.obj:
                return True
        return depth == _LONGEST_ANCESTRY

    # What is inside: one method for each kind of object.

    def expand(self, node: _Node) -> None:
        obj = node.obj
        kind = type(obj)
        if kind is FunctionType:
            self.function(node, obj)  # type: ignore[arg-type]
        elif kind is MethodType:
            self.method(node, obj.__self__, obj.__func__)  # type: ignore[attr-defined]
        elif kind in (BuiltinFunctionType, MethodWrapperType):  # `w.dot`, `w.__matmul__`
            self.push(_Node(obj.__self__, node, ".__self__", ".__self__"))  # type: ignore[attr-defined]
        elif kind is CellType:
            self.cell(node, obj, None, ".cell_contents")  # type: ignore[arg-type]
        elif is_a(obj, ModuleType):
            root = str(instance_dict(obj).get("__name__")).partition(".")[0]
            if root not in self.opaque and root not in _STDLIB:
                self.namespace(node, instance_dict(obj))
        elif is_a(obj, type):
            self.class_attributes(node, obj)  # type: ignore[arg-type]
        else:
            if is_a(obj, functools.partial):
                self.partial(node)
            elif is_a(obj, dict):
                self.dictionary(node, obj)  # type: ignore[arg-type]
            elif is_a(obj, list, tuple, deque):
                self.sequence(node)
            self.instance(node)

    def function(self, node: _Node, fun: FunctionType) -> None:
        attrs = instance_dict(fun)
        if "__wrapped__" in attrs:  # first, so that a wrapped function goes by its own names
            self.wrapped(node, attrs["__wrapped__"], ".__wrapped__")
        module = dict.get(fun.__globals__, "__name__")
        module = module if type(module) is str else ""
        root = module.partition(".")[0]
        if root in self.opaque or root in _STDLIB:
            return
        bare = node.home or (self.scope != "" and _scope(fun) == self.scope)
        for variable, cell in zip(fun.__code__.co_freevars, fun.__closure__ or (), strict=True):
            show = f"\0{variable}" if bare else f".<closure {variable}>"
            self.cell(node, cell, show, f".__closure__[{variable!r}]")
        positional = fun.__code__.co_varnames[: fun.__code__.co_argcount]
        defaults = fun.__defaults__ or ()
        for argument, value in zip(positional[len(positional) - len(defaults) :], defaults, strict=True):
            self.push(_Node(value, node, f".<default {argument}>", f".__defaults__[{argument!r}]"))
        for argument, value in (fun.__kwdefaults__ or {}).items():
            self.push(_Node(value, node, f".<default {argument}>", f".__kwdefaults__[{argument!r}]"))
        prefix = "" if fun.__globals__ is self.globals or not module else f"{module}."
        names = {name: None for code in _codes(fun.__code__) for name in code.co_names}
        for name in names:
            value = dict.get(fun.__globals__, name, _MISSING)
            if value is not _MISSING and (id(fun.__globals__), name) not in self.once:
                self.once.add((id(fun.__globals__), name))
                self.push(_Node(value, node, f"\0{prefix}{name}", f".__globals__[{name!r}]"))
        self.attributes(node, attrs)
        self.mention(names)

    def wrapped(self, node: _Node, inner: object, path: str) -> None:
        """What a wrapper wraps goes by the wrapper's name, or by its own in the function asked about."""
        show = _home_name(inner) if node.home else None
        self.push(_Node(inner, node, show, path, home=node.home))

    def cell(self, node: _Node, cell: CellType, show: str | None, path: str) -> None:
        if id(cell) in self.once:
            return
        self.once.add(id(cell))
        self.kept.append(cell)
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            return
        self.push(_Node(value, node, show, path))

    def method(self, node: _Node, owner: object, fun: object) -> None:
        argument = next(iter(_positional(fun)), "self")
        show = f"\0{argument}" if node.home else ".__self__"
        # The function first: what it mentions is followed before what it could have read.
        self.push(_Node(fun, node, None, ".__func__", home=node.home))
        self.push(_Node(owner, node, show, ".__self__"))

    def partial(self, node: _Node) -> None:
        func, args, keywords = _partial_parts(node.obj)
        names = _positional(func)
        for index, value in enumerate(args):
            name = names[index] if index < len(names) else f"args[{index}]"
            show = f"\0{name}" if node.home else f".<partial {name}>"
            self.push(_Node(value, node, show, f".args[{index}]"))
        for name, value in dict.items(keywords):
            show = f"\0{name}" if node.home else f".<partial {name}>"
            self.push(_Node(value, node, show, f".keywords[{key_text(name)}]"))
        if node.home:
            self.wrapped(node, func, ".func")
        else:
            self.push(_Node(func, node, ".func", ".func"))

    def dictionary(self, node: _Node, items: dict[object, object]) -> None:
        for key, value in list(islice(dict.items(items), _WIDEST)):
            if type(value) not in _ATOMS or id(value) in self.found:
                link = f"[{key_text(key)}]"
                self.push(_Node(value, node, link, link))

    def sequence(self, node: _Node) -> None:
        obj: Any = node.obj
        base = next(cls for cls in (list, tuple, deque) if is_a(obj, cls))
        fields = next((d["_fields"] for d in map(class_dict, mro(type(obj))) if "_fields" in d), ())
        named = base is tuple and type(fields) is tuple and all(type(f) is str for f in fields)
        for index, value in enumerate(islice(base.__iter__(obj), _WIDEST)):
            if type(value) not in _ATOMS or id(value) in self.found:
                link = f".{fields[index]}" if named and index < len(fields) else f"[{index}]"
                self.push(_Node(value, node, link, link))

    def instance(self, node: _Node) -> None:
        obj = node.obj
        attrs = instance_dict(obj)
        layers = [attrs.get(part) for part in _MODULE_PARTS]
        is_module = all(is_a(part, dict) for part in layers)
        if self.is_opaque(type(obj)) and not is_module:
            # A framework's wrapper: what it wraps goes by its own names, nothing else is entered
            # but a user's functions, such as the two rules of a custom derivative.
            for key, value in list(dict.items(attrs)):
                if key == "__wrapped__":
                    self.wrapped(node, value, ".__wrapped__")
                elif is_a(value, FunctionType, MethodType, functools.partial):
                    self.push(_Node(value, node, f".{key}", f".{key}"))
            return
        if "__self__" in attrs and "__func__" in attrs:  # a bound method of a framework's own making
            self.method(node, attrs["__self__"], attrs["__func__"])
        if is_module:
            for part in layers:
                for key, value in dict.items(part):  # type: ignore[arg-type]
                    link = f"[{key}]" if str.isdecimal(key) else _attribute(key)
                    self.push(_Node(value, node, link, link))
        if _wraps_mapping(type(obj), attrs):  # a mapping of a user's class around one plain dict
            self.dictionary(node, next(v for k, v in attrs.items() if k in ("data", "_dict")))
        else:
            self.attributes(node, attrs, skip=_MODULE_PARTS if is_module else ())
        for name, value in slot_values(obj):
            self.push(_Node(value, node, f".{name}", f".{name}"))
        self.class_attributes(node, type(obj), hidden=attrs)

    def attributes(
        self, node: _Node, attrs: Mapping[str, object], skip: tuple[str, ...] = ()
    ) -> None:
        for key, value in list(islice(attrs.items(), _WIDEST)):
            if key == "__wrapped__" and type(node.obj) is not FunctionType:
                self.wrapped(node, value, ".__wrapped__")
            elif key not in skip and not (is_a(key, str) and key.startswith("__")):
                self.push(_Node(value, node, _attribute(key), _attribute(key)))

    def class_attributes(
        self, node: _Node, cls: type, hidden: Mapping[str, object] | None = None
    ) -> None:
        """Attributes and methods that live on a class, where some code mentions their names."""
        seen = dict.fromkeys(hidden or ())
        for base in mro(cls):
            root = class_module(base).partition(".")[0]
            if root in self.opaque or root in _STDLIB:
                continue
            own = {k: v for k, v in class_dict(base).items() if k not in seen}
            seen |= dict.fromkeys(own)
            members = {key: _underlying(value) for key, value in own.items()}
            self.namespace(node, {k: v for k, v in members.items() if v is not _MISSING})
            for key, value in members.items():  # operators and `__call__` are read without a mention
                if key.startswith("__") and key not in _NOT_IMPLICIT and type(value) is FunctionType:
                    home = node.home and key == "__call__"
                    self.push(_Node(value, node, f".{key}", f".{key}", home=home))

    def namespace(self, node: _Node, members: Mapping[str, Any]) -> None:
        """Follow the members that code mentions, now and when more code has been read."""
        self.namespaces.append((node, members))
        for name in self.mentioned:
            if name in members:
                self.push(_Node(members[name], node, f".{name}", f".{name}"))

    def mention(self, names: Mapping[str, None]) -> None:
        new = [name for name in names if name not in self.mentioned]
        self.mentioned |= dict.fromkeys(new)
        for node, members in self.namespaces:
            for name in new:
                if name in members:
                    self.push(_Node(members[name], node, f".{name}", f".{name}"))

    def is_opaque(self, cls: type) -> bool:
        known = self.opacity.get(cls)
        if known is None:
            roots = {class_module(base).partition(".")[0] for base in mro(cls)}
            own = class_module(cls).partition(".")[0]
            known = bool(roots & self.opaque) or (own in _STDLIB and own not in _STDLIB_CONTAINERS)
            self.opacity[cls] = known
        return known


def _home_name(fun: object) -> str:
    """What names start with in the function asked about; the code of a callable object says ``self``."""
    plain = is_a(fun, FunctionType, MethodType, functools.partial)
    return f"\0{function_name(fun)}" if plain else "\0self"


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if type(const) is CodeType:
            yield from _codes(const)


def _scope(fun: object) -> str:
    """The function in which a nested function was written; empty for one at module level."""
    return fun.__qualname__.rpartition("<locals>.")[0] if type(fun) is FunctionType else ""


def _partial_parts(obj: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
    parts = (functools.partial.__dict__[part].__get__(obj) for part in ("func", "args", "keywords"))
    func, args, keywords = parts
    return func, args, keywords


def _unwrapped(fun: object) -> object:
    """The plain function under methods, partials and wrappers, as far as they can be looked through."""
    for _ in range(_LONGEST_ANCESTRY):
        attrs = instance_dict(fun)
        if type(fun) is MethodType:
            fun = fun.__func__
        elif is_a(fun, functools.partial):
            fun = _partial_parts(fun)[0]
        elif "__wrapped__" in attrs:
            fun = attrs["__wrapped__"]
        elif "__func__" in attrs:
            fun = attrs["__func__"]
        elif type(fun) is FunctionType:
            return fun
        else:
            dicts = (class_dict(cls) for cls in mro(type(fun)))
            call = next((d["__call__"] for d in dicts if "__call__" in d), None)
            return call if type(call) is FunctionType else fun
    return fun


def _positional(fun: object) -> list[str]:
    """The parameters that positional arguments fill, in order, as far as they are known."""
    if is_a(fun, functools.partial):
        func, args, keywords = _partial_parts(fun)
        return [name for name in _positional(func)[len(args) :] if name not in keywords]
    if type(fun) is MethodType:
        return _positional(fun.__func__)[1:]
    inner = _unwrapped(fun)
    if type(inner) is not FunctionType:
        return []
    names = list(inner.__code__.co_varnames[: inner.__code__.co_argcount])
    is_call = type(fun) is not FunctionType and "__wrapped__" not in instance_dict(fun)
    return names[1:] if is_call else names


def _underlying(member: Any) -> Any:  # noqa: ANN401
    """What a class attribute leads to: the function under a method or property, else the value."""
    kind = type(member)
    if kind in (FunctionType, type):
        return member
    if kind is property:
        return member.fget
    if kind in (staticmethod, classmethod):
        return member.__func__
    if kind is functools.cached_property:
        return member.func
    # Any other descriptor computes its value: what it holds is not what the attribute gives.
    is_descriptor = any("__get__" in class_dict(cls) for cls in mro(kind))
    return _MISSING if is_descriptor and not is_a(member, type) else member


def _wraps_mapping(cls: type, attrs: Mapping[str, object]) -> bool:
    is_mapping = any(base is Mapping for base in mro(cls))
    return is_mapping and any(is_a(attrs.get(key), dict) for key in ("data", "_dict"))


def _attribute(key: object) -> str:
    if is_a(key, str):
        text = str.__str__(key)  # type: ignore[arg-type]
        if text.isidentifier():
            return f".{text}"
    return f"[{key_text(key)}]"
