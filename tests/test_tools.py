"""The small scripts of the gate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools"


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOLS / tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_newest_python_finds_at_least_this_one_or_none() -> None:
    none = run("newest_python.py", "4.0")
    assert (none.returncode, none.stdout) == (1, "")
    found = run("newest_python.py", "3.11")
    if found.returncode == 0:  # a virtual environment alone need not be on PATH
        code = "import sys; print(sys.version_info >= (3, 11))"
        command = [found.stdout.strip(), "-c", code]
        printed = subprocess.run(command, capture_output=True, text=True, check=True)
        assert printed.stdout.strip() == "True"


def test_oldest_is_a_pinned_requirement() -> None:
    for host, first in (("jax", (0, 4)), ("torch", (2, 0))):
        name, _, version = run("oldest.py", host).stdout.strip().partition("==")
        assert name == host
        assert tuple(int(part) for part in version.split(".")) >= first


GOOD = """
```python
x = 1 + 1
print(x)  # -> 2
```

```pycon
>>> x
2
```
"""


def test_check_docs_passes_a_good_page(tmp_path: Path) -> None:
    page = tmp_path / "good.md"
    page.write_text(GOOD)
    done = run("check_docs.py", page)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "good.md: 2 code blocks, 0 failed" in done.stdout


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (GOOD.replace("-> 2", "-> 3"), "expected to print ['3'], got ['2']"),
        (GOOD.replace("\n2\n", "\n3\n"), "Got:"),
        (GOOD.replace("1 + 1", "1 / 0"), 'bad.md", line 3'),
        ("No code at all.", "0 code blocks"),
    ],
)
def test_check_docs_fails_a_bad_page(tmp_path: Path, bad: str, shown: str) -> None:
    page = tmp_path / "bad.md"
    page.write_text(bad)
    done = run("check_docs.py", page)
    assert done.returncode == 1
    assert shown in done.stdout + done.stderr


IN_CELLS = """\"\"\"Two and two.

More of it.
\"\"\"

# %%
two = 2

# %% [markdown]
# What *follows* is four.

# %%
print(__name__, two + two)
"""


@pytest.mark.parametrize(
    ("source", "cells"),
    [
        (IN_CELLS, ["markdown", "code", "markdown", "code"]),
        (IN_CELLS.replace("# %%", "#"), ["markdown", "code"]),  # a program
    ],
)
def test_an_example_becomes_a_notebook(tmp_path: Path, source: str, cells: list[str]) -> None:
    (tmp_path / "four.py").write_text(source)
    done = run("notebook.py", tmp_path / "four.py", tmp_path)
    assert done.returncode == 0, done.stderr
    notebook = json.loads((tmp_path / "four.ipynb").read_text())
    assert [cell["cell_type"] for cell in notebook["cells"]] == cells
    assert "".join(notebook["cells"][0]["source"]) == "Two and two.\n\nMore of it."
    (output,) = notebook["cells"][-1]["outputs"]
    assert output["text"] == ["__main__ 4"]
    assert not (tmp_path / "thumbnail.png").exists()


def test_a_notebook_has_the_pictures_of_its_own_run(tmp_path: Path) -> None:
    """And not what another run has left in the folder, unless it draws that anew."""
    (tmp_path / "out").mkdir()
    for name in ("old.png", "new.png"):
        (tmp_path / "out" / name).write_bytes(b"of another run")
    picture = "import matplotlib.pyplot as plt; plt.figure(); plt.savefig('out/new.png')"
    (tmp_path / "draws.py").write_text(f'"""Draws."""\n\n{picture}\n')
    command = [sys.executable, TOOLS / "notebook.py", tmp_path / "draws.py", tmp_path]
    subprocess.run(command, cwd=tmp_path, check=True)
    notebook = json.loads((tmp_path / "draws.ipynb").read_text())
    (output,) = notebook["cells"][-1]["outputs"]
    assert output["output_type"] == "display_data"


def test_a_notebook_fails_as_its_example_does(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(IN_CELLS + "\nraise SystemExit('two and two is five')\n")
    done = run("notebook.py", tmp_path / "bad.py", tmp_path)
    assert done.returncode == 1
    assert "__main__ 4" in done.stdout
    assert "two and two is five" in done.stderr


@pytest.mark.slow
def test_the_readme_shows_the_report_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("jax", "sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(needed)
    command = (
        "import show_report as s; print(s.readme(str(s.report())) == open('README.md').read())"
    )
    monkeypatch.setenv("PYTHONPATH", str(TOOLS), prepend=os.pathsep)
    shown = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        check=True,
        cwd=TOOLS.parent,
    )
    assert shown.stdout.strip() == "True", "run: python tools/show_report.py --readme"
