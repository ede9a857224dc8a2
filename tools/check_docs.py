"""Run the Python code blocks of the README and of docs/, so that none of them can go stale.

    python tools/check_docs.py [FILE.md ...]

The blocks of one page run in order and share their names, the way a reader would paste them; those
under a tab (``=== "PyTorch"``) share them with the tabs of that label, and see what the page's
other blocks had defined before the first of them. A block with ``>>>`` prompts is a doctest. Any
other must not raise, and if lines of it end in ``# -> text``, these texts must be what it prints,
line by line.
"""

import contextlib
import doctest
import io
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PRINTS = re.compile(r"# -> (.*)$", re.MULTILINE)
TAB = re.compile(r'^=== "(?P<tab>[^"\n]*)"$', re.MULTILINE)
BLOCK = re.compile(
    rf"{TAB.pattern}|^(?P<indent> *)```(?:python|pycon)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Lets a page change the default precision of a host for itself alone."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_default_dtype(sys.modules["torch"].float32)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_enable_x64", False)


def check(page: Path) -> tuple[int, int]:
    """(how many blocks ran, how many failed); a failure is printed with its line in the page."""
    text = page.read_text()
    shared: dict[str, Any] = {"__name__": page.stem}
    tabs: dict[str, dict[str, Any]] = {}
    tab = ""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    ran = failed = 0
    for block in BLOCK.finditer(text):
        if block["tab"] is not None:
            tab = block["tab"]
            continue
        ran += 1
        code = textwrap.dedent(block["code"])
        names = tabs.setdefault(tab, dict(shared)) if block["indent"] else shared
        lines_before = text.count("\n", 0, block.start("code"))
        if ">>>" in code:
            case = doctest.DocTestParser().get_doctest(
                code, names, page.name, str(page), lines_before
            )
            failed += bool(runner.run(case, clear_globs=False).failed)
            names.update(case.globs)
        else:
            printed = io.StringIO()
            try:
                # The empty lines make a traceback show the line in the page.
                program = compile("\n" * lines_before + code, str(page), "exec")
                with contextlib.redirect_stdout(printed):
                    exec(program, names)  # noqa: S102
            except Exception:  # noqa: BLE001 (whatever a page raises is a failure to report)
                traceback.print_exc()
                failed += 1
                continue
            expected, got = PRINTS.findall(code), printed.getvalue().splitlines()
            if expected and expected != got:
                print(f"{page}:{lines_before + 1}: expected to print {expected}, got {got}")
                failed += 1
    return ran, failed


def main() -> int:
    pages = [Path(name) for name in sys.argv[1:]]
    pages = pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    results = {}
    for page in pages:
        with own_settings():
            results[page] = check(page)
    for page, (ran, failed) in results.items():
        print(f"{page}: {ran} code blocks, {failed} failed")
    nothing_ran = not any(ran for ran, _ in results.values())
    return int(nothing_ran or any(failed for _, failed in results.values()))


if __name__ == "__main__":
    sys.exit(main())
