"""The optimality condition of a solution, as F(x) = 0 on real vectors.

Each kind of solver has its own: `fun` is zero, its gradient is zero, `fun` returns x, the sum of
its squares is stationary, or a condition of the user's holds. The signs are those of the JAX host.
Not here: whose functions these are (`problem.py`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from freevars._solvers.verdict import Kind, is_minimum
from freevars.errors import StructureError
from freevars.torch._compat import pytree
from freevars.torch._convert.structure import Structure
from freevars.torch._rules.complex_pairs import as_real
from freevars.torch._rules.products import vjp
from freevars.torch._rules.ravel import Unknown
from freevars.torch._rules.sharded import whole

__all__ = [
    "check_parts",
    "check_value",
    "joined",
    "numbers_in",
    "optimality",
    "stated_by",
    "value_of",
]

Functions = Mapping[str, Callable[[Any], Any]]  # of x as the user has it


def stated_by(kind: Kind) -> str:
    """The function that F is computed from: `fun`, or a condition that calls it."""
    return "condition" if kind == "implicit" else "fun"


def optimality(
    kind: Kind, functions: Functions, unknown: Unknown, x: Tensor, *, has_aux: bool, name: str
) -> Tensor:
    """F at x, Float[Tensor, "problems n"]; `has_aux`: the function returns `(value, aux)`."""
    fun = functions[stated_by(kind)]

    def value(x: Tensor) -> Any:
        out = fun(unknown.unravel(x))
        return out[0] if has_aux else out

    if is_minimum(kind):
        ones = torch.ones(unknown.batch, dtype=x.dtype, device=x.device)
        return vjp(lambda x: value_of(kind, fun(unknown.unravel(x)), unknown, has_aux), x, ones)
    if kind == "fixed_point":
        return x - unknown.ravel(value(x), f"the result of {name}", copy=False)
    return joined(value(x), unknown, x)


def value_of(kind: Kind, out: Any, unknown: Unknown, has_aux: bool) -> Tensor:  # noqa: FBT001
    """The objective of a minimum, of each problem, from what the function returned."""
    out = whole(out[0] if has_aux else out)
    return out if kind == "argmin" else _half_square(out, unknown)


def _half_square(residual: Any, unknown: Unknown) -> Tensor:
    """|r|^2 / 2 of each problem; its gradient is J^T r."""
    sums = [t.square().sum(1) for t in _rows(residual, unknown)]
    return torch.stack(sums).sum(0).to(unknown.dtype).reshape(unknown.batch) / 2


def joined(equations: Any, unknown: Unknown, x: Tensor) -> Tensor:
    """Equations in any structure, or none, as Float[Tensor, "problems n"] like x."""
    parts = _rows(equations, unknown)
    if not parts:
        return x[:, :0]
    return torch.cat([t.to(unknown.dtype) for t in parts], dim=1)


def _rows(tree: Any, unknown: Unknown) -> list[Tensor]:
    """Its tensors, a row of real numbers for each problem, of which there may be none."""
    parts = [as_real(whole(t)) for t in pytree.tree_leaves(tree)]
    return [t.reshape(unknown.problems, numbers_in(t, unknown)) for t in parts]


def numbers_in(t: Tensor, unknown: Unknown) -> int:
    """How many entries each problem has in it."""
    return math.prod(t.shape[len(unknown.batch) :])


def check_value(kind: Kind, out: Any, unknown: Unknown, name: str) -> None:
    """Refuses what a function of this name returned on the example, if F cannot be made of it."""
    batch = unknown.batch
    if kind == "argmin":
        if not isinstance(out, Tensor) or out.shape != batch or not out.is_floating_point():
            wanted = f"real tensor of shape {list(batch)}" if batch else "real scalar tensor"
            how = "return one number for each problem" if batch else "end in .sum(), say"
            message = (
                f"argmin expected {name} to return a {wanted}, got {Structure.shown(out)}. Let it"
                f" {how}; least_squares takes residuals, and root equations."
            )
            raise StructureError(message)
        return
    if kind == "fixed_point":
        unknown.check(out, f"the result of {name}")
        return
    leaves = check_parts(kind, out, batch, name)
    if not leaves:
        message = f"{kind} expected {name} to return real or complex tensors, got nothing."
        raise StructureError(message)
    count = sum(t.numel() * (2 if t.is_complex() else 1) for t in leaves)
    if not is_minimum(kind) and count != unknown.problems * unknown.n:
        message = (
            f"expected one equation for each unknown, or there is no derivative; {name} has {count}"
            f" components for {unknown.problems * unknown.n} unknowns. Where there are more, take"
            " least_squares; where there are fewer, add a condition."
        )
        raise StructureError(message)


def check_parts(what: str, out: Any, batch: tuple[int, ...], name: str) -> list[Tensor]:
    """The tensors that a function of this name returned on the example, refused where they cannot
    be equations."""
    leaves = pytree.tree_leaves(out)
    if not all(_is_part(t, batch) for t in leaves):
        of = f" that begin with the axes {list(batch)} of the problems" if batch else ""
        shown = ", ".join(map(Structure.shown, leaves))
        message = f"{what} expected {name} to return real or complex tensors{of}, got {shown}."
        raise StructureError(message)
    return leaves


def _is_part(t: Any, batch: tuple[int, ...]) -> bool:
    is_number = isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())
    return is_number and t.shape[: len(batch)] == batch
