"""Linear systems `A u = b` of a rule: direct while small, matrix-free beyond.

Around n = 100 unknowns on a CPU, n products with a derivative and one factorisation cost as much
as an iteration without the matrix. A singular matrix is an error, or what the user chose.

Not here: where `A` comes from (`rules.py`), derivatives of the solution (`implicit.py`).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from freevars.errors import SingularError

__all__ = ["DIRECT_LIMIT", "Dense", "MatrixFree", "System", "tolerance"]

DIRECT_LIMIT = 100

MatVec = Callable[[Tensor], Tensor]
LinearSolve = Callable[[MatVec, Tensor], Tensor]


def tolerance(dtype: torch.dtype) -> float:
    """Up to here a derivative is trusted: the fourth root of the spacing of numbers at one."""
    return float(torch.finfo(dtype).eps ** 0.25)


class System(Protocol):
    """The derivative of an optimality function at a solution."""

    def solve(self, b: Tensor, *, transposed: bool) -> Tensor:
        """`u` with `A u = b`, or `A^T u = b`; raises `SingularError`."""

    def size_of_step(self, f: Tensor) -> float:
        """The norm of the Newton step `A^-1 f`, to one digit."""


class Dense:
    """A system by its matrix, factorised once."""

    def __init__(self, a: Tensor, name: str, *, least_squares: bool, check: bool) -> None:
        n = len(a)
        a = a.to(torch.promote_types(a.dtype, torch.float32))  # no factorisation in half precision
        factors, pivots, info = torch.linalg.lu_factor_ex(a)
        rcond = 0.0
        if (check or least_squares) and int(info) == 0 and bool(torch.isfinite(a).all()):
            eye = torch.eye(n, dtype=a.dtype, device=a.device)
            inverse = torch.linalg.lu_solve(factors, pivots, eye)
            norms = torch.linalg.matrix_norm(a, 1) * torch.linalg.matrix_norm(inverse, 1)
            rcond = float(1 / norms)
        self._factors = None
        unchecked = not (check or least_squares)
        if unchecked or rcond >= 10 * n * torch.finfo(a.dtype).eps:
            self._factors = (factors, pivots)
        elif least_squares:
            self._pseudo_inverse = torch.linalg.pinv(a)
        else:
            message = (
                f"{name}: expected a regular system for the derivative, got {n} unknowns with the "
                f"reciprocal condition number {rcond:.1e}, so the solution is not a differentiable "
                'function of the captured values there. on_failure="least_squares" takes the '
                "shortest solution."
            )
            raise SingularError(message)

    def solve(self, b: Tensor, *, transposed: bool) -> Tensor:
        dtype = b.dtype
        b = b.to(torch.promote_types(dtype, torch.float32))
        if self._factors is None:
            inverse: Tensor = self._pseudo_inverse
            return ((inverse.T if transposed else inverse) @ b).to(dtype)
        u: Tensor = torch.linalg.lu_solve(*self._factors, b[:, None], adjoint=transposed)
        return u[:, 0].to(dtype)

    def size_of_step(self, f: Tensor) -> float:
        return float(torch.linalg.vector_norm(self.solve(f, transposed=False)))


class MatrixFree:
    """A system by its products: conjugate gradients where it is symmetric and positive, GMRES
    elsewhere, or the user's own solver."""

    def __init__(
        self,
        by: MatVec,
        by_transpose: MatVec,
        name: str,
        *,
        symmetric: bool,
        own: LinearSolve | None,
        check: bool,
    ) -> None:
        self._by = by
        self._by_transpose = by_transpose
        self._name = name
        self._symmetric = symmetric
        self._own = own
        self._check = check  # whether a solution must solve the system

    def solve(self, b: Tensor, *, transposed: bool) -> Tensor:
        matvec = self._by_transpose if transposed else self._by
        if not bool(b.any()):
            return torch.zeros_like(b)
        if self._own is not None:
            u = self._own(matvec, b)
        else:
            u = self._iterate(matvec, b, float(torch.finfo(b.dtype).eps ** 0.75))
        if not self._check:
            return u
        left = float(torch.linalg.vector_norm(matvec(u) - b) / torch.linalg.vector_norm(b))
        if left <= tolerance(b.dtype):
            return u
        message = (
            f"{self._name}: expected the system of the derivative, with {len(b)} unknowns, to "
            "be solved "
            f"to a relative residual of {tolerance(b.dtype):.1e}, got {left:.1e}. It may be "
            "singular; else give linear_solve=, a solver that suits it. check=False takes what "
            "is found."
        )
        raise SingularError(message)

    def size_of_step(self, f: Tensor) -> float:
        if not bool(f.any()):
            return 0.0
        step = self._own(self._by, f) if self._own is not None else self._iterate(self._by, f, 0.1)
        return float(torch.linalg.vector_norm(step))

    def _iterate(self, matvec: MatVec, b: Tensor, relative: float) -> Tensor:
        u = conjugate_gradients(matvec, b, relative) if self._symmetric else None
        return gmres(matvec, b, relative) if u is None else u


def conjugate_gradients(matvec: MatVec, b: Tensor, relative: float) -> Tensor | None:
    """Hestenes and Stiefel 1952, to a residual relative to |b|. None where the matrix shows
    itself not positive."""
    u, r = torch.zeros_like(b), b
    p, rr = r, torch.dot(r, r)
    stop = relative**2 * float(rr)
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


def gmres(
    matvec: MatVec, b: Tensor, relative: float, *, restart: int = 50, cycles: int = 40
) -> Tensor:
    """Restarted GMRES (Saad and Schultz 1986), to a residual relative to |b|."""
    u = torch.zeros_like(b)
    target = relative * float(torch.linalg.vector_norm(b))
    for _ in range(cycles):
        r = b - matvec(u)
        beta = float(torch.linalg.vector_norm(r))
        if beta <= target:
            break
        basis, h = _arnoldi(matvec, r / beta, restart, target / beta)
        e = torch.zeros(len(h), 1, dtype=b.dtype, device=b.device)
        e[0] = beta
        y = torch.linalg.lstsq(h, e).solution[:, 0]
        u = u + y @ torch.stack(basis)
    return u


def _arnoldi(
    matvec: MatVec, first: Tensor, steps: int, small: float
) -> tuple[list[Tensor], Tensor]:
    """An orthonormal basis of the Krylov space and the Hessenberg matrix, one row longer than
    wide."""
    basis = [first]
    h = torch.zeros(steps + 1, steps, dtype=first.dtype, device=first.device)
    for j in range(steps):
        w = matvec(basis[j])
        for _ in range(2):  # a second pass keeps the basis orthogonal
            c = torch.stack(basis) @ w
            h[: j + 1, j] += c
            w = w - c @ torch.stack(basis)
        norm = float(torch.linalg.vector_norm(w))
        h[j + 1, j] = norm
        if norm <= small * 1e-3 or j + 1 == min(steps, len(first)):
            break
        basis.append(w / norm)
    return basis, h[: len(basis) + 1, : len(basis)]
