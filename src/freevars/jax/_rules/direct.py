"""Systems that are written out: a division, or a matrix that is factorised once.

Not here: which systems these are (`linear`), and the factors in units of the unknowns (`scaled`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from freevars._solvers.verdict import Limits
from freevars.jax import _compat
from freevars.jax._rules import scaled
from freevars.jax._rules.coordinates import Space
from freevars.jax._rules.operator import LinearOperator, lineax_module
from freevars.jax._rules.system import LinearSystem, guarded, linear_solve

__all__ = ["dense", "division", "factorise_by_lineax", "pseudoinverse", "vectors"]

Tree: TypeAlias = Any  # a pytree of real arrays of one dtype
Solve: TypeAlias = Callable[[Any], Any]  # b -> x


def division(operator: LinearOperator, space: Space, sizes: Any) -> LinearSystem:
    slope = operator.matvec(jax.tree.map(jnp.ones_like, operator.example))

    def product(v: Tree) -> Tree:
        return jax.tree.map(jnp.multiply, slope, v)

    def solve(b: Tree, good: Any = True) -> Tree:  # noqa: FBT002
        if good is True:
            return jax.tree.map(jnp.divide, b, slope)

        def quotient(b: Tree) -> Tree:
            return guarded(space, good, jax.tree.map(jnp.divide, b, constant), b)

        constant = jax.lax.stop_gradient(slope)
        return linear_solve(product, b, quotient, quotient)

    matrix = jax.lax.stop_gradient(operator.ravel(slope))[:, None]
    return LinearSystem(
        operator,
        space,
        solve,
        lambda bs: [*map(solve, bs)],
        matrix,
        scaled=None if sizes is None else scaled.factorise(matrix, *sizes),
    )


def dense(
    operator: LinearOperator,
    space: Space,
    matrix: Any,
    factorise: Callable[[Any], tuple[Solve, Solve]] | None,
    sizes: Any,
) -> LinearSystem:
    """Factorise the operator's matrix once; None: in the units of the unknowns."""
    constant = jax.lax.stop_gradient(matrix)
    if factorise is None:
        factors = scaled.factorise(constant, *sizes)
    else:
        factors = scaled.wrap(constant, sizes, *factorise(constant))
    solve, transpose_solve = factors.of, factors.transpose_of

    def linear(b: Tree, good: Any = True) -> Tree:  # noqa: FBT002
        return operator.unravel(
            _compat.custom_linear_solve(
                lambda v: matrix @ v,
                operator.ravel(b),
                lambda b: guarded(space, good, solve(b), b),
                lambda b: guarded(space, good, transpose_solve(b), b),
            )
        )

    def apply_inverse(bs: list[Tree]) -> list[Tree]:
        # All at once: two right-hand sides cost little more than one.
        columns = jnp.stack([*map(operator.ravel, bs)], axis=1)
        return [*map(operator.unravel, jax.vmap(solve, in_axes=1)(columns))]

    return LinearSystem(operator, space, linear, apply_inverse, constant, scaled=factors)


def vectors(operator: LinearOperator, sizes: Any) -> tuple[Any, Any, Any, Limits, Any]:
    """The sizes for a matrix: as vectors x, how far the solver came, and the sizes of the
    components; the limits; and what each equation of a fixed point adds up at least: the difference
    x - fun(x) cancels."""
    x, far, d = map(operator.ravel, sizes[:3])
    return x, far, d, sizes[3], d if operator.fixed_point else None


def pseudoinverse(matrix: Any) -> tuple[Solve, Solve]:
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    cut = matrix.shape[0] * jnp.finfo(matrix.dtype).eps * jnp.max(s, initial=0)
    kept = s > cut
    inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    return lambda b: vt.T @ (inverse * (u.T @ b)), lambda b: u @ (inverse * (vt @ b))


def factorise_by_lineax(solver: Any, matrix: Any, *, symmetric: bool) -> tuple[Solve, Solve]:
    lx = lineax_module()
    # Only a solver that asks for a definite matrix is told that it is one; the residual shows if
    # it is not.
    tags = lx.positive_semidefinite_tag if symmetric and isinstance(solver, lx.Cholesky) else ()
    state = solver.init(lx.MatrixLinearOperator(matrix, tags), {})
    transposed_state, options = solver.transpose(state, {})
    return (
        lambda b: solver.compute(state, b, {})[0],
        lambda b: solver.compute(transposed_state, b, options)[0],
    )
