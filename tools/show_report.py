"""Remake what the README and docs/ show of a report: that of an example's objective.

    python tools/show_report.py                print the report as text
    python tools/show_report.py --readme       put it into the README, between its two marks
    python tools/show_report.py --picture      and a picture of it into docs/images (needs chromium)
    python tools/show_report.py --html FILE    save it as a page, for the site

The example itself runs, up to the moment at which it hands its objective to ``fv.Closure``.
"""

import argparse
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import freevars.jax as fv
from freevars.report import CaptureReport

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "custom_rule.py"
PICTURE = ROOT / "docs" / "images" / "captures.png"
BLOCK = re.compile(r"(<!-- report -->\n```text\n).*?(```\n<!-- /report -->)", re.DOTALL)


class _SeenError(Exception):
    """The objective has been seen; the rest of the example need not run."""


def report() -> CaptureReport:
    """What the example's objective captures, where the example makes a closure of it."""
    found: list[CaptureReport] = []

    def closure(fun: Any, *example_args: Any) -> Any:
        found.append(fv.captures(fun, *example_args))
        raise _SeenError

    original, arguments = fv.Closure, sys.argv
    fv.Closure, sys.argv = closure, [str(EXAMPLE)]  # type: ignore[assignment, misc]
    try:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    except _SeenError:
        pass
    finally:
        fv.Closure, sys.argv = original, arguments  # type: ignore[misc]
    return found[0]


def readme(text: str) -> str:
    """The README with this report in it."""
    page = (ROOT / "README.md").read_text()
    return BLOCK.sub(lambda marks: f"{marks[1]}{text}\n{marks[2]}", page)


def picture(shown: CaptureReport) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no chromium on the path (on Debian: apt-get install chromium)")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "closure.html"
        shown.save(page)
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
        size = "--window-size=1000,415"
        command = [chromium, *flags, size, f"--user-data-dir={folder}/profile"]
        command += [f"--screenshot={PICTURE}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--readme", action="store_true", help="write it into the README")
    parser.add_argument("--picture", action="store_true", help="make the picture of docs/")
    parser.add_argument("--html", type=Path, metavar="FILE", help="save it as a page")
    options = parser.parse_args()
    shown = report()
    print(shown)
    if options.readme:
        (ROOT / "README.md").write_text(readme(str(shown)))
    if options.picture:
        picture(shown)
    if options.html:
        shown.save(options.html)


if __name__ == "__main__":
    main()
