"""The derivative at a solution whose values are known, outside of any program.

Whenever a solver is differentiated, JAX splits a compiled derivative into a known and a linear
part, which takes longer than computing it. Here it is split once, in the program, which gives the
verdict and the linear map as data. The map is then one operation, and its transpose another
program. Not here: what the programs compute (`rule`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from freevars.jax import _compat
from freevars.jax._rules.explain import not_finite

__all__ = ["derivative_of", "pushed", "transposed"]


def derivative_of(
    name: str, programs: tuple[Any, Any], minus: Any, x: Any, directions: list[Any]
) -> Any:
    """The direction of x, by a linear map of directions to one of -x that is a pytree. `programs`
    are `pushed` and `transposed`, compiled; `name` is the solver's.

    A backward pass outside of any program raises where what it brings back is not finite, as a
    forward one does.
    """
    given, tree = jax.tree.flatten(minus)
    leaves, structure = jax.tree.flatten(x)
    types = tuple(map(jax.typeof, directions))
    fun = _Push(name, *programs, tree, types)
    return structure.unflatten(
        _compat.linear_map(fun, given, directions, [*map(jax.typeof, leaves)])
    )


def pushed(minus: Any, directions: Sequence[Any]) -> list[Any]:
    """The direction of x, its leaves."""
    return _negated(jax.tree.leaves(minus(list(directions))))


def transposed(minus: Any, g: Sequence[Any], types: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """The transpose of that, and whether all of what it gives is finite."""
    (found,) = jax.linear_transpose(lambda dots: jax.tree.leaves(minus(dots)), [*types])(list(g))
    finite = jnp.asarray(True)
    for leaf in found:
        finite &= jnp.all(jnp.isfinite(leaf))
    return _negated(found), finite


def _negated(leaves: Sequence[Any]) -> list[Any]:
    """Without -0, which would be surprising for a derivative of zero."""
    return [0 - leaf for leaf in leaves]


@dataclass(frozen=True)
class _Push:
    name: str
    pushed: Callable[..., Any]
    transpose: Callable[..., Any]
    tree: Any  # of the map
    types: tuple[Any, ...]  # of the directions

    def forward(self, given: Sequence[Any], x: Sequence[Any]) -> Sequence[Any]:
        out: Sequence[Any] = self.pushed(self.tree.unflatten(given), list(x))
        return out

    def transposed(self, given: Sequence[Any], g: Sequence[Any]) -> Sequence[Any]:
        found, finite = self.transpose(self.tree.unflatten(given), list(g), self.types)
        if not isinstance(finite, _compat.Tracer) and not finite:
            raise not_finite(self.name)
        return found
