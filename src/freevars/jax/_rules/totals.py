"""Totals that a solver conserves, which complete linearly dependent equations.

The equations of a steady state, as in chemistry, conserve totals of the unknowns: w.F(x) = 0 for
every x, for a row w of the conservation law. Then dF/dx is singular, and which solution a solver
finds depends on the totals of its start, c(x) = c(x0). So x(t, x0) is a solution of

    F(x, t) + W (c(x) - c(x0)) = 0

with a constant matrix W, a column for each total. Where F = 0 and the totals are kept this holds
for every W; its derivative dF/dx + W dc/dx is regular where the columns of W lie outside the range
of dF/dx, as columns without a pattern do. Each is in the units of the equations, per unit of the
total. Not here: what `c` is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from freevars.jax._rules.coordinates import Coordinates, Space, probe

__all__ = ["Totals", "completed"]

Tree: TypeAlias = Any  # a pytree of real arrays
Totals: TypeAlias = Callable[[Any], Any]  # conserved(x); a pytree of what it reads besides


def completed(
    at: Callable[[Tree], Tree], totals: Totals, coordinates: Coordinates, v: Tree, v0: Tree
) -> Callable[[Tree, Totals, Tree, Tree], Tree]:
    """`complete(f, totals, v, v0)`: F + W (c(x) - c(x0)), for F near v, where W is made."""
    space = Space()

    def count(totals: Totals, v: Tree) -> list[Any]:
        kept = totals(coordinates.from_real(v))
        real = Coordinates(kept).to_real(kept)
        return [jnp.ravel(leaf).astype(coordinates.dtype) for leaf in jax.tree.leaves(real)]

    totals, fixed, start = jax.lax.stop_gradient((totals, v, v0))
    least = space.max(fixed) + space.max(start)
    unit = jax.tree.map(
        lambda a, b: jnp.maximum(jnp.abs(a) + jnp.abs(a - b), 1e-3 * least), fixed, start
    )
    direction = jax.tree.map(jnp.multiply, unit, probe(fixed, 4))
    rows, sizes = jax.lax.stop_gradient(
        (
            jax.jvp(at, (fixed,), (direction,))[1],
            jax.jvp(functools.partial(count, totals), (fixed,), (direction,))[1],
        )
    )
    largest = space.max(rows)
    rows = jax.tree.map(lambda leaf: jnp.maximum(jnp.abs(leaf), 1e-3 * largest), rows)

    def complete(f: Tree, totals: Totals, v: Tree, v0: Tree) -> Tree:
        k = 5
        for now, before, size in zip(count(totals, v), count(totals, v0), sizes, strict=True):
            relative = (now - before) / jnp.where(size == 0, 1, jnp.abs(size))
            for i in range(relative.size):
                column = jax.tree.map(jnp.multiply, rows, probe(rows, k))
                f = jax.tree.map(lambda f, w, c=relative[i]: f + c * w, f, column)
                k += 1
        return f

    return complete
