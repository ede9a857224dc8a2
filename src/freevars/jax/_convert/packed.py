"""The plain data that stand for a program, which any pickler accepts.

A program becomes a table of the programs nested in it, each a list of equations over numbered
variables. Not here: the way there (`pack`) and back (`unpack`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = [
    "Equation",
    "Layout",
    "Listing",
    "Nested",
    "Node",
    "Number",
    "Packed",
    "PackedRule",
    "Pickled",
    "Reference",
    "Remade",
    "RuleAt",
    "Structure",
]


class Reference(NamedTuple):
    """An object in a module, by name; or its class, where that has no name of its own."""

    module: str
    name: str
    its_class: bool = False


class Pickled(NamedTuple):
    """What cloudpickle takes and pickle does not, such as a local function."""

    data: bytes


class Nested(NamedTuple):
    """A nested program: its place in the table, and whether it is closed."""

    place: int
    closed: bool


class Number(NamedTuple):
    """A literal."""

    value: Any
    aval: Any


class Node(NamedTuple):
    """A node of a tree structure; None stands for a leaf."""

    kind: Any
    metadata: Any
    children: tuple[Node | None, ...]


class Structure(NamedTuple):
    """A tree structure, whose metadata can hold programs."""

    root: Node | None


class Layout(NamedTuple):
    """A sharding over a mesh, of devices or an abstract one."""

    mesh: Any
    spec: Any


class Remade(NamedTuple):
    """A JAX object that is recreated from its parts, because it caches a hash, which differs
    between processes, or equals only itself."""

    kind: Any
    parts: dict[str, Any]


class RuleAt(NamedTuple):
    """A traced rule: its place in the table of rules, since it may come back to itself."""

    place: int


class PackedRule(NamedTuple):
    """One traced rule (`traced_rules`)."""

    kind: str
    smooth: tuple[bool, ...]
    smooth_out: tuple[bool, ...]
    moved: tuple[bool, ...]
    symbolic: bool
    ends: bool
    refusal: tuple[type, tuple[Any, ...]] | None
    name: str
    held: int
    programs: tuple[tuple[Nested, tuple[int, ...]], ...]


class Equation(NamedTuple):
    primitive: Any  # or one of JAX's own functions that have a custom rule
    params: dict[str, Any]
    effects: frozenset[Any]
    reads: tuple[Any, ...]
    gives: tuple[Any, ...]  # the types
    context: Any


class Listing(NamedTuple):
    """One program: variables are numbered, inputs first, then results in order."""

    name: str
    constants: tuple[Any, ...]
    unbound: int  # how many of the inputs stand for constants that are kept elsewhere
    inputs: tuple[Any, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Any, ...]
    effects: frozenset[Any]


class Packed(NamedTuple):
    """A whole program. Names of primitives and parameters are those of one release of JAX."""

    release: str
    name: str
    listings: tuple[Listing, ...]
    rules: tuple[PackedRule, ...]
    main: int
    fixed: tuple[Any, ...]
    inputs: Any
    outputs: Any
