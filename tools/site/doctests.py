"""The examples of a docstring, shown as code on the reference pages.

A docstring here ends in lines that begin with ``>>>``. Markdown takes them for quotations. This
extension puts a fence around each such block.
"""

import re
from typing import Any

import griffe

BLOCK = re.compile(r"^( *)>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


def fenced(text: str) -> str:
    """``text`` with each block that begins with ``>>>`` in a fence."""
    return BLOCK.sub(lambda block: f"{block[1]}```pycon\n{block[0]}\n{block[1]}```", text)


class Doctests(griffe.Extension):
    """Fences the doctests in every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for whatever it has read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
