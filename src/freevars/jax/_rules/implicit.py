"""The implicit function theorem: the tangent of a solution, on pytrees as they are.

Let x(t) solve F(x, t) = 0, where t is everything that the function reads besides x: its captured
values and its extra arguments. Differentiate the condition along a direction t':

    dF/dx x' + dF/dt t' = 0,    so    x' = -(dF/dx)^-1 (dF/dt t').

This holds for the exact solution of a regular system, however it was found. F is `fun` for a root,
`grad fun` for a minimum, J^T fun for least squares, `x - fun(x)` for a fixed point; of this sign,
because I - dfun/dx has an inverse that is the sum of the powers of dfun/dx where the iteration
converges. A condition of the user's is a root of what it returns.

x and F are pytrees in real coordinates, of the same structure and shapes, so that the system maps a
space to itself and its transpose is defined by one inner product. The equations of a root may have
any structure with as many numbers; only these are concatenated and split. For a minimum, F is the
gradient by real coordinates: then its derivative is symmetric also where x is complex.

Source: the implicit function theorem; in this form Blondel et al. 2022, "Efficient and Modular
Implicit Differentiation". Not here: how the linear system is solved (`linear`), when the result
counts (`diagnostics`), and JAX's rule around it (`rules`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from freevars._sequences import replaced
from freevars.errors import StructureError
from freevars.jax import _compat
from freevars.jax._rules.constrained import Constrained
from freevars.jax._rules.coordinates import Coordinates, Space, probe, split_like
from freevars.jax._rules.operator import LinearOperator
from freevars.jax._rules.seen import Equations
from freevars.jax._rules.totals import completed
from freevars.jax._solver.problem import Problem, count

__all__ = [
    "MINIMA",
    "Condition",
    "Linearised",
    "check_equations",
    "fixed",
    "least",
    "linearise",
    "optimality",
    "stationary",
    "zero",
]

Tree: TypeAlias = Any  # a pytree of real arrays
Value: TypeAlias = Callable[[Tree], Any]  # the function at real coordinates of x, without aux
Condition: TypeAlias = Callable[[Value, Tree, Coordinates], Tree] | Constrained


def zero(value: Value, v: Tree, coordinates: Coordinates) -> Tree:
    """F of a root."""
    result = value(v)
    equations = Coordinates(result).to_real(result)
    if jax.tree.map(jnp.shape, equations) == jax.tree.map(jnp.shape, v):
        return jax.tree.map(lambda leaf: leaf.astype(coordinates.dtype), equations)
    joined = jnp.concatenate(
        [jnp.ravel(leaf).astype(coordinates.dtype) for leaf in jax.tree.leaves(equations)]
    )
    leaves, tree = jax.tree.flatten(v)
    return tree.unflatten(split_like(joined, leaves))


def stationary(value: Value, v: Tree, coordinates: Coordinates) -> Tree:
    """F of a minimum."""
    del coordinates
    return jax.grad(value)(v)


def least(value: Value, v: Tree, coordinates: Coordinates) -> Tree:
    """F of least squares, J^T r."""

    def half_square(v: Tree) -> Any:
        residual = value(v)
        parts = jax.tree.leaves(Coordinates(residual).to_real(residual))
        squares = [jnp.sum(part.astype(coordinates.dtype) ** 2) for part in parts]
        return sum(squares[1:], squares[0]) / 2

    return jax.grad(half_square)(v)


# Where F is a gradient, its system is symmetric.
MINIMA = frozenset({stationary, least})


def fixed(value: Value, v: Tree, coordinates: Coordinates) -> Tree:
    """F of a fixed point."""
    return jax.tree.map(jnp.subtract, v, coordinates.to_real(value(v)))


def optimality(
    condition: Condition, problem: Problem, coordinates: Coordinates, v: Tree, *, has_aux: bool
) -> Tree:
    """F at v."""
    if isinstance(condition, Constrained):
        return condition(problem, coordinates, v, has_aux=has_aux)
    f = condition(
        lambda v: problem.states(coordinates.from_real(v), has_aux=has_aux), v, coordinates
    )
    return jax.tree.map(_compat.like_sharding, f, v)


def check_equations(
    condition: Condition, problem: Problem, x: Any, *, has_aux: bool, name: str
) -> None:
    """Refuse a function without exactly one equation for each unknown."""
    value = problem.struct(problem.stated_by)
    value = value[0] if has_aux else value
    called = _CALLED[problem.stated_by]
    if condition is least or (isinstance(condition, Constrained) and condition.squares):
        if not jax.tree.leaves(value) or not _all_of(jnp.inexact, value):
            message = (
                f"{name}: expected a function that returns floating or complex residuals, got"
                f" {value}."
            )
            raise StructureError(message)
        return
    if condition is stationary or isinstance(condition, Constrained):
        if not _all_of(jnp.floating, value) or _shapes(value) != ():
            message = (
                f"{name}: expected an objective that is a real number of shape (), got {value}."
                " Let it end in jnp.sum, say; least_squares takes residuals, and root equations."
            )
            raise StructureError(message)
        return
    if not _all_of(jnp.number if condition is fixed else jnp.inexact, value):
        message = (
            f"{name}: expected a {called} that returns floating or complex equations, got {value}."
        )
        raise StructureError(message)
    if count(value) != count(x):
        message = (
            f"{name}: expected one equation for each unknown, or there is no derivative; the"
            f" {called} has {count(value)} components for {count(x)} unknowns."
            " Where there are more, take least_squares; where there are fewer, add a condition."
        )
        raise StructureError(message)
    if condition is fixed and _shapes(value) != _shapes(x):
        message = f"{name}: expected a function that returns a value like x, {x}, got {value}."
        raise StructureError(message)


_CALLED = {"fun": "function", "condition": "condition"}


def _all_of(kind: Any, tree: Any) -> bool:
    """Whether all leaves are arrays of a kind of number."""
    dtypes = (getattr(leaf, "dtype", None) for leaf in jax.tree.leaves(tree))
    return all(dtype is not None and jnp.issubdtype(dtype, kind) for dtype in dtypes)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


class Linearised(NamedTuple):
    """The condition at a solution, to first order. Trees are in real coordinates."""

    coordinates: Coordinates
    space: Space
    v: Tree  # x
    f: Tree  # F there
    by_x: LinearOperator  # dF/dx
    by_moved: Callable[[list[Any]], Tree]  # dF/dt, of directions of the moving leaves
    at: Callable[[Tree], Tree]  # F, of x alone: no derivative flows into the leaves
    # dF at x along a direction of x, and one of the moving leaves, of this number
    along: Callable[[Tree, Tree, Any], Tree]
    to_x: Callable[[Tree], Any]  # a direction of x from its coordinates

    @property
    def equations(self) -> Equations:
        """F, as the verdict asks it."""
        return Equations(self.f, self.at, self.along)


def linearise(
    condition: Condition,
    rebuild: Callable[[list[Any]], tuple[Problem, Any]],
    leaves: list[Any],
    x: Any,
    x0: Any,
    moving: tuple[int, ...],
    *,
    has_aux: bool,
) -> Linearised:
    """The condition at x, found from x0, to first order in x and in the moving ones of the leaves,
    which are of the problem and, where the solver keeps totals of it, of x0."""
    coordinates = Coordinates(x)
    totals = rebuild(leaves)[0].totals
    symmetric = condition in MINIMA and totals is None
    if isinstance(condition, Constrained):
        condition, coordinates = condition.in_units(rebuild(leaves)[0], x, x0, has_aux=has_aux)
    v = coordinates.to_real(x)

    def plain(v: Tree, leaves: list[Any]) -> Tree:
        problem, _ = rebuild(leaves)
        return optimality(condition, problem, coordinates, v, has_aux=has_aux)

    def start(leaves: list[Any]) -> Tree:
        return coordinates.to_real(rebuild(leaves)[1])

    at = plain
    if totals is not None:
        complete = completed(lambda v: plain(v, leaves), totals, coordinates, v, start(leaves))

        def at(v: Tree, leaves: list[Any]) -> Tree:
            problem, _ = rebuild(leaves)
            return complete(plain(v, leaves), problem.totals, v, start(leaves))

    f, by_x, by_moved = _push(at, v, leaves, moving)
    space = Space.of(by_x, v, f)
    # JAX solves linear systems (`custom_linear_solve`) of leaves that vary over the same axes only.
    axes = frozenset[str]().union(*map(_compat.varying_axes, jax.tree.leaves(v)))

    def lift(tree: Tree) -> Tree:
        return space.agree(jax.tree.map(lambda leaf: _compat.vary_over(leaf, axes), tree))

    def lower(tree: Tree) -> Tree:
        return jax.tree.map(_compat.not_more_varying, space.agree(tree), v)

    def along(v: Tree, d: Tree, number: Any) -> Tree:
        fixed = jax.lax.stop_gradient(leaves)
        seed = jnp.uint32(number) * jnp.uint32(2 * len(moving) + 1)
        dots = [_relative(fixed[i], seed + jnp.uint32(2 * k)) for k, i in enumerate(moving)]
        dt = dict(zip(moving, dots, strict=True))
        return jax.lax.stop_gradient(lift(_push_once(at, lower(v), fixed, lower(d), dt)))

    operator = LinearOperator(
        lambda d: lift(by_x(lower(d))),
        lift(v),
        symmetric=symmetric,
        fixed_point=condition is fixed and totals is None,
    )
    return Linearised(
        coordinates,
        space,
        lift(v),
        lift(f),
        operator,
        lambda dots: lift(by_moved(dots)),
        lambda v: lift(at(lower(v), jax.lax.stop_gradient(leaves))),
        along,
        lambda d: coordinates.from_real(lower(d)),
    )


def _push(
    f: Callable[[Tree, list[Any]], Tree], v: Tree, leaves: list[Any], moving: tuple[int, ...]
) -> tuple[Tree, Callable[[Tree], Tree], Callable[[list[Any]], Tree]]:
    """The value of `f` at v and the leaves, and how it pushes forward a direction of v, and
    directions of the moving leaves.

    A function with a `custom_vjp` in it has no forward mode. But its pullback is linear, and the
    transpose of that is the derivative again. It is pulled back to everything that has a
    derivative, so that no custom rule remains and this derivative has a forward mode itself.
    """
    program = jax.make_jaxpr(f)(v, leaves).jaxpr
    if not _compat.has_custom_vjp(program):
        value, by_v = jax.linearize(lambda v: f(v, leaves), v)
        moved = [leaves[i] for i in moving]
        _, by_moved = jax.linearize(lambda moved: f(v, replaced(leaves, moving, moved)), moved)
        if moving and _compat.has_cond(program):
            by_moved = _compat.with_transpose(by_moved, moved, value)
        return value, by_v, by_moved
    value, push = _transposed_twice(f, v, leaves)
    return (
        value,
        lambda dv: push(dv, {}),
        lambda dots: push(jax.tree.map(jnp.zeros_like, v), dict(zip(moving, dots, strict=True))),
    )


def _push_once(
    f: Callable[[Tree, list[Any]], Tree],
    v: Tree,
    leaves: list[Any],
    dv: Tree,
    dots: dict[int, Any],
) -> Tree:
    """The direction of `f` for one of v and of some leaves."""
    if _compat.has_custom_vjp(jax.make_jaxpr(f)(v, leaves).jaxpr):
        return _transposed_twice(f, v, leaves)[1](dv, dots)
    primals, tangents = [leaves[i] for i in dots], [*dots.values()]
    return jax.jvp(
        lambda v, some: f(v, replaced(leaves, dots, some)), (v, primals), (dv, tangents)
    )[1]


def _transposed_twice(
    f: Callable[[Tree, list[Any]], Tree], v: Tree, leaves: list[Any]
) -> tuple[Tree, Callable[[Tree, dict[int, Any]], Tree]]:
    smooth = [
        i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    value, pull = jax.vjp(
        lambda v, *s: f(v, replaced(leaves, smooth, s)), v, *[leaves[i] for i in smooth]
    )
    transpose = jax.linear_transpose(pull, value)
    zeros = {i: jnp.zeros_like(leaves[i]) for i in smooth}
    return value, lambda dv, dots: transpose((dv, *(zeros | dots).values()))[0]


def _relative(leaf: Any, seed: Any) -> Any:
    """A direction that changes the entries of a leaf relative to their values."""
    size = jnp.where(jnp.any(leaf != 0), jnp.abs(leaf), 1)
    if size.dtype != jnp.float64:
        size = size.astype(jnp.float32)
    part = probe(size, seed)
    if jnp.iscomplexobj(leaf):
        part = jax.lax.complex(part, probe(size, seed + 1))
    return jnp.where(jnp.isfinite(leaf), (part * size).astype(leaf.dtype), 0).astype(leaf.dtype)
