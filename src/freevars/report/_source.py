"""The source of a function, and the places in it that read a value from outside.

The text comes from the line cache, so functions in files, notebook cells and doctests are all
found, and no code of the function's module runs. Not here: which of those places read a *captured*
value; a report decides that by name.
"""

import ast
import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

from freevars._names.callables import function_name, unwrapped

__all__ = ["Read", "ReadSite", "Source", "captured_by", "read_site", "source_of"]

_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_Scope = _Function | _Comprehension


@dataclass(frozen=True)
class ReadSite:
    """A line of a program: ``file``, ``line`` (from 1) and its ``text``, empty where unknown."""

    file: str
    line: int
    text: str = ""

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


@dataclass(frozen=True)
class Read:
    """An expression such as ``params['w']`` in a source: its row (from 0), columns and text."""

    row: int
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Source:
    """The lines that define a function, dedented, and the expressions that may come from outside.

    An expression such as ``params['w'].T`` gives one ``Read`` for each of ``params``,
    ``params['w']`` and ``params['w'].T``; names that the function binds itself are left out, but
    for its parameters (``self``, and the ones that a default or a partial fills).
    """

    file: str
    line: int
    text: str
    reads: tuple[Read, ...] = ()


def read_site(file: str, line: int) -> ReadSite:
    """The site with its text, read from the file or notebook cell if it is there."""
    lines = _lines(file)
    return ReadSite(file, line, lines[line - 1].strip() if 0 < line <= len(lines) else "")


def _lines(file: str, module: dict[str, object] | None = None) -> list[str]:
    """The lines of a file or a notebook cell. Whatever `exec` compiles is called `<string>`, which
    since Python 3.13 is also the name of the text that `python -c` was given."""
    return [] if file == "<string>" else linecache.getlines(file, module)


def captured_by(fun: object) -> str:
    """Who captures, for messages: ``objective at model.py:41``."""
    inner = unwrapped(fun)
    if type(inner) is not FunctionType:
        return function_name(fun)
    code = inner.__code__
    return f"{function_name(fun)} at {ReadSite(code.co_filename, code.co_firstlineno)}"


def source_of(fun: object) -> Source | None:
    """Where and how the function under ``fun`` is written, or ``None`` where there is no text."""
    inner = unwrapped(fun)
    if type(inner) is not FunctionType:
        return None
    code = inner.__code__
    lines = _lines(code.co_filename, inner.__globals__)
    if not 0 < code.co_firstlineno <= len(lines):
        return None
    node = _find(code, "".join(lines))
    if node is None:
        line = lines[code.co_firstlineno - 1].strip("\n")
        return Source(code.co_filename, code.co_firstlineno, line.strip())
    last = node.end_lineno or code.co_firstlineno
    rows = [line.rstrip("\r\n") for line in lines[code.co_firstlineno - 1 : last]]
    indent = min((len(row) - len(row.lstrip()) for row in rows if row.strip()), default=0)
    reads = []
    try:
        parts = list(_outside(node))
    except RecursionError:  # an expression of thousands of terms: shown without its reads
        parts = []
    for part, text in parts:
        row = part.lineno - code.co_firstlineno
        if part.end_lineno != part.lineno or part.end_col_offset is None or row < 0:
            continue
        octets = lines[part.lineno - 1].encode()  # ast counts columns in UTF-8 octets
        start = len(octets[: part.col_offset].decode()) - indent
        end = len(octets[: part.end_col_offset].decode()) - indent
        reads.append(Read(row, start, end, text))
    text = "\n".join(row[indent:] for row in rows)
    return Source(code.co_filename, code.co_firstlineno, text, tuple(reads))


def _find(code: CodeType, text: str) -> _Function | None:
    """The definition that a code object was compiled from; columns tell those on one line apart."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):  # the file has changed, or is no Python
        return None
    found = []
    for node in ast.walk(tree):
        if isinstance(node, _Function):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            name = "<lambda>" if isinstance(node, ast.Lambda) else node.name
            if first == code.co_firstlineno and name == code.co_name:
                found.append(node)
    if len(found) > 1:
        places = set(code.co_positions())
        bodies = [(n, n.body if isinstance(n, ast.Lambda) else n.body[0]) for n in found]
        ends = {n: (b.lineno, b.end_lineno, b.col_offset, b.end_col_offset) for n, b in bodies}
        found = [node for node in found if ends[node] in places] or found
    return found[0] if len(found) == 1 else None


def _outside(node: _Function) -> Iterator[tuple[ast.expr, str]]:
    """The expressions in a function that are read from outside it, each with its text."""
    parameters = {arg.arg for arg in _arguments(node)}
    for child in _body(node):
        yield from _free(child, _bound(node) - parameters)


def _free(node: ast.AST, bound: set[str]) -> Iterator[tuple[ast.expr, str]]:
    if isinstance(node, ast.Name | ast.Attribute | ast.Subscript):
        parts = _chain(node)
        if parts and isinstance(node.ctx, ast.Load):
            if parts[0][1] not in bound:
                yield from parts
            return
    inside = bound | _bound(node) if isinstance(node, _Scope) else bound
    body = _body(node) if isinstance(node, _Function) else []
    for child in ast.iter_child_nodes(
        node
    ):  # a function's defaults and decorators stand outside it
        outside = isinstance(node, _Function) and child not in body
        yield from _free(child, bound if outside else inside)


def _body(node: _Function) -> list[ast.stmt] | list[ast.expr]:
    return [node.body] if isinstance(node, ast.Lambda) else node.body


def _chain(node: ast.expr) -> list[tuple[ast.expr, str]]:
    """``a``, ``a.b``, ``a.b[0]`` for ``a.b[0]``; empty where it holds anything but constants."""
    if isinstance(node, ast.Name):
        return [(node, node.id)]
    if isinstance(node, ast.Attribute):
        link = f".{node.attr}"
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        link = f"[{node.slice.value!r}]"
    else:
        return []
    parts = _chain(node.value)
    return [*parts, (node, parts[-1][1] + link)] if parts else []


def _arguments(node: _Function) -> list[ast.arg]:
    args = node.args
    return [
        arg
        for arg in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg)
        if arg is not None
    ]


def _bound(scope: _Scope) -> set[str]:
    """The names that one function or comprehension binds itself, nested ones left out."""
    names: set[str] = set()
    elsewhere: set[str] = set()
    pending: list[ast.AST] = list(ast.iter_child_nodes(scope))
    if isinstance(scope, _Function):
        names |= {arg.arg for arg in _arguments(scope)}
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Global | ast.Nonlocal):
            elsewhere |= set(node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
        if not isinstance(node, _Scope):
            pending += ast.iter_child_nodes(node)
    return names - elsewhere
