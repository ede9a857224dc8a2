"""The implicit function theorem in reverse mode only, by vector-Jacobian products.

JAX derives reverse mode by transposing forward mode. A function that holds a `jax.custom_vjp` has
no forward mode, and where its backward pass cannot be transposed either (it calls an adaptive ODE
solver, adjoint code behind a callback, or loops until it is done), a rule for forward mode is
impossible. Then the solution has a rule for reverse mode: for a cotangent g

    (dF/dx)^T u = g,    the cotangent of t is -(dF/dt)^T u,

with all products by the pullback of F. The solution u of the linear system is a root as well, of
M u = b with M = (dF/dx)^T, and gets such a rule for itself: for a cotangent w

    M^T z = w,    the cotangents of b and of M are z and -z u^T,

so that the whole is differentiable again, as far as the pullback of F is. For a minimum, F is a
gradient, and its pullback along u is the derivative of the gradient of `fun`, by x and t, in the
direction u: forward over reverse, which asks nothing of a backward pass but its jvp. Not here:
which functions need this, and when a solution counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jax.flatten_util import ravel_pytree

from freevars._sequences import replaced
from freevars.jax import _compat
from freevars.jax._rules import implicit
from freevars.jax._rules.coordinates import Coordinates
from freevars.jax._solver.problem import Problem
from freevars.jax._solver.tangents import full

__all__ = ["Pullback", "adjoint", "moving", "values"]

Tree: TypeAlias = Any  # a pytree of real arrays
Leaves: TypeAlias = list[Any]  # of the problem
Places: TypeAlias = tuple[int, ...]  # of the leaves that are differentiated by

# solve(pullback, transposed, v, leaves, v0, b) -> u: (dF/dx)^T u = b, or dF/dx u = b; a constant
Solve: TypeAlias = Callable[..., Tree]


class Pullback(NamedTuple):
    """How F is pulled back, without any value: static, and compared by what it is made of."""

    condition: implicit.Condition
    problem: Any  # its treedef
    unknown: tuple[Any, tuple[Any, ...]]  # the treedef and the types of x
    has_aux: bool
    over_reverse: bool = False  # forward over reverse

    @property
    def coordinates(self) -> Coordinates:
        """The real coordinates of x."""
        tree, types = self.unknown
        return Coordinates(tree.unflatten(types))

    def at(self, v: Tree, leaves: Leaves) -> Tree:
        """F."""
        return implicit.optimality(
            self.condition,
            self.problem.unflatten(leaves),
            self.coordinates,
            v,
            has_aux=self.has_aux,
        )

    def value(self, v: Tree, leaves: Leaves) -> Any:
        """What `fun` returns, without its aux."""
        problem: Problem = self.problem.unflatten(leaves)
        value = problem.states(self.coordinates.from_real(v), has_aux=self.has_aux)
        if self.condition is not implicit.least:
            return value
        return sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(value)) / 2

    def __call__(self, v: Tree, leaves: Leaves, u: Tree, places: Places) -> tuple[Tree, Leaves]:
        """(dF/dx)^T u, and (dF/dt)^T u for the leaves at some places."""
        some = [leaves[i] for i in places]
        if not self.over_reverse:
            return jax.vjp(lambda v, some: self.at(v, replaced(leaves, places, some)), v, some)[1](
                u
            )
        gradient = jax.grad(lambda v, some: self.value(v, replaced(leaves, places, some)), (0, 1))
        return jax.jvp(lambda v: gradient(v, some), (v,), (u,))[1]

    def by_x(self, v: Tree, leaves: Leaves, u: Tree, *, transposed: bool) -> Tree:
        """(dF/dx)^T u, or dF/dx u, which is the pullback of that."""

        def back(u: Tree) -> Tree:
            return self(v, leaves, u, ())[0]

        if transposed:
            return back(u)
        return jax.vjp(back, jax.tree.map(jnp.zeros_like, u))[1](u)[0]

    def rows(self, v: Tree, leaves: Leaves) -> Any:
        """The matrix dF/dx."""
        flat, unravel = ravel_pytree(v)

        def back(row: Any) -> Any:
            return ravel_pytree(self(v, leaves, unravel(row), ())[0])[0]

        return jax.vmap(back)(jnp.eye(flat.size, dtype=flat.dtype))

    def needed(self, v: Tree, leaves: Leaves) -> Pullback | None:
        """This, or forward over reverse, where it is the only way to reverse mode.

        That is where `fun` holds a `custom_vjp`, and neither the forward mode of F nor the
        transpose of its pullback can be transposed.
        """
        if not _compat.has_custom_vjp(jax.make_jaxpr(self.value)(v, leaves).jaxpr):
            return None
        plain = not _compat.has_custom_vjp(jax.make_jaxpr(self.at)(v, leaves).jaxpr)
        places = tuple(
            i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        )

        def at(v: Tree, some: Leaves) -> Tree:
            return self.at(v, replaced(leaves, places, some))

        def there_and_back(v: Tree, some: Leaves) -> Any:
            if plain:
                f, push = jax.linearize(at, v, some)
            else:
                f, pull = jax.vjp(at, v, some)
                transpose = jax.linear_transpose(pull, f)
                push = lambda dv, dots: transpose((dv, dots))[0]  # noqa: E731
            return jax.linear_transpose(push, v, some)(f)

        try:
            jax.make_jaxpr(there_and_back)(v, [leaves[i] for i in places])
        except Exception:  # noqa: BLE001 (JAX has many classes for what it cannot transpose)
            minimum = self.condition in implicit.MINIMA
            return self._replace(over_reverse=minimum and plain)
        return None


# The arguments that JAX gives a rule with `symbolic_zeros`. A value with no derivative there must
# get none here: a `custom_vjp` inside may hold it as a constant.


def values(told: Any) -> Any:
    """The arguments themselves."""
    return jax.tree.map(lambda leaf: leaf.value, told, is_leaf=_is_told)


def moving(told: Any) -> Places:
    """The places of the leaves that are differentiated by."""
    leaves = jax.tree.leaves(told, is_leaf=_is_told)
    return tuple(i for i, leaf in enumerate(leaves) if leaf.perturbed)


def _is_told(x: Any) -> bool:
    return isinstance(x, CustomVJPPrimal)


def adjoint(
    pullback: Pullback, solve: Solve, v: Tree, leaves: Leaves, v0: Tree, g: Tree, places: Places
) -> tuple[Tree, Leaves]:
    """u, and the cotangents of the leaves at some places, for a cotangent g of the solution v that
    was found from v0."""
    u = _linear(pullback, solve, True, v, leaves, v0, g)
    return u, jax.tree.map(jnp.negative, pullback(v, leaves, u, places)[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _linear(
    pullback: Pullback,
    solve: Solve,
    transposed: bool,  # noqa: FBT001
    v: Tree,
    leaves: Leaves,
    v0: Tree,
    b: Tree,
) -> Tree:
    return solve(pullback, transposed, v, leaves, v0, b)


def _linear_forward(pullback: Pullback, solve: Solve, transposed: bool, *told: Any) -> Any:  # noqa: FBT001
    v, leaves, v0, b = values(told)
    u = _linear(pullback, solve, transposed, v, leaves, v0, b)
    # The structure of a dict is known where its values are not.
    return u, (v, leaves, v0, u, dict.fromkeys(moving(told[1]), ()))


def _linear_backward(
    pullback: Pullback,
    solve: Solve,
    transposed: bool,  # noqa: FBT001
    saved: Any,
    w: Tree,
) -> Any:
    v, leaves, v0, u, places = saved
    places = tuple(places)
    z = _linear(pullback, solve, not transposed, v, leaves, v0, full(w))

    def product(v: Tree, some: Leaves) -> Tree:
        return pullback.by_x(v, replaced(leaves, places, some), u, transposed=transposed)

    some = [leaves[i] for i in places]
    by_v, by_some = jax.tree.map(jnp.negative, jax.vjp(product, v, some)[1](z))
    return by_v, replaced([None] * len(leaves), places, by_some), None, z


_linear.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)
