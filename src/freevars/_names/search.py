"""Find the names under which a function can reach given objects.

The walk starts at a function and follows what its code can read (see ``object_graph``), breadth
first, so that the shortest path comes first, and compares objects by identity alone. It runs no
code of the objects, visits a bounded number of them, and stays out of framework internals. Not
here: which values a function captures (the host finds them by running it) and how a report shows
the names.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import islice
from types import CellType, CodeType, FunctionType, MethodType, ModuleType

from freevars._names.bounds import FRAMEWORKS
from freevars._names.callables import function_name
from freevars._names.introspection import is_a
from freevars._names.links import Node
from freevars._names.object_graph import ObjectGraph

__all__ = ["FRAMEWORKS", "Name", "ReachableLeaves", "function_name", "name_values"]

_BUDGET = 100_000  # objects looked at in one walk
_BUDGET_AFTER = 10_000  # objects still looked at for second names, once every value has a first
_MOST_NAMES = 4  # names listed for one value
_MOST_VISITS = 2  # how often one container is opened: a second way to it gives second names
_DEEPEST = 200  # links followed upwards when looking for a cycle

# Types whose values the interpreter shares, so that identity says nothing, and types with nothing
# inside; by id, since hashing a class can run code.
_NO_IDENTITY = frozenset(map(id, (bool, int, str, bytes, type(None))))
_ATOMS = _NO_IDENTITY | frozenset(
    map(id, (float, complex, range, slice, CodeType, type(...), object))
)


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
    identity: Callable[[object], Hashable] = id,
    enters: Callable[[type], bool] | None = None,
    implicit: frozenset[str] = frozenset(),
) -> list[tuple[Name, ...]]:
    """The names under which ``fun`` reaches each of ``values``, in the order of the values.

    The shortest honest path comes first, and a value reachable under several names lists up to
    four; an unreachable one gets an empty tuple. Values are compared by identity, so pass the very
    objects that the function can reach, or an ``identity`` that sees through what is around them.
    Integers, strings, booleans and ``None`` have no identity and are never named. Nothing that the
    walk meets is called, compared, hashed or iterated with its own code.

    Arguments: ``fun``, any callable; ``values``, the objects to name; ``is_leaf``, says of an
    object whether it is an array that the walk must not enter (it is called with every object, so
    it must look at ``type(obj)`` alone); ``identity``, what tells one array from another, for a
    host that wraps arrays afresh: the address of their memory, say (it is called with leaves only);
    ``enters``, says of a class with a framework's among its bases that its instances are entered,
    as else only containers, partials, modules of layers and what wraps a function are;
    ``implicit``, names of methods that the host's framework calls, so that no code of the user need
    mention them.

    Example:
        >>> w = object()
        >>> params = {"dense": {"kernel": w}}
        >>> name_values(lambda x: (x, params), [w])[0][0].name
        "params['dense']['kernel']"
    """
    walk = _Search(ObjectGraph(enters, implicit), values, is_leaf or _never, identity)
    walk.run(fun)
    found = [tuple(walk.found.get(key, ())) for key in walk.keys]
    users: dict[str, set[Hashable]] = {}
    for key, names in zip(walk.keys, found, strict=True):
        for name in names:
            users.setdefault(name.name, set()).add(key)

    def told_apart(name: Name) -> Name:  # two values under one name: only the paths tell them apart
        return name if len(users[name.name]) == 1 else Name(name.path, name.path)

    return [tuple(told_apart(name) for name in names) for names in found]


class ReachableLeaves:
    """Every leaf that functions can reach, each once, with its shortest name; sets are entered too.

    The arguments are those of ``name_values``, and the search has the same limits. It can be asked
    about several functions in turn: what was opened before is not opened again, except for
    functions, whose variables may have changed. It keeps everything that it has opened alive.
    """

    def __init__(
        self,
        is_leaf: Callable[[object], bool],
        *,
        enters: Callable[[type], bool] | None = None,
        implicit: frozenset[str] = frozenset(),
    ) -> None:
        self._found: dict[int, tuple[object, Name]] = {}
        reach = ObjectGraph(enters, implicit, sets=True)
        self._walk = _Search(reach, (), is_leaf, id, self._found)

    def of(self, fun: object) -> list[tuple[object, Name]]:
        """Those that ``fun`` can reach and that were not met before."""
        before = len(self._found)
        self._walk.run(fun)
        return list(islice(self._found.values(), before, None))


def _never(obj: object) -> bool:  # noqa: ARG001 (stands for a host's `is_leaf`)
    return False


class _ExhaustedError(Exception):
    """The walk has looked at as many objects as it may."""


class _Search:
    """Breadth-first walks. It keeps every object that it opens, so that no id is reused."""

    def __init__(
        self,
        reach: ObjectGraph,
        values: Sequence[object],
        is_leaf: Callable[[object], bool],
        identity: Callable[[object], Hashable],
        leaves: dict[int, tuple[object, Name]] | None = None,
    ) -> None:
        self.is_leaf = is_leaf
        self.identity = identity
        self.keys = [identity(value) if is_leaf(value) else id(value) for value in values]
        self.found: dict[Hashable, list[Name]] = {
            key: []
            for key, value in zip(self.keys, values, strict=True)
            if id(type(value)) not in _NO_IDENTITY
        }
        self.unnamed = len(self.found)
        self.budget = 0
        self.queue: deque[Node] = deque()
        self.visits: dict[int, int] = {}
        self.keep_alive: list[object] = []
        self.functions: list[int] = []  # that this walk has opened
        self.reach = reach
        self.leaves = leaves  # where given, takes every leaf, whatever is looked for
        self.most_visits = _MOST_VISITS if leaves is None else 1

    def run(self, fun: object) -> None:
        if not self.found and self.leaves is None:
            return
        for key in self.functions:
            del self.visits[key]
        self.functions.clear()
        self.budget = _BUDGET
        try:
            self.visit(self.reach.start(fun))
            while self.queue:
                for node in self.reach.inside(self.queue[0]):
                    self.visit(node)
                self.queue.popleft()
        except _ExhaustedError:  # the next walk goes on with what is left in the queue
            return

    def visit(self, node: Node) -> None:
        """Visit one object: record it if it is a target, and decide whether to look inside."""
        self.budget -= 1
        if self.budget < 0:
            raise _ExhaustedError
        obj = node.obj
        is_leaf = self.is_leaf(obj)
        if is_leaf and self.leaves is not None and id(obj) not in self.leaves:
            self.leaves[id(obj)] = obj, Name(*node.names())
        names = self.found.get(self.identity(obj) if is_leaf else id(obj))
        if names is not None:
            self.match(node, names)
        if names is not None or is_leaf or id(type(obj)) in _ATOMS:
            return
        visits = self.visits.get(id(obj), 0)
        if visits:
            shared = is_a(obj, FunctionType, ModuleType, type)
            if shared or visits >= self.most_visits or _inside_itself(node):
                return
        else:
            self.keep_alive.append(obj)
            if is_a(obj, FunctionType, MethodType, CellType):
                self.functions.append(id(obj))
        self.visits[id(obj)] = visits + 1
        self.queue.append(node)

    def match(self, node: Node, names: list[Name]) -> None:
        if len(names) >= _MOST_NAMES:
            return
        name = Name(*node.names())
        if all(name.name != other.name for other in names):
            names.append(name)
        if len(names) == 1:
            self.unnamed -= 1
            if self.unnamed == 0:
                self.budget = min(self.budget, _BUDGET_AFTER)


def _inside_itself(node: Node) -> bool:
    depth = 0
    for ancestor in islice(node.lineage(), 1, _DEEPEST + 1):
        if ancestor.obj is node.obj:
            return True
        depth += 1
    return depth == _DEEPEST
