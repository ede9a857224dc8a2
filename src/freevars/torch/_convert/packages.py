"""Whether a package knows PyTorch: into the code of others a search for tensors hardly looks."""

import sys
from types import FunctionType, ModuleType
from typing import Any

__all__ = ["uses_torch"]


def uses_torch(module: object) -> bool:
    """Whether the package of this module has anything of PyTorch among its variables, as far as was
    seen when modules were last loaded."""
    root = module.partition(".")[0] if isinstance(module, str) else "__main__"
    known, count = _uses_torch.get(root, (root == "__main__", 0))
    if not known and count != len(sys.modules):  # another module of it may have come in
        inside = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == root]
        known = not inside or any(map(_is_torch, (x for m in inside for x in _variables(m))))
        _uses_torch[root] = known, len(sys.modules)
    return known


_uses_torch: dict[str, tuple[bool, int]] = {}


def _variables(module: object) -> list[Any]:
    return list(module.__dict__.values()) if type(module) is ModuleType else []


def _is_torch(x: object) -> bool:
    """Whether it is PyTorch, a class, function or instance of it; without running code of `x`."""
    kind = type(x)
    if kind is ModuleType:
        home = x.__dict__.get("__name__")
    elif kind is FunctionType or kind is type:
        home = x.__module__
    else:
        home = kind.__module__
    return isinstance(home, str) and home.partition(".")[0] == "torch"
