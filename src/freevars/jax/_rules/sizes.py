"""How large the components of a solution are: what a Newton step is measured against.

Not here: the measure itself (`diagnostics`), and which component counts by which of its sizes
(`closer`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from freevars._solvers.verdict import Limits
from freevars.jax._rules.coordinates import Coordinates, Space

__all__ = ["Unknown", "limits_of"]

Tree: TypeAlias = Any  # a pytree of real arrays


class Unknown(NamedTuple):
    """A solution in real coordinates, and its sizes; constant."""

    v: Tree
    near: Tree  # how large each component is: |x|
    far: Tree  # what the solver worked with: max(|x|, |x - x0|)
    d: Tree  # the size of each component
    limits: Limits
    largest: Callable[[Tree], Tree]  # of the part that each leaf belongs to
    has_pairs: bool  # the parts of complex numbers, which count by these

    @staticmethod
    def of(
        v: Tree,
        v0: Tree,
        space: Space,
        coordinates: Coordinates,
        limits: Limits,
        *,
        apart: bool = False,
    ) -> Unknown:
        """At x, found from x0. What happens to be zero is as large as a share of the largest
        component, of its own part where x is a dict of parts that are `apart`."""

        def largest(v: Tree) -> Tree:
            if apart:
                return {name: alike(v[name], space.max(_only(name, v))) for name in v}
            return alike(v, space.max(v)) if jax.tree.leaves(v) else v

        def alike(v: Tree, most: Any) -> Tree:
            return jax.tree.map(lambda leaf: most.astype(leaf.dtype), v)

        v, v0 = jax.lax.stop_gradient((v, v0))
        near = coordinates.magnitude(v)
        way = coordinates.magnitude(jax.tree.map(jnp.subtract, v, v0))
        far = jax.tree.map(jnp.maximum, near, way)
        d = jax.tree.map(lambda a, most: jnp.maximum(a, limits.column * most), far, largest(v))
        d = jax.tree.map(lambda leaf: jnp.where(leaf > 0, leaf, 1), d)
        return Unknown(v, near, far, d, limits, largest, coordinates.has_pairs)


def limits_of(coordinates: Coordinates, tol: float | None) -> Limits:
    """The limits for an unknown of these coordinates."""
    return Limits.of(coordinates.eps, float(jnp.finfo(coordinates.dtype).eps), tol=tol)


def _only(name: str, v: dict[str, Tree]) -> dict[str, Tree]:
    """The parts, and zeros for the others."""
    return {k: v[k] if k == name else jax.tree.map(jnp.zeros_like, v[k]) for k in v}
