"""Linear systems `A u = b` of a rule: direct while small, matrix-free beyond.

Around n = 100 unknowns on a CPU, n products with a derivative and one factorisation cost as much as an
iteration without the matrix. A singular or badly conditioned matrix is an error, or what the user chose.

Not here: where `A` comes from (`_implicit.py`).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from freevars.errors import SolveError

__all__ = ["DIRECT_LIMIT", "OnFailure", "conjugate_gradients", "direct", "gmres", "solve_matrix_free"]

DIRECT_LIMIT = 100

OnFailure = Literal["raise", "nan", "least_squares"]
MatVec = Callable[[Tensor], Tensor]


def direct(a: Tensor, b: Tensor, on_failure: OnFailure) -> Tensor:
    """`u` with `a u = b` by factorisation; `b` is a vector."""
    eps = torch.finfo(a.dtype).eps
    condition = float("inf")
    if bool(torch.isfinite(a).all()):
        factors, pivots, info = torch.linalg.lu_factor_ex(a)
        if int(info) == 0:
            inverse = torch.linalg.lu_solve(factors, pivots, torch.eye(len(b), dtype=a.dtype, device=a.device))
            condition = float(torch.linalg.matrix_norm(a, 1) * torch.linalg.matrix_norm(inverse, 1))
            if condition * eps < 1 / 16:
                return torch.linalg.lu_solve(factors, pivots, b[:, None])[:, 0]
    message = (
        "expected a regular derivative of the optimality function at the solution, got a matrix of size "
        f"{len(b)} with condition number {condition:.1e}"
    )
    return _failed(message, on_failure, a, b)


def _failed(message: str, on_failure: OnFailure, a: Tensor | None, b: Tensor) -> Tensor:
    if on_failure == "nan":
        return torch.full_like(b, float("nan"))
    if on_failure == "least_squares" and a is not None and bool(torch.isfinite(a).all()):
        return torch.linalg.pinv(a) @ b
    message += (
        ": the solution is not a differentiable function of the captured values there. Regularise the "
        "problem, or choose on_failure='nan' or on_failure='least_squares'."
    )
    raise SolveError(message)


def solve_matrix_free(matvec: MatVec, b: Tensor, on_failure: OnFailure, *, symmetric: bool) -> Tensor:
    """Conjugate gradients where the matrix is symmetric and positive, GMRES elsewhere; `rtol` on |b|."""
    if not bool(b.any()):
        return torch.zeros_like(b)
    tolerance = float(torch.finfo(b.dtype).eps ** 0.75)  # relative to |b|
    u = conjugate_gradients(matvec, b, tolerance) if symmetric else None
    if u is None:
        u = gmres(matvec, b, tolerance)
    left = float(torch.linalg.vector_norm(matvec(u) - b) / torch.linalg.vector_norm(b))
    if left <= tolerance**0.5:
        return u
    message = (
        f"expected the linear system of the derivative, with {len(b)} unknowns, to be solved to a relative "
        f"residual of {tolerance**0.5:.0e}, got {left:.1e}"
    )
    return _failed(message, "nan" if on_failure == "nan" else "raise", None, b)


def conjugate_gradients(matvec: MatVec, b: Tensor, tolerance: float) -> Tensor | None:
    """Hestenes and Stiefel 1952. None where the matrix shows itself not positive."""
    u, r = torch.zeros_like(b), b
    p, rr = r, torch.dot(r, r)
    stop = tolerance**2 * float(rr)
    for _ in range(10 * len(b)):
        q = matvec(p)
        curvature = torch.dot(p, q)
        if not float(curvature) > 0:
            return None
        alpha = rr / curvature
        u, r = u + alpha * p, r - alpha * q
        previous, rr = rr, torch.dot(r, r)
        if float(rr) <= stop:
            break
        p = r + (rr / previous) * p
    return u


def gmres(matvec: MatVec, b: Tensor, tolerance: float, *, restart: int = 50, cycles: int = 40) -> Tensor:
    """Restarted GMRES (Saad and Schultz 1986), with the Hessenberg least squares solved at each cycle."""
    u = torch.zeros_like(b)
    target = tolerance * float(torch.linalg.vector_norm(b))
    for _ in range(cycles):
        r = b - matvec(u)
        beta = torch.linalg.vector_norm(r)
        if float(beta) <= target:
            break
        basis = [r / beta]
        h = torch.zeros(restart + 1, restart, dtype=b.dtype, device=b.device)
        size = restart
        for j in range(restart):
            w = matvec(basis[j])
            for _twice in range(2):  # a second pass keeps the basis orthogonal
                v = torch.stack(basis)
                c = v @ w
                h[: j + 1, j] += c
                w = w - c @ v
            h[j + 1, j] = torch.linalg.vector_norm(w)
            if float(h[j + 1, j]) <= target * 1e-3 or j + 1 == len(b):
                size = j + 1
                break
            basis.append(w / h[j + 1, j])
        e = torch.zeros(size + 1, dtype=b.dtype, device=b.device)
        e[0] = beta
        y = torch.linalg.lstsq(h[: size + 1, :size], e[:, None]).solution[:, 0]
        u = u + y @ torch.stack(basis[:size])
    return u
