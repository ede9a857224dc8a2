"""An unknown of any structure as one real vector, and back. Complex parts become two real ones."""

from typing import Any

import torch
from torch import Tensor

from freevars.errors import StructureError
from freevars.torch._compat import pytree
from freevars.torch._convert.structure import Structure

__all__ = ["Flat"]


class Flat:
    """The structure of an unknown; `unravel(ravel(x, name)) == x`."""

    def __init__(self, x0: Any) -> None:
        leaves, self.spec = pytree.tree_flatten(x0)
        kinds = {t.dtype.to_real() if isinstance(t, Tensor) else type(t) for t in leaves}
        if len(kinds) != 1 or not all(
            isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) for t in leaves
        ):
            shown = ", ".join(Structure.shown(t) for t in leaves) or "no leaves"
            message = f"x0 expected real or complex tensors of one precision, got {shown}."
            raise StructureError(message)
        self._structure = Structure((x0,), root="x")
        self._like = [(t.shape, t.dtype, t.numel() * (2 if t.is_complex() else 1)) for t in leaves]

    def ravel(self, x: Any, name: str) -> Tensor:
        """One real vector of all parts of `x`; `name` is for the error where `x` is of another
        structure."""
        leaves = self.check(x, name)
        return torch.cat(
            [(torch.view_as_real(t) if t.is_complex() else t).reshape(-1) for t in leaves]
        )

    def check(self, x: Any, name: str) -> list[Tensor]:
        """The parts of `x`; raises `StructureError` where they are not like those of the
        unknown."""
        return self._structure.check((x,), name)

    def unravel(self, x: Tensor) -> Any:
        leaves = []
        start = 0
        for shape, dtype, n in self._like:
            part = x.narrow(0, start, n)  # unlike those of `split`, it may be written to in place
            start += n
            leaves.append(
                torch.view_as_complex(part.reshape(*shape, 2))
                if dtype.is_complex
                else part.reshape(shape)
            )
        return pytree.tree_unflatten(leaves, self.spec)
