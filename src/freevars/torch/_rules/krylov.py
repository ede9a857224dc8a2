"""Krylov methods on one real vector: conjugate gradients, Richardson's iteration, and restarted
GMRES.

Both stop at a residual relative to the norm of `b`, so that neither the units of the system nor
zeros in `b` matter, and report whether they reached it, by the residual of their result. Not here:
the choice between them, and what happens where neither converges (`iterative.py`).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Contraction", "conjugate_gradients", "gmres", "richardson"]

MatVec = Callable[[Tensor], Tensor]
Column = list[float]

_RESTART = 50  # products of GMRES in one basis


class Contraction(NamedTuple):
    """How far Richardson's iteration went while it was quick."""

    u: Tensor
    residual: Tensor
    solved: bool


class _Cycle(NamedTuple):
    """What a method does before its residual is computed anew."""

    u: Tensor  # with A u about the residual that the cycle began with
    size: float  # a lower bound of |A|
    steps: int  # how many were taken
    solved: bool | None  # as far as the method knows; None where it cannot go on


def _restarted(
    matvec: MatVec,
    b: Tensor,
    relative: float,
    steps: int,
    cycle: Callable[[Tensor, float, float, int], _Cycle],
    start: Contraction | None = None,
) -> tuple[Tensor, bool]:
    """Runs `cycle(r, |r|, target, steps)` until the residual itself is small: what a method tells
    of it leaves out how much the products round. Where it is told to be small, rounding explains
    that it is not, and it is below the root of eps, a direct solver does no better. Gives up early
    where a cycle gains less than a factor of two."""
    eps = float(torch.finfo(b.dtype).eps)
    u, r = (torch.zeros_like(b), b) if start is None else start[:2]
    whole, beta = _norm(b), _norm(r)
    target, most, size = relative * whole, eps**0.5 * whole, 0.0
    while beta > target and steps > 0:
        done = cycle(r, beta, target, steps)
        steps, size = steps - done.steps, max(size, done.size)
        u = u + done.u
        r = b - matvec(u)
        before, beta = beta, _norm(r)
        if done.solved and target < beta <= most and beta <= 10 * eps * size * _norm(u):
            return u, True
        if done.solved is None or not beta <= before / 2:
            break
    return u, beta <= target


def conjugate_gradients(
    matvec: MatVec, b: Tensor, relative: float, steps: int
) -> tuple[Tensor, bool]:
    """Hestenes and Stiefel 1952. Gives up where the matrix shows itself not positive."""

    def cycle(r: Tensor, beta: float, target: float, steps: int) -> _Cycle:
        u, p = torch.zeros_like(r), r
        rr, size, last = beta**2, 0.0, 0.0
        for used in range(1, steps + 1):
            q = matvec(p)
            curvature = float(torch.dot(p, q))
            if not curvature > 0:
                return _Cycle(u, size, used, None)
            alpha = rr / curvature
            u, r = u + alpha * p, r - alpha * q
            previous, rr = rr, float(torch.dot(r, r))
            if rr <= target**2:
                break
            # On the diagonal of the tridiagonal matrix of Lanczos.
            size = max(size, 1 / alpha + last)
            last = rr / previous / alpha
            p = r + (rr / previous) * p
        return _Cycle(u, max(size, 1 / alpha + last), used, rr <= target**2)

    return _restarted(matvec, b, relative, steps, cycle)


def gmres(
    matvec: MatVec,
    b: Tensor,
    relative: float,
    steps: int,
    start: Contraction | None = None,
) -> tuple[Tensor, bool]:
    """Saad and Schultz 1986. A contraction is not worth a basis: see `richardson`, from where it
    starts."""

    def cycle(r: Tensor, beta: float, target: float, steps: int) -> _Cycle:
        basis, triangle, right = _arnoldi(matvec, r, beta, min(_RESTART, steps), target)
        y = _back_substituted(triangle, right)
        u = torch.tensor(y, dtype=b.dtype).to(b.device) @ basis[: len(y)]
        size = max(math.hypot(*column) for column in triangle)
        return _Cycle(u, size, len(triangle), abs(right[-1]) <= target)

    start = start or richardson(matvec, b, relative)
    return _restarted(matvec, b, relative, steps, cycle, start)


def richardson(matvec: MatVec, b: Tensor, relative: float) -> Contraction:
    """Richardson's iteration while each step leaves a quarter at most, as where A is a multiple of
    the identity and a contraction. There it takes about as many products as GMRES, and a product
    is nearly all that a step costs. The length of the steps makes the first residual least, so
    that neither the sign nor the scale of A matters. The residual that the first step leaves is
    told by its product; those after it are computed anew."""
    product = matvec(b)
    length = torch.dot(b, product) / torch.dot(product, product)
    u, r = length * b, b - length * product
    whole = before = _norm(b)
    beta = _norm(r)
    solved = False
    while beta <= before / 4 and not solved:
        u = u + length * r
        r = b - matvec(u)
        before, beta = beta, _norm(r)
        solved = beta <= relative * whole
    if not beta < whole:
        u, r = torch.zeros_like(b), b
    return Contraction(u, r, solved)


def _norm(v: Tensor) -> float:
    return float(torch.linalg.vector_norm(v))


def _arnoldi(
    matvec: MatVec, r: Tensor, beta: float, steps: int, target: float
) -> tuple[Tensor, list[Column], list[float]]:
    """An orthonormal basis of the Krylov space, one row each, the triangular factor of the
    Hessenberg matrix by its columns, and the right side that belongs to it, whose last number is
    the residual. Stops early once that is below `target`."""
    steps = min(steps, len(r))
    basis = r.new_empty(steps + 1, len(r))
    basis[0] = r / beta
    rotations: list[tuple[float, float]] = []
    triangle: list[Column] = []
    right = [beta]
    for j in range(steps):
        w = matvec(basis[j])
        known = basis[: j + 1]
        c = known @ w
        w = w - c @ known
        again = known @ w  # a second pass keeps the basis orthogonal
        w = w - again @ known
        norm = torch.linalg.vector_norm(w)
        column: Column = torch.cat([c + again, norm[None]]).tolist()
        triangle.append(_rotated(column, rotations, right))
        if abs(right[-1]) <= target or not column[-1] > 0:
            break
        basis[j + 1] = w / norm
    return basis, triangle, right


def _rotated(column: Column, rotations: list[tuple[float, float]], right: list[float]) -> Column:
    """A column of the triangular factor, by one more Givens rotation, which `right` takes too."""
    column = list(column)
    for i, (c, s) in enumerate(rotations):
        column[i], column[i + 1] = (
            c * column[i] + s * column[i + 1],
            c * column[i + 1] - s * column[i],
        )
    length = math.hypot(column[-2], column[-1])
    c, s = (column[-2] / length, column[-1] / length) if length > 0 else (1.0, 0.0)
    rotations.append((c, s))
    right[-1:] = [c * right[-1], -s * right[-1]]
    return [*column[:-2], length]


def _back_substituted(triangle: Sequence[Column], right: Sequence[float]) -> list[float]:
    """The y with the least residual. A diagonal entry is zero in the last column alone, where the
    image of a basis vector is zero or lies in the span of the other images."""
    y = list(right[: len(triangle)])
    for j in reversed(range(len(y))):
        column = triangle[j]
        y[j] = 0.0 if column[j] == 0 else y[j] / column[j]
        for i in range(j):
            y[i] -= y[j] * column[i]
    return y
