"""The systems of a batch of problems by their matrices, factorised once.

Every matrix is factorised with its columns in units of the unknowns and its rows in units of their
largest entry (van der Sluis 1969): neither what is found nor what is said about it depends on the
units of a problem. Not here: which systems are written out (`linear.py`).
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from freevars._solvers.verdict import Limits
from freevars.torch._rules.closer import Inputs, look, relative
from freevars.torch._rules.derivative import Derivative
from freevars.torch._rules.diagnostics import Figures, limits_of, units
from freevars.torch._rules.sizes import Sizes

__all__ = ["Dense"]


# In which the derivative is compared: a component that is small in one of them by chance is not in
# all, one that the solution hardly moves is.
_DIRECTIONS = 4


class Dense:
    """A system by its matrix, Float[Tensor, "problems n n"]."""

    evidence = "matrix"
    residual = 0.0

    def __init__(
        self, matrix: Tensor, f: Tensor, size: Tensor, *, least_squares: bool, fixed_point: bool
    ) -> None:
        """`size`: of each component of the unknown, as far as the solver saw it. `fixed_point`: the
        equations are differences x - fun(x), which cancel."""
        self._dtype = f.dtype
        dtype = torch.promote_types(f.dtype, torch.float32)  # no factorisation in half precision
        matrix, self._f = matrix.to(dtype), f.to(dtype)
        self._size = size.to(dtype)
        self._columns = _power_of_two(_positive(self._size))
        scaled = matrix * self._columns[:, None, :]
        largest = scaled.abs().amax(2)
        self._difference = fixed_point
        terms = torch.maximum(largest, self._columns) if fixed_point else largest
        self._rows = _power_of_two(torch.where(terms > 0, terms, 1))
        scaled = scaled / self._rows[:, :, None]
        # A component that happens to be small is no sign of a singular system.
        largest_size = self._size.amax(1, keepdim=True) if f.shape[1] else self._size
        small = self._size < torch.finfo(dtype).eps ** 0.25 * largest_size
        column = scaled.abs().amax(1)
        up = _power_of_two(torch.where(small & (column > 0), column, 0.5))
        self._columns = self._columns / up
        self._scaled = scaled / up[:, None, :]
        self._regular = largest.amin(1) > 0
        self._factors = torch.linalg.lu_factor_ex(self._scaled)[:2]
        self._rcond = self._reciprocal_condition()
        self._singular = ~(self._rcond > limits_of(dtype).rcond)
        self._conserved = torch.zeros_like(self._rcond)
        self._inverse: Tensor | None = None  # the shortest one, where it is asked for and differs
        self._left: dict[int, Tensor] = {}  # null vectors of A^T, by problem, where that is there
        finite = torch.isfinite(self._scaled).all(2).all(1)
        if bool((self._singular & finite).any()):
            self._look_at_null_vectors(matrix, finite, least_squares=least_squares)

    def solve(self, b: Tensor, *, transposed: bool) -> Tensor:
        columns, rows = self._columns, self._rows
        right = b.to(columns.dtype)
        scaled = right * columns if transposed else right / rows
        u = self._apply_inverse(scaled, transposed=transposed)
        u = u / rows if transposed else u * columns
        if self._inverse is not None:
            inverse = self._inverse.mT if transposed else self._inverse
            u = torch.where(self._singular[:, None], (inverse @ right[..., None])[..., 0], u)
        return u.to(b.dtype)

    def newton_step(self) -> Tensor:
        step = self.solve(self._f, transposed=False)
        return step.to(self._dtype)

    def figures(
        self, derivative: Derivative, sizes: Sizes, limits: Limits, inputs: Inputs
    ) -> Figures:
        """A step is looked at closer where it is not negligible."""
        finite = torch.isfinite(self._f).all(1) & torch.isfinite(self._scaled).all(2).all(1)
        step = self.solve(self._f, transposed=False)
        entries = self._scaled.abs()
        near, far = (t.to(step.dtype) for t in sizes[1:3])
        worst = self._worst(entries, step, near)
        change = zero = torch.zeros_like(worst)
        open_ = worst > limits.negligible
        if bool(open_.any()) and bool(
            (self._worst(entries, step, far)[open_] <= limits.step).any()
        ):
            worst, change = look(
                derivative,
                inputs,
                sizes,
                step,
                self._rounding(entries, near),
                functools.partial(self.solve, transposed=False),
                lambda v, error: self._worst(entries, v, torch.where(error, far, near)),
                limits,
                directions=_DIRECTIONS,
                floor=limits.column,
            )
        left = self._unanswered(inputs, entries, sizes.x.abs()) if self._left else zero
        return Figures(finite, worst, change, self._rcond, left, self._conserved)

    def _unanswered(self, inputs: Inputs, entries: Tensor, size: Tensor) -> Tensor:
        """How much of dF/dt p no direction of x answers, for what the solution is differentiated
        by: w^T dF/dt for a w in the null space of A^T, next to another vector of its size. What
        moves x by less than sqrt(eps) may be rounding."""
        out = torch.zeros_like(self._rcond)
        derivative, by, exactly = inputs()
        if not (by and exactly and derivative.f.requires_grad):
            return out
        terms = (entries @ (size.to(entries) / self._columns)[:, :, None]).amax((1, 2))
        for k, left in self._left.items():
            n, m = left.shape
            signs = torch.sin(torch.arange(1, n + 1).to(left) ** 2).sign()
            w = left @ torch.cos(torch.arange(1, m + 1).to(left) ** 2)
            lost, other = (_along(derivative, by, k, v) for v in (w, signs * w))
            least = float(terms[k]) * torch.finfo(left.dtype).eps ** 0.5
            out[k] = lost / max(lost, other, least) if lost else 0.0
        return out

    def _worst(self, entries: Tensor, step: Tensor, size: Tensor) -> Tensor:
        """By how much of all that an equation adds up the step changes a term of it, at most."""
        change = (entries * (step / self._columns).abs()[:, None, :]).amax(2)
        change = change / self._sums(entries, size)
        change = torch.where(change.isnan() & (self._f == 0), 0, change)
        return change.amax(1) if change.shape[1] else torch.zeros_like(self._rcond)

    def _rounding(self, entries: Tensor, size: Tensor) -> Tensor:
        """|A^-1| |A| `size`, by probes."""
        terms = self._rows * (entries @ (size / self._columns)[:, :, None])[..., 0]
        k = torch.arange(1, terms.shape[1] + 1, dtype=terms.dtype, device=terms.device)
        signs = torch.stack([torch.sin(k**2).sign(), torch.sin(k**2 + k).sign()])
        return self.solve(signs[:, None] * terms, transposed=False).abs().amax(0)

    def _sums(self, entries: Tensor, size: Tensor) -> Tensor:
        """What each equation adds up: its terms as they are, or, where they are all of components
        that may as well be zero, as rounding leaves them next to the largest one."""
        unit = units(size)
        sums, large, floor = (
            (entries @ (t / self._columns)[:, :, None])[..., 0]
            for t in (size, torch.where(size < unit, 0, size), unit)
        )
        return torch.where(large > 0, sums, floor)

    def _apply_inverse(self, b: Tensor, *, transposed: bool) -> Tensor:
        many = b.reshape(-1, *b.shape[-2:]).permute(1, 2, 0)  # problems n right-hand-sides
        u: Tensor = torch.linalg.lu_solve(*self._factors, many, adjoint=transposed)
        return u.permute(2, 0, 1).reshape(b.shape)

    def _reciprocal_condition(self) -> Tensor:
        """By inverse iteration: two rounds find the smallest singular value to a factor near one
        where it is far below the others, which is where it matters."""
        b, n = self._rows.shape
        if not n:
            return torch.ones(b, dtype=self._rows.dtype, device=self._rows.device)
        k = torch.arange(1, n + 1, dtype=self._rows.dtype, device=self._rows.device)
        z = torch.stack([torch.sin(k**2), torch.sin(k**2 + k)], 1).expand(b, n, 2)
        for _ in range(2):
            u = _divided(torch.linalg.lu_solve(*self._factors, _divided(z)))
            z = torch.linalg.lu_solve(*self._factors, u, adjoint=True)
        lengths = torch.linalg.vector_norm(z, dim=1) / torch.linalg.vector_norm(u, dim=1)
        inverse = lengths.amax(1)
        entries = self._scaled.abs()
        product = entries.sum(1).amax(1) * entries.sum(2).amax(1)
        norm = torch.minimum(torch.linalg.matrix_norm(self._scaled), product.sqrt())
        rcond = 1 / (inverse * (norm.clamp(min=1) if self._difference else norm))
        return torch.where(torch.isfinite(inverse) & self._regular, rcond, 0)

    def _look_at_null_vectors(self, matrix: Tensor, finite: Tensor, *, least_squares: bool) -> None:
        """Whether they are those of the transpose too, and the shortest inverse of the singular
        systems, with their ranks decided in units of the problem."""
        if least_squares:
            self._inverse = torch.zeros_like(matrix)
        for k in (self._singular & finite).nonzero()[:, 0].tolist():
            u, s, vh = torch.linalg.svd(self._scaled[k])
            keep = s > 10 * len(s) * torch.finfo(s.dtype).eps * s[0]
            keep[-1] = False
            null = self._columns[k, :, None] * vh[~keep].T
            there = (matrix[k].T @ null).abs()
            scale = matrix[k].abs().T @ null.abs()
            # An entry of a null vector that is zero is rounding, and so is what comes of it.
            least = scale.amax(0) * torch.finfo(s.dtype).eps ** 0.5
            scale = torch.maximum(scale, least)
            self._conserved[k] = (there / torch.where(scale > 0, scale, 1)).max()
            if self._inverse is not None:
                self._left[k] = u[:, ~keep] / self._rows[k, :, None]
                inverse = (vh[keep].T / s[keep]) @ u[:, keep].T
                inverse = self._columns[k, :, None] * inverse / self._rows[k]
                right, _ = torch.linalg.qr(null)
                self._inverse[k] = inverse - right @ (right.T @ inverse)


def _along(derivative: Derivative, by: Sequence[Tensor], k: int, w: Tensor) -> float:
    """The size of w^T dF/dt for F of problem k, with each t relative to what it is."""
    cotangent = torch.zeros_like(derivative.f)
    cotangent[k] = w.to(cotangent)
    found = torch.autograd.grad(
        derivative.f, by, cotangent, retain_graph=True, materialize_grads=True
    )
    return sum(
        float((g * relative(t, i)).abs().sum())
        for i, (g, t) in enumerate(zip(found, by, strict=True))
    )


def _positive(size: Tensor) -> Tensor:
    """The sizes of components, those that are zero as next to nothing."""
    size = torch.where(torch.isfinite(size), size, 1)
    least = torch.where(size > 0, size, torch.inf)
    if size.shape[1]:
        least = least.amin(1, keepdim=True)
    least = torch.where(torch.isfinite(least), least * torch.finfo(size.dtype).eps, 1)
    return torch.where(size > 0, size, least)


def _power_of_two(x: Tensor) -> Tensor:
    """A scale near `x` by which to multiply rounds nothing."""
    scale: Tensor = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent)
    return scale


def _divided(v: Tensor) -> Tensor:
    """Columns by their largest entry, so that no square of one overflows."""
    largest: Tensor = torch.linalg.vector_norm(v, torch.inf, dim=1, keepdim=True)
    return v / largest
