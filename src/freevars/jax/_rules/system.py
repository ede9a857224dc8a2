"""A linear system, prepared for any number of right-hand sides, and what a refusal does to it.

Not here: how a system is solved (`direct`, `iterative`), and which way (`linear`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from freevars.jax import _compat
from freevars.jax._rules import krylov, scaled
from freevars.jax._rules.coordinates import Space
from freevars.jax._rules.operator import LinearOperator

__all__ = ["LinearSystem", "guarded", "linear_solve", "nothing_if", "pass_if", "times", "where"]

Tree: TypeAlias = Any  # a pytree of real arrays of one dtype
Solve: TypeAlias = Callable[[Tree], Tree]  # b -> x


class LinearSystem(NamedTuple):
    """A x = b, prepared for any number of b. Trees are as the operator's."""

    operator: LinearOperator
    space: Space
    # (b, good) -> x, linear in b, differentiable, its transpose too. Unless `good` (True, or an
    # array) it is NaN where b is not zero: what is refused adds nothing where nothing is asked.
    solve: Callable[..., Tree]
    apply_inverse: Callable[[list[Tree]], list[Tree]]  # of several b at once, without derivatives
    matrix: Any = None  # Float[n, n] where it is written out, a constant
    least_squares: bool = False  # a solution is the shortest one, and may leave a residual
    exact: bool = True  # not a truncated series, whose residual means nothing
    scaled: scaled.Scaled | None = None  # the factors, where it is written out
    # (b, tol) -> x with |A x - b| <= tol |b|, a constant, and that quotient, in the units that it
    # is solved in, where it is not written out
    roughly: Callable[[Tree, float], tuple[Tree, Any]] | None = None
    tried: Any = None  # `iterative.Tried` of a symmetric system that is not written out

    def image(self, v: Tree) -> Tree:
        """A v, a constant."""
        return jax.lax.stop_gradient(self.operator.matvec(v))


def linear_solve(matvec: Solve, b: Tree, solve: Solve, transposed: Solve) -> Tree:
    """`custom_linear_solve`, of trees.

    JAX can transpose it, and differentiate the transpose, only where all leaves of b, of A x and,
    for the transpose, of x depend on the differentiated values. A leaf of an equation that reads
    none of them does not, nor does one without entries.
    """

    def tied_matvec(v: Tree) -> Tree:
        # On both sides, so that its transpose is tied too.
        return _compat.tied(matvec(_compat.tied(v)))

    b = _compat.tied(b)
    return _compat.tied(_compat.custom_linear_solve(tied_matvec, b, solve, transposed))


def guarded(space: Space, good: Any, x: Tree, b: Tree) -> Tree:
    """The solution x of a good system; else NaN, but 0 where b is zero."""
    if good is True:
        return x
    nothing = jax.tree.map(jnp.zeros_like, x)
    return krylov.choose(space.max(b) == 0, nothing, where(good, x))


def pass_if(good: Any, space: Space, b: Tree) -> Tree:
    """b, or NaN unless good; linear, and so for its transpose."""
    if good is True:
        return b

    def same(b: Tree) -> Tree:
        return guarded(space, good, b, b)

    return linear_solve(lambda v: v, b, same, same)


def nothing_if(good: Any, space: Space, like: Tree, dots: list[Any]) -> Tree:
    """Zeros, for directions in which nothing changes if that is `good`; else NaN, unless these
    directions are zero. Linear in them, and so for its transpose."""
    if not jax.tree.leaves(like):
        return like
    total = sum(jnp.sum(jnp.real(dot)).astype(jax.tree.leaves(like)[0].dtype) for dot in dots)
    spread = jax.tree.map(
        lambda leaf: _compat.like_type(jnp.broadcast_to(total, leaf.shape), leaf), like
    )

    def nothing(b: Tree) -> Tree:
        return guarded(space, good, jax.tree.map(jnp.zeros_like, b), b)

    return linear_solve(lambda v: v, spread, nothing, nothing)


def where(good: Any, x: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.where(good, leaf, jnp.nan), x)


def times(a: Any, x: Tree) -> Tree:
    return jax.tree.map(lambda leaf: a * leaf, x)
