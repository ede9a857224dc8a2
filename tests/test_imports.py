"""Who may import whom: the layers of the library, kept by reading its source."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import freevars

SOURCE = Path(freevars.__file__).parent

# Each storey imports its own files and those of the storeys before it.
STOREYS = {
    "": ("errors", "_difference", "_sequences", "_names", "_contract", "report", "_solvers"),
    "jax": (
        "_compat",
        "_selftest",
        "_describe",
        "_convert",
        "_report",
        "_closure",
        "_captures",
        "_solver",
        "_host",
        "_rules",
        "testing",
        "scipy",
    ),
    "torch": (
        "_compat",
        "_modes",
        "_hooks",
        "_selftest",
        "_describe",
        "_convert",
        "_report",
        "_closure",
        "_captures",
        "_rules",
        "scipy",
    ),
}
HOSTS = ("jax", "torch")


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCE.glob("**/*.py")}


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
            inner = {f"{module}.{alias.name}" for alias in node.names}
            # `from package import module` does not need the package's own names.
            names |= inner if inner <= MODULES.keys() else {module, *inner}
    return names


def own_imports(module: str) -> set[str]:
    return imported(MODULES[module]) & MODULES.keys() - {module}


def place(module: str) -> tuple[str, str]:
    """The host of a module (empty for what both share), and its storey there."""
    parts = module.split(".")[1:]
    host = parts[0] if parts and parts[0] in HOSTS else ""
    inside = parts[1:] if host else parts
    return host, inside[0] if inside else ""


def test_importing_freevars_loads_no_framework() -> None:
    code = "import freevars, sys; print(sorted({'jax', 'torch', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_jax_host_loads_scipy_at_the_first_use_of_its_part() -> None:
    shown = _in_a_process(
        "import freevars.jax as fv, sys; print('scipy.optimize' in sys.modules);"
        " fv.scipy.minimize; print('scipy.optimize' in sys.modules)"
    )
    assert shown.split() == ["False", "True"]


@pytest.mark.parametrize("host", HOSTS)
def test_a_missing_scipy_is_named_with_what_to_install(host) -> None:
    pytest.importorskip(host)
    shown = _in_a_process(
        f"import sys, freevars.{host} as fv; sys.modules['scipy'] = None\n"
        "try: fv.scipy\n"
        "except ImportError as error: print(error)"
    )
    assert shown.strip() == f"freevars.{host}.scipy needs scipy: pip install 'freevars[scipy]'"


def _in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_shared_files_import_the_standard_library_only() -> None:
    # scipy itself and what it is given, for both hosts.
    runs, given = (f"freevars._solvers.scipy_{part}" for part in ("runs", "constraints"))
    more = {runs: {"numpy", "scipy"}, given: {"numpy"}}
    for module, path in MODULES.items():
        if place(module)[0] == "":
            roots = {name.split(".")[0] for name in imported(path)}
            own = {"freevars"} | more.get(module, set())
            assert roots <= set(sys.stdlib_module_names) | own, path
            assert module in more or not more.keys() & own_imports(module), path
            assert {place(name)[0] for name in own_imports(module)} <= {""}, path


def test_hosts_do_not_import_each_other() -> None:
    for module, path in MODULES.items():
        host = place(module)[0]
        for other in set(HOSTS) - {host} if host else ():
            names = imported(path)
            assert not {n for n in names if n.split(".")[0] == other}, path
            assert not {n for n in names if n.startswith(f"freevars.{other}")}, path


def test_no_file_imports_itself_by_a_circle() -> None:
    # Raises CycleError, which names the files.
    order = [*graphlib.TopologicalSorter({m: own_imports(m) for m in MODULES}).static_order()]
    assert len(order) == len(MODULES)


def test_a_storey_imports_only_what_lies_below_it() -> None:
    for module in MODULES:
        host, storey = place(module)
        if not storey:  # a package's own `__init__` stands on top of all of it
            continue
        assert storey in STOREYS[host], f"{module} has no storey"
        for name in own_imports(module):
            other_host, other = place(name)
            if other_host == host:
                assert other, f"{module} imports the whole of {name}"
                assert STOREYS[host].index(other) <= STOREYS[host].index(storey), (module, name)
