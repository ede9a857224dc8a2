"""Options that a TypedDict spells out, on the reference pages: with their defaults, and once.

griffe's ``unpack_typeddict`` puts each option into the signature, with ``...`` for its default, and
once more into the list of parameters, without a word. Here a default is what the comment behind the
option says, and the list is what the docstring says: a description of each option, or for which
function they are described.
"""

import re
from typing import Any

import griffe

DEFAULT = re.compile(r"^\s+(\w+): .*#\s*(.+?)\s*$", re.MULTILINE)


class Defaults(griffe.Extension):
    """Stands before ``unpack_typeddict``, while it can still be seen where options come from."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called by griffe for each function."""
        for parameter in func.parameters:
            unpacked = parameter.annotation
            if parameter.kind is griffe.ParameterKind.var_keyword and isinstance(
                unpacked, griffe.ExprSubscript
            ):
                source = func.modules_collection[unpacked.slice.canonical_path].source
                func.extra["options"]["defaults"] = dict(DEFAULT.findall(source))


class Options(griffe.Extension):
    """Stands after it: fills in the defaults, and reads the docstring with the new signature."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called by griffe for each function."""
        defaults = func.extra["options"].get("defaults")
        if defaults is None:
            return
        for parameter in func.parameters:
            if parameter.default == "...":
                parameter.default = defaults.get(parameter.name, "...")
        if func.docstring is not None:
            vars(func.docstring)["parsed"] = func.docstring.parse()
