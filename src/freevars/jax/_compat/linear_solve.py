"""`jax.lax.custom_linear_solve`, also where not all values vary over the same named axes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from freevars.jax._compat.axes import (
    manual_axes,
    not_more_varying,
    tracks_varying,
    vary_over,
    varying_axes,
)
from freevars.jax._compat.linear_map import linear_map
from freevars.jax._compat.programs import evaluate, separate_constants

__all__ = ["custom_linear_solve"]

Tree: TypeAlias = Any
Map: TypeAlias = Callable[[Tree], Tree]


def custom_linear_solve(matvec: Map, b: Tree, solve: Map, transposed: Map) -> Tree:
    """`jax.lax.custom_linear_solve`; the solvers are given the right-hand side alone.

    JAX 0.10 makes all values that the functions hold, and b, vary over every named axis that one of
    them varies over (`auto_insert_reshard`), but traces the functions for the types that they had,
    and fails where these are used again. So all have one type before JAX sees them, and the
    functions give each its own back.
    """
    if not any(map(tracks_varying, manual_axes())):
        return _solve(matvec, b, solve, transposed)
    programs = [separate_constants(jax.make_jaxpr(f)(b)) for f in (matvec, solve, transposed)]
    leaves, tree = jax.tree.flatten(b)
    held = [value for _, constants in programs for value in constants]
    axes = frozenset[str]().union(*map(varying_axes, [*leaves, *held]))
    types = list(map(jax.typeof, leaves))
    maps = [_Varying(p, (*map(jax.typeof, constants), *types), axes) for p, constants in programs]
    given = [[vary_over(value, axes) for value in constants] for _, constants in programs]
    b = [vary_over(leaf, axes) for leaf in leaves]
    results = [*map(jax.typeof, b)]
    forward = [functools.partial(m.forward, values) for m, values in zip(maps, given, strict=True)]
    # As an equation of its own: what its transpose reads of `given` stays inside.
    forward[0] = functools.partial(linear_map, maps[0], given[0], types=results)
    x = _solve(forward[0], b, *forward[1:])
    return tree.unflatten(map(not_more_varying, x, types))


def _solve(matvec: Map, b: Tree, solve: Map, transposed: Map) -> Tree:
    return jax.lax.custom_linear_solve(matvec, b, lambda _, b: solve(b), lambda _, b: transposed(b))


@dataclass(frozen=True, eq=False)
class _Varying:
    """A linear program as one for arrays that vary over `axes`, what it holds among them."""

    program: Any  # of what it holds, then of its inputs
    types: tuple[Any, ...]  # that it was traced for
    axes: frozenset[str]

    def forward(self, given: Sequence[Any], x: Sequence[Any]) -> list[Any]:
        operands = map(not_more_varying, [*given, *x], self.types)
        return [vary_over(y, self.axes) for y in evaluate(self.program, list(operands))]

    def transposed(self, given: Sequence[Any], g: Sequence[Any]) -> list[Any]:
        zeros = [
            vary_over(jnp.zeros(t.shape, t.dtype), self.axes) for t in self.types[len(given) :]
        ]
        return list(jax.vjp(lambda *x: self.forward(given, x), *zeros)[1](list(g)))
