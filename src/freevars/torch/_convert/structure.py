"""The structure of example arguments, and the first path at which a call differs from it."""

from typing import Any

import torch
from torch import Tensor

from freevars._difference import Difference, Node, first_difference
from freevars.errors import StructureError
from freevars.torch._compat import pytree

__all__ = ["Structure", "same", "struct_of"]

_NUMBERS = (int, float, complex)
_CONTAINERS = frozenset({tuple, list, dict})


class Structure:
    """A pytree's structure with the shape and dtype of each tensor and every static leaf."""

    def __init__(self, example: tuple[Any, ...], root: str | None = None) -> None:
        self._root = root  # what to call the only value of `example` in a path
        leaves, self.spec = pytree.tree_flatten(example)
        self.count = len(example)
        structs = [_struct_of_tensor(x) if isinstance(x, Tensor) else x for x in leaves]
        self.struct = pytree.tree_unflatten(structs, self.spec)
        self._leaves = [_Leaf(x) for x in leaves]
        # The types of the values, if each is a tensor or an empty container.
        kinds = [Tensor if isinstance(x, Tensor) else type(x) for x in example]
        self._kinds = kinds if _are_flat(kinds, example) else None

    def __reduce__(self) -> Any:
        return Structure, (self.struct, self._root)  # a tree's spec is not for other processes

    def check(self, args: tuple[Any, ...], name: str) -> list[Any]:
        """The leaves of `args`; raises `StructureError` naming the first path that differs."""
        if self._kinds is not None and _are_flat(self._kinds, args):  # no pytree walk
            leaves = [x for x in args if isinstance(x, Tensor)]
        else:
            leaves, spec = pytree.tree_flatten(args)
            if spec != self.spec:
                raise StructureError(self._differs(args, name))
        for leaf, x in zip(self._leaves, leaves, strict=True):
            if not leaf.fits(x):
                raise StructureError(self._differs(args, name))
        return leaves

    def _differs(self, args: tuple[Any, ...], name: str) -> str:
        expected = pytree.tree_unflatten(self._leaves, self.spec)
        found = first_difference(expected, args, take_apart=_take_apart, differ=_differ)
        if found is None:  # such as the order of a dict's keys, or what a node of one's own holds
            found = Difference("", str(self.spec), str(pytree.tree_structure(args)))
        path = "args" + found.path
        if self._root is not None:
            path = self._root + found.path.removeprefix("[0]")
        return f"{name}: {path} expected {found.expected}, got {found.got}."

    @staticmethod
    def shown(x: Any) -> str:
        return str(_Leaf(x))


def _are_flat(kinds: list[type], values: tuple[Any, ...]) -> bool:
    """Whether `values` are tensors and empty containers of these types."""
    return len(values) == len(kinds) and all(
        isinstance(x, Tensor)
        if kind is Tensor
        else kind in _CONTAINERS and type(x) is kind and not x
        for kind, x in zip(kinds, values, strict=True)
    )


class _Leaf:
    """What one leaf must be like: a tensor's shape, dtype and device; a number's type; else a
    value."""

    def __init__(self, x: Any) -> None:
        self.kind = type(x)
        self.value = None if isinstance(x, Tensor) or type(x) in _NUMBERS else x
        self.tensor = isinstance(x, Tensor)
        self.nested = self.tensor and x.is_nested
        if self.tensor and not self.nested:
            self.shape, self.dtype, self.device = x.shape, x.dtype, x.device

    def fits(self, x: Any) -> bool:
        if self.tensor:
            same_kind = isinstance(x, Tensor) and not x.is_nested
            return same_kind and x.shape == self.shape and x.dtype is self.dtype
        if self.kind in _NUMBERS:
            return type(x) is self.kind
        return same(x, self.value)

    def __repr__(self) -> str:
        if self.nested:
            return "a nested tensor"
        if self.tensor:
            shape = ", ".join(str(n) for n in self.shape)
            return f"{str(self.dtype).removeprefix('torch.')}[{shape}]"
        if self.kind in _NUMBERS:
            return f"a Python {self.kind.__name__}"
        return repr(self.value)


def same(a: Any, b: Any) -> bool:
    """Whether two values that are no tensors are of one type and equal."""
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # noqa: BLE001 (an object whose == fails equals only itself)
        return False


def _take_apart(x: Any) -> Node | None:
    """One level of a pytree of PyTorch."""
    children, _ = pytree.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    if len(children) == 1 and children[0][0] == ():
        return None
    return Node(f"a {type(x).__name__}", [("".join(map(str, path)), y) for path, y in children])


def _differ(expected: _Leaf, x: Any) -> tuple[str, str] | None:
    return None if expected.fits(x) else (str(expected), str(_Leaf(x)) + _advice(expected, x))


def _advice(expected: _Leaf, x: Any) -> str:
    """What to do about a tensor that is only of another precision, as autocast makes them."""
    if not expected.tensor or expected.nested or not isinstance(x, Tensor) or x.is_nested:
        return ""
    alike = all(d.is_floating_point for d in (expected.dtype, x.dtype)) or (
        expected.dtype.is_complex and x.is_complex()
    )
    return f". Cast it: .to({expected.dtype})" if alike and x.shape == expected.shape else ""


def struct_of(tree: Any) -> Any:
    """`tree` with a tensor without memory (on the device "meta") in place of each tensor."""
    return pytree.tree_map_only(Tensor, _struct_of_tensor, tree)


def _struct_of_tensor(t: Tensor) -> Tensor:
    if t.is_nested:  # it has no shape that could be compared
        message = (
            "expected tensors with a shape as arguments and results of a converted function, got a "
            f"nested tensor of {t.size(0)} parts. Hand over its parts, t.unbind(), or a padded "
            "tensor, and nest them inside."
        )
        raise StructureError(message)
    return torch.empty(t.shape, dtype=t.dtype, device="meta")
