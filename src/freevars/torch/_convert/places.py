"""The places where a function keeps its tensors: which variable, attribute or entry holds each.

A captured tensor is known by its *place*, a chain of links from the function: the cell `net`, its
attribute `_parameters`, the entry `'weight'`. A place means the same in a copy of the function and
in another process, where `id` does not, and it tells when a variable has been bound to something
else. `Search` looks at the function before its first run, so what that run changes is known too.

Nothing here runs code of what it looks at. Not here: the links themselves (`steps.py`), what a run
keeps in places (`kept.py`), and what a person would call a tensor (`_describe.py`).
"""

import functools
import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

from freevars._names.bounds import Bounds, is_library
from freevars._names.callables import codes
from freevars._names.introspection import class_dict, class_module, class_name, mro
from freevars.torch._convert import steps
from freevars.torch._convert.kept import Kept, holds
from freevars.torch._convert.packages import uses_torch
from freevars.torch._convert.steps import GONE, Link, Place
from freevars.torch._describe import enters

__all__ = ["Places", "Search"]

_WIDEST = 20_000  # entries looked at in one container
_MOST = 100_000  # objects looked at in one search
# Of one package without PyTorch: functions whose globals are followed, objects that are entered.
_MOST_STRANGE_FUNCTIONS = 20
_MOST_STRANGE_OBJECTS = 1_000
_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), type(...), range, slice})
_TORCH_ATOMS = frozenset({torch.dtype, torch.device, torch.layout, torch.Size, torch.Generator})
_PLAIN_DICTS = frozenset({dict, OrderedDict, defaultdict})  # which have no attributes to speak of
_SKIPPED = _ATOMS | _TORCH_ATOMS | {CodeType}


class _Object:
    """One object met by a search, and the link that led to it first."""

    __slots__ = ("link", "obj", "parent")

    def __init__(self, obj: Any, parent: "_Object | None", link: Link | None) -> None:
        self.obj, self.parent, self.link = obj, parent, link

    def place(self) -> Place:
        links: list[Link] = []
        step: _Object | None = self
        while step is not None and step.link is not None:
            links.append(step.link)
            step = step.parent
        return tuple(reversed(links))


Edge = tuple[Callable[[Any, Any], Any], Any, Any, Any]  # link, holder, what it holds


class Search:
    """What `fun` can reach now, breadth first, each object once; every link is noted."""

    def __init__(self, fun: Any) -> None:
        self.edges: list[Edge] = []
        self.met: dict[int, _Object] = {}
        self._dicts: list[tuple[_Object, Any, dict[Any, Any], dict[Any, Any]]] = []
        self._queue: deque[_Object] = deque()
        self._bounds = Bounds(enters)
        # How much there was of packages without PyTorch, by their name and how much there may be.
        self._strangers: Counter[tuple[str, int]] = Counter()
        self._link(None, None, None, fun)
        while self._queue and len(self.met) < _MOST:
            node = self._queue.popleft()
            self._inside(node, node.obj, type(node.obj))

    def _link(self, node: _Object | None, follow: Any, key: Any, obj: Any) -> None:
        """One more link, from the object at `node` (None: from nothing, to the function)."""
        kind = type(obj)
        if kind in _SKIPPED:
            return
        if node is not None:
            self.edges.append((follow, key, node.obj, obj))
        if id(obj) not in self.met:
            link = None if node is None else (follow, key)
            self.met[id(obj)] = met = _Object(obj, node, link)
            if not issubclass(kind, Tensor):
                self._queue.append(met)

    def _inside(self, node: _Object, obj: Any, kind: type) -> None:  # noqa: C901 (one arm a kind)
        if kind in _PLAIN_DICTS:  # a module has a dozen of them
            self._entries(node, obj)
        elif kind is FunctionType:
            self._function(node, obj)
        elif kind is MethodType:
            self._link(node, steps.part, "__func__", obj.__func__)
            self._link(node, steps.part, "__self__", obj.__self__)
        elif issubclass(kind, dict):
            self._entries(node, obj)
            self._instance(node, obj, kind)
        elif issubclass(kind, list | tuple):
            base: Any = list if issubclass(kind, list) else tuple
            for i, x in enumerate(base.__iter__(obj)) if base.__len__(obj) <= _WIDEST else ():
                self._link(node, steps.item, i, x)
        elif issubclass(kind, functools.partial):
            for name in ("func", "args", "keywords"):
                self._link(node, steps.part, name, getattr(obj, name))
        elif issubclass(kind, type):
            self._members(node, obj)
        elif not issubclass(kind, ModuleType):
            self._instance(node, obj, kind)

    def _entries(self, node: _Object, obj: dict[Any, Any]) -> None:
        if dict.__len__(obj) <= _WIDEST:
            before = dict(dict.items(obj))
            for key, x in before.items():
                self._link(node, steps.entry, key, x)
            self._dicts.append((node, steps.entry, obj, before))

    def _function(self, node: _Object, fun: FunctionType) -> None:
        names = tuple(dict.fromkeys(n for code in codes(fun.__code__) for n in code.co_names))
        for i, c in enumerate(fun.__closure__ or ()):
            try:
                self._variable(node, steps.cell, i, c.cell_contents, names)
            except ValueError:  # not filled yet
                continue
        for i, x in enumerate(fun.__defaults__ or ()):
            self._variable(node, steps.default, i, x, names)
        for name, x in (fun.__kwdefaults__ or {}).items():
            self._variable(node, steps.keyword_default, name, x, names)
        for name, x in fun.__dict__.items():
            self._link(node, steps.attribute, name, x)
        module = fun.__globals__.get("__name__")
        if not is_library(module) and self._is_searched(module, _MOST_STRANGE_FUNCTIONS):
            for name in names:
                self._variable(node, steps.variable, name, fun.__globals__.get(name), names)

    def _variable(
        self, node: _Object, follow: Any, key: Any, x: Any, names: Sequence[str], depth: int = 0
    ) -> None:
        """What a function reads by a name; a module is entered by the names that its code mentions,
        and no others."""
        if not issubclass(type(x), ModuleType):
            self._link(node, follow, key, x)
        elif depth < 4 and not is_library(x.__dict__.get("__name__")):  # noqa: PLR2004 (packages are no deeper)
            inner = _Object(x, node, (follow, key))
            self.edges.append((follow, key, node.obj, x))
            for name in names:
                self._variable(inner, steps.attribute, name, x.__dict__.get(name), names, depth + 1)

    def _instance(self, node: _Object, obj: Any, kind: type) -> None:
        try:
            attributes = object.__getattribute__(obj, "__dict__")
        except AttributeError:
            attributes = None
        if self._bounds.is_opaque(kind) and not _is_ours(kind):
            if attributes and "__wrapped__" in attributes:
                self._link(node, steps.attribute, "__wrapped__", attributes["__wrapped__"])
            return
        if not self._is_searched(class_module(kind), _MOST_STRANGE_OBJECTS):
            return
        if attributes is not None:
            before = dict(attributes)
            for name, x in before.items():
                self._link(node, steps.attribute, name, x)
            self._dicts.append((node, steps.attribute, attributes, before))
        self._slots(node, obj, kind)
        self._link(node, steps.part, "__class__", kind)

    def _slots(self, node: _Object, obj: Any, kind: type) -> None:
        for base in mro(kind)[:-1]:
            slots = class_dict(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else tuple(slots):
                mangled = name
                if name.startswith("__") and not name.endswith("__"):
                    mangled = f"_{class_name(base).lstrip('_')}{name}"
                try:
                    self._link(node, steps.slot, mangled, object.__getattribute__(obj, mangled))
                except AttributeError:
                    continue

    def _members(self, node: _Object, cls: type) -> None:
        for i, base in enumerate(mro(cls)[:-1]):
            if not is_library(class_module(base)):
                for name, x in list(class_dict(base).items()):
                    self._link(node, steps.member, (i, name), steps.plain_member(x))

    def _is_searched(self, module: object, most: int) -> bool:
        """Whether to look into one more function or object of this module. Those of a plotting or
        testing library lead to tens of thousands of others; but somebody may have put a tensor into
        a small module that does not know PyTorch, settings say."""
        if uses_torch(module):
            return True
        key = str(module).partition(".")[0], most
        self._strangers[key] += 1
        return self._strangers[key] <= most

    def kept(self, made: Mapping[int, Tensor]) -> "Kept":
        """What the run has put into attributes and entries, where it is one of the tensors that the
        run `made`, by id, or holds one."""
        found = []
        for node, follow, now, before in self._dicts:
            if len(now) == len(before) and all(map(operator.is_, now.values(), before.values())):
                continue
            for key, x in list(dict.items(now)):
                if x is not before.get(key, GONE) and holds(x, made):
                    found.append((node.place(), follow, key, before.get(key, GONE)))
        return Kept(tuple(found))


def _is_ours(kind: type) -> bool:
    """Whether it is one of our own classes that hold tensors of the user."""
    known = class_name(kind) in {"Closure", "Converted", "ImplicitSolver"}
    return known and class_module(kind).startswith("freevars.")


class Places:
    """Where each of some tensors is kept: their positions in a sequence, and the links to them."""

    def __init__(self, search: Search, tensors: Sequence[Tensor]) -> None:
        met = [search.met.get(id(t)) for t in tensors]
        self.first = tuple(None if node is None else node.place() for node in met)
        self._position = {id(t): i for i, t in enumerate(tensors)}
        into: dict[int, list[Edge]] = {}
        for edge in search.edges:
            into.setdefault(id(edge[3]), []).append(edge)
        found = [id(t) for t, node in zip(tensors, met, strict=True) if node is not None]
        leading = set(found)
        self._out: dict[int, list[Edge]] = {}
        self._checked: list[Edge] = []
        for key in found:  # grows while it is walked
            for edge in into.get(key, ()):
                self._out.setdefault(id(edge[2]), []).append(edge)
                if edge[0] is not steps.part:
                    self._checked.append(edge)
                if id(edge[2]) not in leading:
                    leading.add(id(edge[2]))
                    found.append(id(edge[2]))

    def forget_removed(self) -> None:
        """Forgets the ways that the first run has removed (the hooks of a lazy module)."""
        gone = {id(e) for e in self._checked if steps.read(e[0], e[2], e[1]) is GONE}
        self._checked = [e for e in self._checked if id(e) not in gone]
        self._out = {k: [e for e in out if id(e) not in gone] for k, out in self._out.items()}

    def unchanged(self) -> bool:
        """Whether every variable, attribute and entry on the way holds what it held."""
        try:
            return all(link(holder, key) is held for link, key, holder, held in self._checked)
        except steps.MISSING:
            return False

    def now(self, fun: Any) -> Iterator[tuple[int, Any]]:
        """What is in the places by now, each with the position of the tensor that was there; `GONE`
        where the way to it is."""
        return self._below(fun, fun, set())

    def _below(self, then: Any, now: Any, seen: set[tuple[int, int]]) -> Iterator[tuple[int, Any]]:
        position = self._position.get(id(then))
        if position is not None:
            yield position, now
        elif (id(then), id(now)) not in seen:
            seen.add((id(then), id(now)))
            for link, key, _, held in self._out.get(id(then), ()):
                yield from self._below(held, steps.read(link, now, key), seen)
