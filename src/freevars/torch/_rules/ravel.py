"""An unknown of any structure as real vectors, one for each problem of a batch, and back.

A complex number becomes two real ones, since the equations need not be holomorphic. DTensors become
whole tensors (`sharded.py`).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from freevars._solvers.bounds import Component
from freevars.errors import StructureError
from freevars.torch._compat import pytree
from freevars.torch._convert.structure import Structure
from freevars.torch._rules.complex_pairs import as_complex, as_real
from freevars.torch._rules.sharded import layout_of, spread, whole
from freevars.torch._rules.vectors import norm

__all__ = ["Unknown"]


class Unknown:
    """The structure of an unknown whose first `batch_dims` axes count independent problems;
    `unravel(ravel(x, name)) == x`, and `ravel` gives Float[Tensor, "problems n"]."""

    def __init__(self, x0: Any, batch_dims: int = 0) -> None:
        leaves, self.spec = pytree.tree_flatten(x0)
        kinds = {t.dtype.to_real() if isinstance(t, Tensor) else type(t) for t in leaves}
        if len(kinds) != 1 or not all(map(_is_unknown, leaves)):
            shown = ", ".join(Structure.shown(t) for t in leaves) or "no leaves"
            message = (
                "x0 expected real or complex tensors of one precision, neither sparse nor nested, "
                f"got {shown}."
            )
            raise StructureError(message)
        batches = {tuple(t.shape[:batch_dims]) for t in leaves}
        self.batch = batches.pop()
        if batches or len(self.batch) < batch_dims:
            shown = ", ".join(Structure.shown(t) for t in leaves)
            message = (
                f"x0 expected tensors that begin with the same {batch_dims} axes "
                f"(batch_dims={batch_dims}), got {shown}."
            )
            raise StructureError(message)
        self.problems = math.prod(self.batch)
        self._structure = Structure((x0,), root="x")
        self._like = [
            (t.shape, t.dtype, math.prod(t.shape[batch_dims:]) * (2 if t.is_complex() else 1))
            for t in leaves
        ]
        self._layouts = [layout_of(t) for t in leaves]
        self.dtype: torch.dtype = leaves[0].dtype.to_real()
        self.n = sum(n for _, _, n in self._like)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each tensor."""
        return [tuple(shape) for shape, _, _ in self._like]

    def ravel(self, x: Any, name: str, *, copy: bool = True) -> Tensor:
        """`name` is for the error where `x` is of another structure. Without `copy` it may be a
        view of `x`."""
        leaves = map(whole, self.check(x, name))
        sizes = (n for _, _, n in self._like)
        real = zip(map(as_real, leaves), sizes, strict=True)
        parts = [t.reshape(self.problems, n) for t, n in real]
        return torch.cat(parts, dim=1) if copy or len(parts) > 1 else parts[0]

    def check(self, x: Any, name: str) -> list[Tensor]:
        """The parts of `x`; raises `StructureError` where they are not like those of the
        unknown."""
        return self._structure.check((x,), name)

    def unravel(self, x: Tensor) -> Any:
        parts = zip(self._whole(x), self._layouts, strict=True)
        return pytree.tree_unflatten([spread(t, layout) for t, layout in parts], self.spec)

    def structure(self) -> Any:
        """An unknown without values, on the device "meta"."""
        x = torch.empty(self.problems, self.n, dtype=self.dtype, device="meta")
        return pytree.tree_unflatten(self._whole(x), self.spec)

    def _whole(self, x: Tensor) -> list[Tensor]:
        """The tensors of a ravelled `x`."""
        leaves = []
        start = 0
        for shape, dtype, n in self._like:
            # Unlike those of `split`, a part may be written to in place.
            part = x if n == self.n else x.narrow(1, start, n)
            start += n
            leaves.append(
                as_complex(part.reshape(*shape, 2)) if dtype.is_complex else part.reshape(shape)
            )
        return leaves

    def components(self, k: int, x: Tensor, change: Tensor) -> Iterator[Component]:
        """The numbers of problem `k`, by name; none of a complex unknown, which has no order. Under
        `vmap` there are the problems of many unknowns."""
        member, k = divmod(k, self.problems)
        rows = slice(member * self.problems, (member + 1) * self.problems)
        steps = self._whole(change[rows])
        named = pytree.tree_unflatten(self._whole(x[rows]), self.spec)
        leaves = pytree.tree_flatten_with_path(named)[0]
        at = _index(k, self.batch)
        for (path, leaf), step in zip(leaves, steps, strict=True):
            if leaf.is_complex():
                return
            own, own_step = leaf[at], step[at]
            for i in range(own.numel()):
                index = (*at, *_index(i, tuple(own.shape)))
                where = f"[{', '.join(map(str, index))}]" if index else ""
                value = own.reshape(-1)[i]
                yield Component(
                    f"x{pytree.keystr(path)}{where}",
                    float(value),
                    float(own_step.reshape(-1)[i]),
                    str(float(value)),
                    lambda number, like=value: float(torch.tensor(number).to(like.dtype)),  # type: ignore[misc]
                )

    def magnitude(self, x: Tensor) -> Tensor:
        """How large each component of a ravelled `x` is; the parts of a complex number as it."""
        x = x.abs()
        if not any(dtype.is_complex for _, dtype, _ in self._like):
            return x
        parts = []
        for part, (_, dtype, n) in zip(self._parts(x), self._like, strict=True):
            pairs = part.reshape(len(x), n // 2, 2) if dtype.is_complex else part[..., None]
            parts.append(norm(pairs).expand_as(pairs))
        return torch.cat([p.reshape(len(x), -1) for p in parts], dim=1)

    def leafwise(self, x: Tensor) -> Tensor:
        """The root mean square over each tensor of a ravelled `x`, in the place of each of its
        components."""
        sizes = map(norm, self._parts(x))
        ns = [n for _, _, n in self._like]
        return torch.cat(
            [(s / max(n, 1) ** 0.5).expand(-1, n) for s, n in zip(sizes, ns, strict=True)], dim=1
        )

    def largest(self, x: Tensor) -> Tensor:
        """The largest component of each tensor of a ravelled `x`, in the same places."""
        return torch.cat(
            [
                part.abs().amax(1, keepdim=True).expand_as(part) if part.shape[1] else part
                for part in self._parts(x)
            ],
            dim=1,
        )

    def _parts(self, x: Tensor) -> list[Tensor]:
        return list(torch.split(x, [n for _, _, n in self._like], dim=1))


def _index(i: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of the `i`-th entry of a tensor of this shape."""
    index: list[int] = []
    for n in reversed(shape):
        i, last = divmod(i, n)
        index.insert(0, last)
    return tuple(index)


def _is_unknown(t: Any) -> bool:
    """Whether a tensor can be solved for: numbers of a definite place, with derivatives."""
    if not isinstance(t, Tensor) or t.is_nested or t.layout is not torch.strided:
        return False
    return t.is_floating_point() or t.is_complex()
