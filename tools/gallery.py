"""Run the examples; each checks its own result and says so with its exit status.

    python tools/gallery.py              run all of them
    python tools/gallery.py --changed    only those whose code, or the library's, has changed

Each runs as a notebook (``tools/notebook.py``), which is left with its outputs in
``build/gallery/NAME`` for the gallery of the site; the capture report that the site shows is made
too. Not here: the pages (``tools/site/hooks.py``).
"""

import argparse
import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "build" / "gallery"
AT_ONCE = 2  # examples: most of one is compiled or run on one core
NOTEBOOK = ROOT / "tools" / "notebook.py"


def fingerprint(example: Path) -> str:
    """Of everything that the example's output depends on, in this environment."""
    digest = hashlib.sha256(sys.version.encode())
    for path in [example, NOTEBOOK, *sorted((ROOT / "src").glob("**/*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(example: Path) -> bool:
    """Whether the example passed; its output is shown if it did not."""
    folder = RUNS / example.stem
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("**/*"):
        if old.is_file():
            old.unlink()
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, NOTEBOOK, example, folder],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // AT_ONCE))},
    )
    print(f"{example.name}: {time.perf_counter() - began:.0f} s", flush=True)
    if done.returncode:
        print(f"{done.stdout}{done.stderr}\n{example.name}: exit status {done.returncode}")
        return False
    (folder / "fingerprint").write_text(fingerprint(example))
    return True


def current(example: Path) -> bool:
    """Whether the last run of the example is of today's code."""
    mark = RUNS / example.stem / "fingerprint"
    return mark.exists() and mark.read_text() == fingerprint(example)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--changed", action="store_true", help="skip what has not changed")
    changed_only = parser.parse_args().changed
    examples = sorted((ROOT / "examples").glob("*.py"))
    wanted = [example for example in examples if not (changed_only and current(example))]
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as workers:
        passed = list(workers.map(run, wanted))
    failed = [example.name for example, ok in zip(wanted, passed, strict=True) if not ok]
    report = RUNS / "captures.html"
    if not failed and (wanted or not report.exists()):
        shown = [sys.executable, ROOT / "tools" / "show_report.py", "--html", report]
        subprocess.run(shown, check=True, stdout=subprocess.DEVNULL)
    print(f"{len(wanted) - len(failed)} examples passed, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
