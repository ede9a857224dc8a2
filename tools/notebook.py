"""Run an example as a notebook, and write it with what it printed and drew.

    python tools/notebook.py EXAMPLE.py FOLDER

An example is a script in cells (``# %%``, and ``# %% [markdown]`` for text), which jupytext and
editors open as a notebook; one without such marks is a program, a single cell. All cells run in one
namespace, as ``python EXAMPLE.py`` would run them. What each prints, the figures that
``plt.show()`` shows, and the pictures left in ``out/`` go to ``FOLDER/EXAMPLE.ipynb``; a small copy
of the first figure to ``FOLDER/thumbnail.png``. The exit status is that of the example.
"""

import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MARK = re.compile(r"^# %%(?: (\[markdown\]))?\s*$", re.MULTILINE)
THUMBNAIL = 480  # pixels, wide


class Cell(NamedTuple):
    """A part of an example."""

    text: str
    line: int  # of the file, where it begins, from 0
    is_code: bool


def cells(source: str) -> Iterator[Cell]:
    """The docstring of an example, as text, and its cells."""
    node = ast.parse(source).body[0]
    yield Cell(ast.get_docstring(ast.parse(source)) or "", 0, is_code=False)
    start = len("".join(source.splitlines(keepends=True)[: node.end_lineno]))
    marks = [m for m in MARK.finditer(source) if m.start() >= start]
    ends = [m.start() for m in marks[1:]] + [len(source)]
    first = marks[0].start() if marks else len(source)
    if source[start:first].strip():
        yield Cell(source[start:first], source.count("\n", 0, start), is_code=True)
    for mark, end in zip(marks, ends, strict=False):  # a program has no marks, and one end
        text = source[mark.end() : end]
        if mark[1]:
            yield Cell(re.sub(r"^# ?", "", text, flags=re.MULTILINE).strip(), 0, is_code=False)
        else:
            yield Cell(text, source.count("\n", 0, mark.end()), is_code=True)


def _files() -> dict[Path, int]:
    """The pictures that examples leave, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in sorted(Path("out").glob("*.png"))}


class Runner:
    """Runs cells one after the other, and keeps what comes out."""

    def __init__(self, example: Path) -> None:
        self._path = example
        self._names: dict[str, Any] = {"__name__": "__main__", "__file__": str(example)}
        self._pictures: list[bytes] = []
        self._seen = _files()  # of another run

    @property
    def first_picture(self) -> bytes | None:
        return self._pictures[0] if self._pictures else None

    def run(self, cell: Cell) -> tuple[list[dict[str, Any]], BaseException | None]:
        """The outputs of a cell in the form of a notebook's, and what it raised."""
        program = compile("\n" * cell.line + cell.text, str(self._path), "exec")
        printed, failure, before = io.StringIO(), None, len(self._pictures)
        try:
            with contextlib.redirect_stdout(printed):
                exec(program, self._names)  # noqa: S102
        except (Exception, SystemExit) as error:  # noqa: BLE001 (told by who called)
            failure = error
        self._collect_files()
        outputs: list[dict[str, Any]] = []
        if text := printed.getvalue():
            stream = {"output_type": "stream", "name": "stdout", "text": _lines(text)}
            outputs.append(stream)
        for picture in self._pictures[before:]:
            data = {"image/png": base64.b64encode(picture).decode()}
            outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
        return outputs, failure

    def show(self) -> None:
        """What ``plt.show`` does here."""
        import matplotlib.pyplot as plt  # noqa: PLC0415 (an example may do without)

        for number in plt.get_fignums():
            drawn = io.BytesIO()
            plt.figure(number).savefig(drawn, format="png", dpi=110)
            self._pictures.append(drawn.getvalue())
        plt.close("all")

    def _collect_files(self) -> None:
        found = _files()
        self._pictures += [
            path.read_bytes() for path in found if found[path] != self._seen.get(path)
        ]
        self._seen = found


def _lines(text: str) -> list[str]:
    return text.strip("\n").splitlines(keepends=True)


def notebook(example: Path, runner: Runner) -> tuple[dict[str, Any], BaseException | None]:
    """The notebook, up to the first cell that failed."""
    written: list[dict[str, Any]] = []
    failure = None
    for cell in cells(example.read_text()):
        entry = {"metadata": {}, "source": _lines(cell.text), "id": f"cell{len(written)}"}
        if not cell.is_code:
            written.append({"cell_type": "markdown", **entry})
            continue
        outputs, failure = runner.run(cell)
        code = {"cell_type": "code", "execution_count": None, **entry, "outputs": outputs}
        written.append(code)
        if failure is not None:
            break
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": about, "cells": written}, failure


def thumbnail(picture: bytes, to: Path) -> None:
    from PIL import Image  # noqa: PLC0415 (matplotlib brings it, and drew the picture)

    small = Image.open(io.BytesIO(picture))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(to)


def main() -> None:
    example, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    sys.argv = [str(example)]
    sys.path.insert(0, str(example.parent))
    os.environ["MPLBACKEND"] = "agg"
    runner = Runner(example)
    with contextlib.suppress(ImportError):
        import matplotlib.pyplot as plt  # noqa: PLC0415 (an example may do without)

        plt.show = lambda *_, **__: runner.show()  # matplotlib sets an attribute on it
    made, failure = notebook(example, runner)
    (folder / f"{example.stem}.ipynb").write_text(json.dumps(made, indent=1))
    if runner.first_picture is not None:
        thumbnail(runner.first_picture, folder / "thumbnail.png")
    if failure is not None:
        for entry in made["cells"]:
            for output in entry.get("outputs", ()):
                sys.stdout.writelines(output.get("text", ()))
        sys.stdout.write("\n")
        raise failure


if __name__ == "__main__":
    main()
