"""Build the source archive and the wheel, and look at them as a package index and a user would.

    python tools/check_dist.py PYTHON [--release]

PYTHON is the interpreter of an environment that has the hosts and nothing of the project: the wheel
is installed there, and the README's blocks run against it. ``--release`` also refuses placeholders
and a version without its date.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
IN_ARCHIVE = (
    ".ci/run",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "mkdocs.yml",
    "src/freevars/py.typed",
    "tests/test_imports.py",
    "tools/check_docs.py",
)
PLACEHOLDER = "freevars.example"
ADDRESSED = ("pyproject.toml", ".github/ISSUE_TEMPLATE/config.yml")


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


def versions() -> dict[str, str]:
    """The version where a person writes it."""
    found = {}
    for name, pattern in {
        "src/freevars/__init__.py": r'^__version__ = "(.*)"$',
        "CITATION.cff": r"^version: (.*)$",
        "CHANGELOG.md": r"^## (\d[\d.]*)",
    }.items():
        match = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        found[name] = match[1] if match else "none"
    return found


def problems(archive: Path, wheel: Path, *, release: bool) -> list[str]:
    """What is wrong with the two files, in words."""
    found = []
    if len(set(versions().values())) != 1:
        found.append(f"expected one version everywhere, got {versions()}")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    found += [f"{archive.name} lacks {name}" for name in IN_ARCHIVE if name not in names]
    with zipfile.ZipFile(wheel) as zipped:
        (metadata,) = (name for name in zipped.namelist() if name.endswith("/METADATA"))
        text = zipped.read(metadata).decode()
    head, _, description = text.partition("\n\n")
    found += [
        f"{wheel.name}: a relative link in the description: {link}"
        for link in re.findall(r"\]\(([^)]+)\)", description)
        if not link.startswith(("https://", "http://", "#"))
    ]
    if f"Version: {versions()['src/freevars/__init__.py']}\n" not in head:
        found.append(f"{wheel.name}: another version than in src/freevars/__init__.py")
    if release and "(unreleased)" in (ROOT / "CHANGELOG.md").read_text():
        found.append("CHANGELOG.md: the date is missing")
    stands = [name for name in ADDRESSED if PLACEHOLDER in (ROOT / name).read_text()]
    if release and stands:
        found.append(f"{PLACEHOLDER} is no address, in {', '.join(stands)}: see RELEASING.md")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("python", help="the interpreter of a fresh environment")
    parser.add_argument("--release", action="store_true", help="refuse placeholders")
    options = parser.parse_args()
    python = Path(options.python).absolute()  # not resolved: the link is the environment
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    (archive,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", archive, wheel)
    run(sys.executable, "-m", "check_wheel_contents", wheel)
    found = problems(archive, wheel, release=options.release)
    print("\n".join(found) or f"{archive.name}, {wheel.name}: as they should be", flush=True)
    if found:
        return 1
    run(python, "-m", "pip", "-qq", "install", "--no-deps", "--force-reinstall", wheel)
    with tempfile.TemporaryDirectory() as folder:  # a folder without the source
        page = shutil.copy(ROOT / "README.md", folder)
        script = shutil.copy(ROOT / "tools" / "check_docs.py", folder)
        return subprocess.run([python, "-P", script, page], cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
