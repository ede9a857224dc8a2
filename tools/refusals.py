"""Compare ``docs/refusals.md`` with the errors that the source raises on purpose.

    python tools/refusals.py

Each code span in a heading of the page, or in the first cell of a table row, is a phrase. Every
message of an error class of ``freevars.errors`` and of Python in the source has to contain one of
them, and every phrase has to be found in a message. ``--messages`` prints the messages, with ``{}``
for what is filled in.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "refusals.md"
CLASSES = {"CaptureError", "LeakError", "NotASolutionError", "SingularError", "StructureError"}
PYTHONS = {
    *("AssertionError", "ImportError", "NotImplementedError", "OverflowError", "TypeError"),
    *("PicklingError", "UnpicklingError", "ValueError"),
}
SHORTEST = 3  # words; less is a part of a message
PHRASE = re.compile(r"`([^`]+)`")


def text(node: ast.AST) -> str:
    """The literal text of an expression, with ``{}`` for the rest."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left) + text(node.right)
    if isinstance(node, ast.IfExp):
        return text(node.body) + " / " + text(node.orelse)
    return "{}"


def strings(body: ast.AST) -> str:
    """The sentences within a function, for messages that it puts together; no docstrings."""
    found = [text(n) for n in ast.walk(body) if isinstance(n, ast.JoinedStr | ast.Constant)]
    told = [part for part in found if len(part.split()) > SHORTEST]
    about = ast.get_docstring(body, clean=False) if isinstance(body, ast.FunctionDef) else None
    return " | ".join(part for part in told if part != about)


def messages() -> Iterator[tuple[str, str, str]]:
    """(place, class, text) of every error of these classes that the source makes."""
    modules = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "src").glob("**/*.py"))}
    functions: dict[str, list[ast.FunctionDef]] = {}
    for module in modules.values():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef):
                functions.setdefault(node.name, []).append(node)
    for path, module in modules.items():
        for function in (n for n in ast.walk(module) if isinstance(n, ast.FunctionDef)):
            for call in (n for n in ast.walk(function) if isinstance(n, ast.Call) and n.args):
                name = getattr(call.func, "id", getattr(call.func, "attr", ""))
                if name not in CLASSES | PYTHONS | {"refuse"} or function.name == "refuse":
                    continue
                told = text(call.args[0])
                if told == "{}":
                    told = _put_together(call.args[0], function, functions)
                place = f"{path.relative_to(ROOT)}:{call.lineno}"
                yield place, name.replace("refuse", "CaptureError"), " ".join(told.split())


def _put_together(
    node: ast.expr, function: ast.FunctionDef, functions: dict[str, list[ast.FunctionDef]]
) -> str:
    """The text of a message that stands in a variable, or that other functions make."""
    used = _names(node)
    made = []
    if isinstance(node, ast.Name):  # what was assigned to it last is what is raised
        assigned = [
            part
            for part in ast.walk(function)
            if isinstance(part, ast.Assign)
            and part.lineno < node.lineno
            and node.id in set().union(*map(_names, part.targets))
        ]
        if assigned:
            value = max(assigned, key=lambda part: part.lineno).value
            made, used = [text(value)], _names(value)
    for part in ast.walk(function):
        if isinstance(part, ast.Assign | ast.For | ast.NamedExpr):
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            value = part.iter if isinstance(part, ast.For) else part.value
            if set().union(*map(_names, targets)) & used:
                told = text(value)
                made.append(strings(value) if told.replace("{}", "").strip(" /") == "" else told)
                used |= _names(value)
    makers = [f for name in sorted(used) for f in functions.get(name, ())]
    return " | ".join(made + [strings(maker) for maker in makers])


def _names(node: ast.AST) -> set[str]:
    nodes = list(ast.walk(node))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {
        n.attr for n in nodes if isinstance(n, ast.Attribute)
    }


def main() -> int:
    found = sorted(set(messages()))
    if "--messages" in sys.argv:
        for message in found:
            print(*message, sep="\n    ")
        return 0
    lines = PAGE.read_text().splitlines()
    headings = [line for line in lines if line.startswith("#")]
    cells = [line.split(" | ")[0] for line in lines if line.startswith("| `")]
    phrases = [phrase for line in headings + cells for phrase in PHRASE.findall(line)]
    missing = [m for m in found if not any(phrase in m[2] for phrase in phrases)]
    stale = [phrase for phrase in phrases if not any(phrase in m[2] for m in found)]
    for place, name, told in missing:
        print(f"{place}: {name} is not on the page: {told}")
    for phrase in stale:
        print(f"docs/refusals.md: no error says {phrase!r}")
    print(f"{len(found)} errors, {len(missing)} of them missing on the page; {len(stale)} stale")
    return int(bool(missing or stale or not found))


if __name__ == "__main__":
    sys.exit(main())
