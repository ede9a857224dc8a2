"""scipy itself, or what to install; numbers as tensors, and functions that leave PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freevars._names.callables import plain_name
from freevars._solvers import scipy_calls
from freevars.torch import _compat
from freevars.torch._compat import pytree

try:
    from scipy import optimize

    from freevars._solvers import scipy_runs as runs
except ImportError as error:  # pragma: no cover (tested in a process of its own)
    message = "freevars.torch.scipy needs scipy: pip install 'freevars[scipy]'"
    raise ImportError(message) from error

__all__ = [
    "as_number",
    "as_start",
    "as_tensor",
    "is_number",
    "not_in_pytorch",
    "optimize",
    "refuse_derivatives",
    "runs",
    "start_and_value",
    "value_in_pytorch",
]


def refuse_derivatives(name: str, /, **given: Any) -> None:
    """As `scipy_calls.refuse_derivatives`."""
    scipy_calls.refuse_derivatives(name, "PyTorch", "torch.autograd.Function", **given)


def as_tensor(a: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A floating or complex tensor, from one, a NumPy array, a number, or lists of these.

    Integers and Python's own numbers have the precision of `dtype`, or else the default one.
    """
    if isinstance(a, (list, tuple)) and any(isinstance(x, Tensor) for x in pytree.tree_leaves(a)):
        return torch.stack([as_tensor(part, dtype) for part in a])
    # A copy of an array, which may be read-only.
    t = a if isinstance(a, Tensor) else torch.as_tensor(np.array(a))
    if _precision(a) is not None:
        return t
    real = dtype or torch.get_default_dtype()
    return t.to(real.to_complex() if t.is_complex() else real)


def _precision(a: Any) -> torch.dtype | None:
    """Of a tensor or an array of NumPy; None of integers and Python's own numbers."""
    if not isinstance(a, (Tensor, np.ndarray, np.generic)):
        return None
    dtype = a.dtype if isinstance(a, Tensor) else torch.as_tensor(np.array(a)).dtype
    return dtype.to_real() if dtype.is_floating_point or dtype.is_complex else None


def as_start(x0: Any, dtype: torch.dtype | None = None) -> Any:
    """x0 with tensors for its numbers and arrays, as `as_tensor`.

    As in scipy a list or tuple of numbers is an array.
    """
    known = (Tensor, np.ndarray, np.generic, int, float, complex)
    if type(x0) in (list, tuple) and all(isinstance(x, known) and np.ndim(x) == 0 for x in x0):
        return as_tensor(x0, dtype)
    return pytree.tree_map_only(known, functools.partial(as_tensor, dtype=dtype), x0)


def start_and_value(
    name: str, fun: Callable[..., Any], x0: Any, args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """`as_start` of x0, and `value_in_pytorch` there.

    Python's own numbers have no precision. They take that of the tensors beside them, or else the
    first, of the default one and double, that `fun` takes and does not widen.
    """
    known = {p for p in map(_precision, pytree.tree_leaves(x0)) if p is not None}
    if known:
        start = as_start(x0, functools.reduce(torch.promote_types, known))
        return start, value_in_pytorch(name, fun, start, args)
    default = as_start(x0)
    try:
        value = value_in_pytorch(name, fun, default, args)
    except RuntimeError as error:
        refused: RuntimeError | None = error  # of a product of tensors of two precisions, say
    else:
        refused = None
        if torch.float64 not in map(_precision, pytree.tree_leaves(value)):
            return default, value
    double = as_start(x0, torch.float64)
    try:
        return double, value_in_pytorch(name, fun, double, args)
    except RuntimeError:
        if refused is not None:
            raise refused from None
        return default, value


def is_number(value: Any) -> bool:
    """Whether it is a tensor of one number, of any shape: scipy takes each for a number."""
    return isinstance(value, Tensor) and value.numel() == 1


def as_number(fun: Callable[..., Any], value: Any) -> Callable[..., Any]:
    """A function that has such a value, with values of shape ()."""
    if not is_number(value) or value.shape == ():
        return fun
    return functools.partial(_reshaped, fun)


def _reshaped(fun: Callable[..., Any], *args: Any) -> Any:
    return fun(*args).reshape(())


def not_in_pytorch(name: str, fun: Any, said: str) -> TypeError:
    """The error about a function that leaves PyTorch."""
    code = getattr(getattr(fun, "func", fun), "__code__", None)  # of a partial, its function's
    where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return TypeError(
        f"{name}: expected a function in PyTorch, got {plain_name(fun)}{where}, {said}. Write it,"
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
