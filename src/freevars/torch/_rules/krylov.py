"""Krylov methods on one real vector: conjugate gradients and restarted GMRES.

Both stop at a residual relative to the norm of `b`, so that neither the units of the system nor
zeros in `b` matter, and say whether they got there. Not here: which one is taken, and what happens
where neither converges (`linear.py`).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["conjugate_gradients", "gmres"]

MatVec = Callable[[Tensor], Tensor]
Column = list[float]


def conjugate_gradients(
    matvec: MatVec, b: Tensor, relative: float, steps: int
) -> tuple[Tensor, bool]:
    """Hestenes and Stiefel 1952. Gives up where the matrix shows itself not positive."""
    u, r = torch.zeros_like(b), b
    p, rr = r, torch.dot(r, r)
    stop = relative**2 * float(rr)
    for _ in range(steps):
        q = matvec(p)
        curvature = torch.dot(p, q)
        if not float(curvature) > 0:
            return u, False
        alpha = rr / curvature
        u, r = u + alpha * p, r - alpha * q
        previous, rr = rr, torch.dot(r, r)
        if float(rr) <= stop:
            return u, True
        p = r + (rr / previous) * p
    return u, False


def gmres(
    matvec: MatVec, b: Tensor, relative: float, steps: int, restart: int = 50
) -> tuple[Tensor, bool]:
    """Saad and Schultz 1986. Gives up early where a whole cycle gains less than a factor of two."""
    u, r = torch.zeros_like(b), b
    beta = float(torch.linalg.vector_norm(r))
    target = relative * beta
    while beta > target and steps > 0:
        basis, triangle, right = _arnoldi(matvec, r, beta, min(restart, steps), target)
        steps -= len(triangle)
        y = _back_substituted(triangle, right)
        u = u + torch.tensor(y, dtype=b.dtype).to(b.device) @ basis[: len(y)]
        r = b - matvec(u)  # `right` tells less: not how much the products round
        before, beta = beta, float(torch.linalg.vector_norm(r))
        if not beta <= before / 2:
            break
    return u, beta <= target


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
