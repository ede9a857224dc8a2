"""Who may import whom: the layers of the library, kept by reading its source."""

import ast
import subprocess
import sys
from pathlib import Path

import freevars

SOURCE = Path(freevars.__file__).parent
HOSTS = ("jax", "torch")


def imported(path: Path) -> set[str]:
    """The absolute names of the modules that one file imports, wherever the import stands."""
    package = ("freevars", *path.relative_to(SOURCE).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else ())))
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def test_importing_freevars_loads_no_framework() -> None:
    code = "import freevars, sys; print(sorted({'jax', 'torch', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run(  # noqa: S603 (our own interpreter, our own code)
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"


def test_host_neutral_files_import_the_standard_library_only() -> None:
    for path in SOURCE.glob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots <= set(sys.stdlib_module_names) | {"freevars"}, path
        hosts = {name for name in imported(path) if name.split(".")[1:2] and name.split(".")[1] in HOSTS}
        assert not {name for name in hosts if name.startswith("freevars.")}, path


def test_hosts_do_not_import_each_other() -> None:
    for host, other in (HOSTS, HOSTS[::-1]):
        for path in (SOURCE / host).glob("**/*.py"):
            names = imported(path)
            assert not {n for n in names if n.split(".")[0] == other}, path
            assert not {n for n in names if n.startswith(f"freevars.{other}")}, path
