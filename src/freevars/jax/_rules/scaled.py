"""A dense system in the units of its unknowns: its factors, and the figures of the verdict.

`freevars._solvers.verdict` defines the figures and their limits. Rows and columns are scaled by
powers of two, which round nothing, before the matrix is factorised: partial pivoting compares the
entries of a column, which must have the same unit. Everything here is a vector and a constant. Not
here: systems that are not written out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from freevars._solvers.verdict import Figures, Limits
from freevars.jax import _compat
from freevars.jax._rules.closer import look
from freevars.jax._rules.coordinates import magnitude, max_abs
from freevars.jax._rules.krylov import divide
from freevars.jax._rules.powers import power_of_two
from freevars.jax._rules.seen import Equations, Step

__all__ = ["Scaled", "factorise", "measure", "wrap"]

Vector: TypeAlias = Any  # Float[Array, "n"]
Solve: TypeAlias = Callable[[Any], Any]  # of Float[Array, "n k"]

# Up to this size the inverse is written out: all else is then a product. The right-hand sides of
# the check are about as many.
_INVERSE = 16
_PROBES = 4

# In which the derivative is compared: a component that is small in one of them by chance is not in
# all, one that the solution hardly moves is.
_DIRECTIONS = 4


class Scaled(NamedTuple):
    """S = R A D of a matrix A."""

    matrix: Any  # A
    rows: Vector  # R
    columns: Vector  # D
    scaled: Any  # S
    solve: Solve  # by S
    transposed: Solve
    own: bool = True  # by this module: then it solves what is regular
    norm: float = 0  # what S is a difference of has this norm at least
    inverse: Any = None  # of S, where it is written out

    def of(self, b: Vector) -> Vector:
        """A^-1 b."""
        return self.columns * self.solve((self.rows * b)[:, None])[:, 0]

    def transpose_of(self, b: Vector) -> Vector:
        """A^-T b."""
        return self.rows * self.transposed((self.columns * b)[:, None])[:, 0]


def _in_units(
    matrix: Any, x: Vector, far: Vector, d: Vector, limits: Limits, least: Vector | None
) -> tuple[Vector, Vector, Any]:
    """R, D and the transpose of S.

    A component that is zero, or far smaller than others, has no size that is sure: anything between
    `far`, how far the solver came, and a share of the largest one will do. It gets the one that
    makes it as large as the others in some equation: neither a small column nor one in which all
    others vanish is a sign of a singular system.
    """

    def terms(scaled: Any, least: Any) -> Any:
        largest = jnp.max(jnp.abs(scaled), axis=0)
        return largest if least is None else jnp.maximum(largest, least)

    columns = power_of_two(d)
    scaled = matrix.T * columns[:, None]
    own = jnp.minimum(far / d, 1)
    # What an equation adds up, unless that is nothing.
    largest = terms(scaled * own[:, None], None if least is None else least * own)
    tiny = jnp.finfo(x.dtype).tiny
    rows = 1 / power_of_two(jnp.where(largest > tiny, largest, terms(scaled, least)))
    scaled = scaled * rows
    if len(x) == 1:
        return rows, columns, scaled
    most = jnp.maximum(limits.column**0.5 * jnp.max(jnp.abs(x)) / d, 1)
    by = 1 / jnp.maximum(jnp.max(jnp.abs(scaled), axis=1), limits.rcond)
    by = power_of_two(jnp.clip(by, own, most).astype(x.dtype))
    scaled, columns = scaled * by[:, None], columns * by
    least = None if least is None else least * jnp.minimum(by, 1) * rows
    again = 1 / power_of_two(terms(scaled, least))
    return rows * again, columns, scaled * again


def factorise(
    matrix: Any, x: Vector, far: Vector, d: Vector, limits: Limits, least: Vector | None = None
) -> Scaled:
    """The factors of a matrix for an unknown x of the sizes d, with which the solver came `far`;
    `least`: of what each row is a difference of, times these."""
    rows, columns, scaled = _in_units(matrix, x, far, d, limits, least)
    norm = 0 if least is None else 1
    if len(x) == 1:
        divide_by = lambda b: b / scaled  # noqa: E731
        return Scaled(matrix, rows, columns, scaled, divide_by, divide_by, norm=norm)
    lu, _, order = jax.lax.linalg.lu(scaled.T)
    scaled = scaled.T
    # The permutation once for all solves: XLA makes it of the pivots in a loop.
    lower = functools.partial(
        jax.lax.linalg.triangular_solve, lu, left_side=True, lower=True, unit_diagonal=True
    )
    upper = functools.partial(jax.lax.linalg.triangular_solve, lu, left_side=True)

    def solve(b: Any) -> Any:
        return upper(lower(b[order]))

    if len(x) <= _INVERSE:
        # Not `solve` of the identity, whose rows cannot be picked one member of a sharded batch
        # each.
        places = jnp.arange(len(x), dtype=order.dtype)
        permuted = (order[:, None] == places[None, :]).astype(x.dtype)
        inverse = upper(lower(permuted))
        return Scaled(
            matrix,
            rows,
            columns,
            scaled,
            lambda b: inverse @ b,
            lambda b: inverse.T @ b,
            norm=norm,
            inverse=inverse,
        )

    def transposed(b: Any) -> Any:
        back = lower(upper(b, transpose_a=True), transpose_a=True)
        return back.at[order].set(back, unique_indices=True)

    return Scaled(matrix, rows, columns, scaled, solve, transposed, norm=norm)


def wrap(
    matrix: Any,
    sizes: tuple[Vector, Vector, Vector, Limits, Vector | None],
    solve: Callable[[Vector], Vector],
    transposed: Callable[[Vector], Vector],
) -> Scaled:
    """The same for a matrix that was factorised elsewhere: A^-1 b, and A^-T b. `sizes` are the
    other arguments of `factorise`."""
    rows, columns, scaled = _in_units(matrix, *sizes)
    each, each_transposed = (jax.vmap(s, in_axes=1, out_axes=1) for s in (solve, transposed))
    return Scaled(
        matrix,
        rows,
        columns,
        scaled.T,
        lambda b: each(b / rows[:, None]) / columns[:, None],
        lambda b: each_transposed(b / columns[:, None]) / rows[:, None],
        own=False,
        norm=0 if sizes[-1] is None else 1,
    )


def measure(
    system: Scaled,
    limits: Limits,
    x: Vector,
    size: Vector,
    far: Vector,
    equations: Equations,
    *,
    closely: bool,
    least_squares: bool = False,
    symmetric: bool = False,
    has_pairs: bool = False,
) -> tuple[Figures, Vector]:
    """The figures of a system at x, whose components are of a `size`: |x|, unless x has the parts
    of complex numbers (`has_pairs`); and the Newton step. `closely` as in `look`."""
    f, along = equations.f, equations.along
    largest = max_abs(x)
    if len(x) == 1 and not least_squares:
        step = f / system.matrix[0]
        rounding = size
        norm = jnp.abs(system.matrix[0, 0])
        rcond = jnp.minimum(norm, 1) if system.norm else 1
        rcond = jnp.where(jnp.isfinite(step[0]) & (norm > 0), rcond, 0).astype(x.dtype)
    else:
        by = _by_probes if system.inverse is None else _by_inverse
        step, rounding, norm, rcond = by(system, size, f)
    among = jnp.maximum(size, limits.column * largest)
    least = jnp.minimum(limits.column * rounding, among)
    least = jnp.maximum(least, limits.rounding * rounding)
    if has_pairs:
        least = jnp.maximum(least, size)
    # A component may be zero at the start as well: then it counts by what others move it by.
    way = jnp.maximum(far, jnp.minimum(rounding, largest))
    relative, change = look(
        system.of,
        equations,
        Step(x, step, least.astype(x.dtype), way, rounding),
        limits,
        max_abs,
        floor=limits.column,
        number=_DIRECTIONS,
        closely=closely,
    )
    if least_squares:
        # What no step removes is no rounding either: x is not a solution.
        relative = jnp.maximum(relative, max_abs(_beyond(system, f, step)))
    finite = jnp.isfinite(largest) & jnp.isfinite(max_abs(f))
    finite &= jnp.isfinite(norm)
    zero = jnp.zeros_like(relative)
    left = zero
    if least_squares and along is not None:
        b = along(x, jnp.zeros_like(x), jnp.uint32(0))
        terms = system.rows * (jnp.abs(system.matrix) @ size)
        least = limits.column * max_abs(terms)  # what moves x by less may be rounding
        beyond = max_abs(_beyond(system, b, system.of(b)))
        left = divide(beyond, jnp.maximum(max_abs(system.rows * b), least))
    elif not (system.own or least_squares):
        sides = _compat.on_mesh(jnp.asarray(_signs(len(f)), f.dtype))
        left = jnp.linalg.norm(system.scaled @ system.solve(sides) - sides) / jnp.linalg.norm(sides)
        left = jnp.where(jnp.isnan(left), jnp.inf, left)
    asymmetry = _asymmetry(system) if symmetric and len(x) > 1 else zero
    return Figures(finite, relative, change, rcond, left, asymmetry, zero), step


def _beyond(system: Scaled, b: Vector, u: Vector) -> Vector:
    """What u leaves of the equations A u = b, in units of these."""
    left: Vector = system.rows * (b - system.matrix @ u)
    return left


def _by_inverse(system: Scaled, size: Vector, f: Vector) -> tuple[Vector, Vector, Any, Any]:
    """The same as `_by_probes`, where the inverse is known."""
    weights, norm = _sizes(system, size)
    step = system.columns * (system.inverse @ (system.rows * f))
    entries = magnitude(system.inverse)
    rounding = system.columns * (entries @ weights)
    largest = jnp.max(entries)
    rcond = 1 / (largest * jnp.linalg.norm(entries / largest) * norm)
    return step, rounding, norm, jnp.where(jnp.isfinite(rcond), rcond, 0)


def _sizes(system: Scaled, size: Vector) -> tuple[Vector, Any]:
    """R |A| |x|, and a bound of the norm of S."""
    entries = magnitude(system.scaled.T)
    sums = [jnp.max(jnp.sum(entries, axis=axis)) for axis in (0, 1)]
    return (size / system.columns) @ entries, jnp.maximum(jnp.sqrt(sums[0] * sums[1]), system.norm)


def _by_probes(system: Scaled, size: Vector, f: Vector) -> tuple[Vector, Vector, Any, Any]:
    """The Newton step, r, and of S a bound of the norm and the reciprocal condition number."""
    probes = _compat.on_mesh(jnp.asarray(_signs(len(f)), f.dtype))
    weights, norm = _sizes(system, size)
    sides = [(system.rows * f)[:, None], probes, weights[:, None] * probes]
    found = system.solve(jnp.concatenate(sides, axis=1))
    step = system.columns * found[:, 0]
    rounding = system.columns * max_abs(found[:, 1 + _PROBES :], axis=1)
    # One more step of inverse iteration: then the smallest singular value is all but alone in it.
    inverse = found[:, 1 : 1 + _PROBES]
    inverse = inverse / jnp.max(jnp.abs(inverse), axis=0, keepdims=True)
    inverse = inverse / jnp.linalg.norm(inverse, axis=0, keepdims=True)
    inverse = system.transposed(inverse)
    largest = max_abs(inverse)
    inverse_norm = largest * max_abs(jnp.linalg.norm(inverse / largest, axis=0))
    rcond = 1 / (inverse_norm * norm)
    return step, rounding, norm, jnp.where(jnp.isfinite(rcond), rcond, 0)


def _asymmetry(system: Scaled) -> Any:
    """|B - B^T| / 2|B| of B = D A D, up to a factor, with no number above 1 in it. Of a large one
    by products with fixed vectors: the mean of (u^T C v)^2 over these is |C|^2."""
    sizes = [power / jnp.max(power) for power in (system.columns, 1 / system.rows)]
    rows = sizes[0] * sizes[1]
    n = len(rows)
    if n <= _INVERSE:
        matrix = rows[None] * system.scaled.T
        return divide(jnp.linalg.norm(matrix - matrix.T), 2 * jnp.linalg.norm(matrix))
    vectors = _compat.on_mesh(jnp.asarray(2**0.5 * _waves(n).T, rows.dtype))
    images = (vectors @ system.scaled.T) * rows
    products = images @ vectors.T
    others = (_PROBES - 1) ** 0.5
    return divide(jnp.linalg.norm(products - products.T), 2 * others * jnp.linalg.norm(images))


@functools.cache
def _waves(n: int) -> Any:
    """Fixed vectors without a pattern, between -1 and 1."""
    k = np.arange(1, n + 1)[:, None] * (1 + 0.37 * np.arange(_PROBES))
    return np.sin(k**2 + np.arange(_PROBES))


def _signs(n: int) -> Any:
    """Fixed vectors of signs without a pattern."""
    return np.where(_waves(n) >= 0, 1.0, -1.0)
