"""Krylov methods on one real vector: conjugate gradients and restarted GMRES.

Both stop at a residual relative to the norm of `b`, so that neither the units of the system nor
zeros in `b` matter, and say whether they got there. Not here: which one is taken, and what happens
where neither converges (`linear.py`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["conjugate_gradients", "gmres"]

MatVec = Callable[[Tensor], Tensor]


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
        basis, h = _arnoldi(matvec, r / beta, min(restart, steps), target / beta)
        steps -= h.shape[1]
        e = torch.zeros(len(h), 1, dtype=b.dtype)
        e[0] = beta
        y = torch.linalg.lstsq(h, e, driver="gelsd").solution[:, 0]
        u = u + y.to(b.device) @ basis[: len(y)]
        r = b - matvec(u)
        before, beta = beta, float(torch.linalg.vector_norm(r))
        if not beta <= before / 2:
            break
    return u, beta <= target


def _arnoldi(matvec: MatVec, first: Tensor, steps: int, small: float) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the Krylov space, one row each, and the Hessenberg matrix (on the
    CPU), one row longer than wide. Stops early once the residual is `small`."""
    steps = min(steps, len(first))
    basis = first.new_empty(steps + 1, len(first))
    basis[0] = first
    columns: list[list[float]] = []
    rotations: list[tuple[float, float]] = []
    residual = 1.0
    for j in range(steps):
        w = matvec(basis[j])
        known = basis[: j + 1]
        c = known @ w
        w = w - c @ known
        again = known @ w  # a second pass keeps the basis orthogonal
        w = w - again @ known
        norm = torch.linalg.vector_norm(w)
        column: list[float] = torch.cat([c + again, norm[None]]).tolist()
        columns.append(column)
        residual *= _rotate(list(column), rotations)
        if residual <= small or not column[-1] > 0:
            break
        basis[j + 1] = w / norm
    k = len(columns)
    h = torch.zeros(k + 1, k, dtype=first.dtype)
    for j, column in enumerate(columns):
        h[: j + 2, j] = torch.tensor(column, dtype=first.dtype)
    return basis, h


def _rotate(column: list[float], rotations: list[tuple[float, float]]) -> float:
    """One more Givens rotation; returns by how much it reduces the residual."""
    for i, (c, s) in enumerate(rotations):
        column[i], column[i + 1] = (
            c * column[i] + s * column[i + 1],
            c * column[i + 1] - s * column[i],
        )
    length = math.hypot(column[-2], column[-1])
    c, s = (column[-2] / length, column[-1] / length) if length > 0 else (1.0, 0.0)
    rotations.append((c, s))
    return abs(s)
