"""What the site must hold: a reference entry for every public name, a place for every page."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import freevars.errors
import freevars.jax
import freevars.jax.scipy
import freevars.jax.testing
import freevars.report
import freevars.torch
import freevars.torch.scipy

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOSTS = [freevars.jax, freevars.torch]
SHARED = [freevars.errors, freevars.report, freevars.jax.testing, freevars.jax.scipy]
SHARED += [freevars.torch.scipy]


def public_names(module):
    """What a user may import from it, submodules aside, as (name, object)."""
    found = [(name, getattr(module, name)) for name in module.__all__]
    return [(name, value) for name, value in found if not inspect.ismodule(value)]


def entries():
    pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    return set(re.findall(r"^ *::: (\S+)$", pages, re.MULTILINE))


@pytest.mark.parametrize("module", [*HOSTS, *SHARED], ids=lambda module: module.__name__)
def test_every_public_name_has_a_reference_entry_and_a_docstring(module):
    listed = entries()
    errors = dict(public_names(freevars.errors))
    names = public_names(module)
    assert names
    for name, value in names:
        # A host has the errors under its own name too; one entry is enough.
        home = "freevars.errors" if name in errors and errors[name] is value else module.__name__
        assert f"{home}.{name}" in listed, f"no entry for {home}.{name} in docs/reference"
        assert value.__doc__, f"{module.__name__}.{name} has no docstring"


@pytest.mark.parametrize("module", [*HOSTS, *SHARED], ids=lambda module: module.__name__)
def test_every_public_method_has_a_docstring(module):
    for name, value in public_names(module):
        if not inspect.isclass(value):
            continue
        for part in dir(value):
            method = inspect.getattr_static(value, part)
            own = getattr(inspect.unwrap(getattr(value, part, None)), "__module__", None)
            if part.startswith("_") or not str(own).startswith("freevars"):
                continue
            assert inspect.getdoc(method), f"{module.__name__}.{name}.{part} has no docstring"


def test_every_public_submodule_is_checked_here():
    checked = [*HOSTS, *SHARED]
    for host in HOSTS:
        for name in host.__all__:
            value = getattr(host, name)
            assert not inspect.ismodule(value) or value in checked, name


def test_every_page_has_a_place_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = set(re.findall(r"(\S+\.md)$", navigation, re.MULTILINE))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.glob("**/*.md")}
    assert pages - listed == set()


def test_every_refusal_is_on_its_page():
    script = ROOT / "tools" / "refusals.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_figures_of_the_readme_are_those_of_the_benchmarks():
    command = [sys.executable, ROOT / "tools" / "figures.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
