"""scipy itself, or what to install; where a search starts, and functions that are no PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freevars._solvers import scipy_calls
from freevars._solvers.signature import solver_name
from freevars.torch import _compat
from freevars.torch._compat import pytree

try:
    from scipy import integrate, optimize
except ImportError as error:  # pragma: no cover (tested in a process of its own)
    message = "freevars.torch.scipy needs scipy: pip install 'freevars[scipy]'"
    raise ImportError(message) from error

__all__ = [
    "as_start",
    "integrate",
    "not_in_pytorch",
    "optimize",
    "refuse_derivatives",
    "value_in_pytorch",
]


def refuse_derivatives(name: str, **given: Any) -> None:
    """As `scipy_calls.refuse_derivatives`."""
    scipy_calls.refuse_derivatives(name, "PyTorch", "torch.autograd.Function", **given)


def as_start(x0: Any) -> Any:
    """x0 with tensors for its numbers and NumPy arrays; a Python number has the default dtype."""

    def tensor(leaf: Any) -> Any:
        if isinstance(leaf, (np.ndarray, np.generic)):
            return torch.as_tensor(np.array(leaf))
        if isinstance(leaf, (int, float)):
            return torch.tensor(float(leaf))
        return leaf

    if isinstance(x0, list) and all(isinstance(x, (int, float)) for x in x0):
        return torch.tensor(x0, dtype=torch.get_default_dtype())  # a list for an array
    return pytree.tree_map(tensor, x0)


def not_in_pytorch(name: str, fun: Any, said: str) -> TypeError:
    """The error about a function that leaves PyTorch."""
    code = getattr(fun, "__code__", None)
    where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return TypeError(
        f"{name}: expected a function in PyTorch, got {solver_name(fun)}{where}, {said}. Write it,"
        " what it calls and the constraints with torch: torch.exp(x) for np.exp(x) or math.exp(x),"
        " without .item(), .detach() or float(x). A function that has to stay in NumPy goes"
        " through torch.autograd.Function, with a derivative of your own."
    )


def value_in_pytorch(
    name: str, fun: Callable[..., Any], x0: Any, args: tuple[Any, ...], *, by_x: bool = True
) -> Any:
    """The value of `fun` at x0; says what to do if it leaves PyTorch there.

    With `by_x` it has to depend on x.

    Raises:
        TypeError: it was written for numbers, in NumPy say.
    """
    try:
        value = _at_a_leaf(fun, x0, args)
    except (RuntimeError, TypeError) as error:
        if "numpy" in str(error).lower():
            said = str(error).partition("\n")[0].rstrip(".")
            raise not_in_pytorch(
                name, fun, f"which asks for the numbers of a tensor ({said})"
            ) from error
        raise
    leaves = pytree.tree_leaves(value)
    for leaf in leaves:
        if isinstance(leaf, (float, int, np.ndarray, np.generic)):
            raise not_in_pytorch(name, fun, f"which returns {type(leaf).__name__}")
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    known = by_x and not _compat.transforms_active()
    if known and tensors and not any(tensor.requires_grad for tensor in tensors):
        raise not_in_pytorch(name, fun, "whose value has no derivative by x")
    return value


def _at_a_leaf(fun: Callable[..., Any], x0: Any, args: tuple[Any, ...]) -> Any:
    if _compat.transforms_active():  # there, no tensor can be made a leaf
        return fun(x0, *args)
    with torch.inference_mode(mode=False), torch.enable_grad():
        x = pytree.tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(), x0)
        return fun(x, *args)
