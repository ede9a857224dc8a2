"""The kinds of links between objects, and how a person would write each of them.

A link adds its ``name`` to the name of what it starts from, and its ``path`` to the path. A
variable starts a name with its own. Names and paths are built only when asked for. Not here:
finding the links.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from freevars._names.introspection import key_text

__all__ = [
    "Attribute",
    "Bound",
    "Cell",
    "Default",
    "Global",
    "Home",
    "Item",
    "Link",
    "Member",
    "Node",
    "Owner",
    "Through",
]


class Link:
    """One step; ``starts`` says that a name starts here."""

    __slots__ = ()
    starts: bool = False

    @property
    def name(self) -> str:
        """What the step adds to the name, or the start of one."""
        raise NotImplementedError

    @property
    def path(self) -> str:
        """What the step adds to the path."""
        return self.name


@dataclass(slots=True)
class Home(Link):
    """The function asked about: its name, and what its path is called."""

    name: str
    path: str
    starts = True


@dataclass(slots=True)
class Cell(Link):
    """A variable of an enclosing function, bare (``starts``) in the function asked about."""

    variable: str
    starts: bool

    @property
    def name(self) -> str:
        return self.variable if self.starts else f".<closure {self.variable}>"

    @property
    def path(self) -> str:
        return f".__closure__[{self.variable!r}]"


@dataclass(slots=True)
class Global(Link):
    """A variable of a module, which is part of the name unless it is the function's own."""

    module: str
    variable: str
    starts = True

    @property
    def name(self) -> str:
        return f"{self.module}.{self.variable}" if self.module else self.variable

    @property
    def path(self) -> str:
        return f".__globals__[{self.variable!r}]"


@dataclass(slots=True)
class Default(Link):
    """The default of a parameter; ``holder`` is the attribute that keeps it."""

    holder: str
    parameter: str

    @property
    def name(self) -> str:
        return f".<default {self.parameter}>"

    @property
    def path(self) -> str:
        return f".{self.holder}[{self.parameter!r}]"


@dataclass(slots=True)
class Bound(Link):
    """An argument that a partial binds: its parameter, and its place (a number or a keyword)."""

    parameter: str
    where: int | str
    starts: bool

    @property
    def name(self) -> str:
        return self.parameter if self.starts else f".<partial {self.parameter}>"

    @property
    def path(self) -> str:
        if isinstance(self.where, int):
            return f".args[{self.where}]"
        return f".keywords[{key_text(self.where)}]"


@dataclass(slots=True)
class Owner(Link):
    """The object of a bound method, which the method calls by the name of its first parameter."""

    parameter: str
    starts: bool

    @property
    def name(self) -> str:
        return self.parameter if self.starts else self.path

    @property
    def path(self) -> str:
        return ".__self__"


@dataclass(slots=True)
class Attribute(Link):
    """An attribute, written as an entry where it cannot be written as one."""

    attribute: str

    @property
    def name(self) -> str:
        attribute = self.attribute
        return f".{attribute}" if attribute.isidentifier() else f"[{key_text(attribute)}]"


@dataclass(slots=True)
class Item(Link):
    """An entry of a container."""

    key: object

    @property
    def name(self) -> str:
        return f"[{key_text(self.key)}]"


@dataclass(slots=True)
class Member(Link):
    """One of a set, which has no name of its own."""

    @property
    def name(self) -> str:
        return "{…}"


@dataclass(slots=True)
class Through(Link):
    """What a wrapper wraps: it has the wrapper's name, or its own, ``home``."""

    attribute: str
    home: str = ""

    @property
    def starts(self) -> bool:  # type: ignore[override]
        return bool(self.home)

    @property
    def name(self) -> str:
        return self.home

    @property
    def path(self) -> str:
        return f".{self.attribute}"


class Node:
    """One object on the way, and the link that led to it."""

    __slots__ = ("home", "link", "obj", "parent")

    def __init__(
        self, obj: object, parent: "Node | None", link: Link, *, home: bool = False
    ) -> None:
        self.obj = obj
        self.parent = parent
        self.link = link
        # The function in question, or what it wraps: its variables have bare names.
        self.home = home

    def lineage(self) -> Iterator["Node"]:
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def names(self) -> tuple[str, str]:
        """Its name as a person would write it, and the whole path."""
        links = [node.link for node in self.lineage()]
        start = next((i for i, link in enumerate(links) if link.starts), len(links) - 1)
        name = "".join(link.name for link in reversed(links[: start + 1]))
        return name, "".join(link.path for link in reversed(links))
