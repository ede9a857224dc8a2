"""Systems that are only ever applied to vectors: conjugate gradients for a minimum, Richardson's
iteration or GMRES elsewhere; where an iteration stalls, the matrix after all, while it fits.

Not here: the methods (`krylov.py`), and what the figures mean (`diagnostics.py`).
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from freevars._solvers.verdict import Limits
from freevars.torch._rules.closer import Inputs, look
from freevars.torch._rules.derivative import Derivative, LinearOperator
from freevars.torch._rules.diagnostics import Figures, limits_of, units
from freevars.torch._rules.krylov import conjugate_gradients, gmres, richardson
from freevars.torch._rules.sizes import Sizes
from freevars.torch._rules.system import LinearSolve, System
from freevars.torch._rules.truncated import Truncated
from freevars.torch._rules.vectors import norm

__all__ = ["Iterative"]

# Numbers in the largest matrix that is written out where an iteration stalled.
_LARGEST_MATRIX = 2**25

_SWEEPS = 2  # each leaves the root of how far the rows differ
_SHARE = 0.3  # of the largest component of a derivative: so small ones do not count by themselves
_ALIGNED = 4  # times their norm: a sum of which random signs leave no more
_ALIKE = 1024  # up to this factor, they do not: an estimate may be small by chance


class Iterative:
    """A system by its products, solved as one for the whole batch."""

    def __init__(
        self,
        derivative: Derivative,
        dense: Callable[[], System],
        structure: object,
        own: LinearSolve | None,
        size: Tensor,
        *,
        minimum: bool,
        fixed_point: bool,
    ) -> None:
        """`size`: of the tensors of the unknown, each in the place of its components. `minimum`: of
        an objective, so that conjugate gradients are worth a try. `fixed_point`: the equations have
        the units of their unknowns."""
        self._a = derivative
        self._make_dense = dense
        self._structure = structure
        self._own = own
        self._dense: System | None = None
        self.residual = 0.0
        self._minimum = minimum
        self._relative = float(torch.finfo(derivative.f.dtype).eps ** 0.75)
        units = self._symmetric_units() if minimum and derivative.f.numel() else None
        self._units = units if own is None else None
        self._apart = None if minimum or own is not None else _apart(size)
        self._fixed_point = fixed_point
        b, n = derivative.f.shape
        self._fits = own is None and b * n * n <= _LARGEST_MATRIX
        # As many products as one problem has unknowns give the matrix.
        self._steps = max(50, n // 4) if self._fits else 2000

    def solve(self, b: Tensor, *, transposed: bool) -> Tensor:
        several = b if b.dim() > self._a.f.dim() else b[None]
        self.residual = 0.0
        solved = [self._solve(one, transposed, self._relative) for one in several]
        return torch.stack(solved).reshape(b.shape)

    def newton_step(self) -> Tensor:
        # Not `solve`: nobody has asked for it, and its residual is one among those of the figures.
        return self._solve(self._a.f.detach(), False, self._relative)

    @property
    def evidence(self) -> Hashable:
        """The matrix, if an iteration stalled, so that it solves since."""
        return self._dense is not None

    def _symmetric_units(self) -> Tensor | None:
        """D for which the rows of D A D are about of one size; None if those of A are. On the way A
        may show itself not symmetric, where a custom Function in the objective has a backward pass
        that is no gradient: from then on it is not taken to be.

        The size of a row is estimated by images of vectors without a pattern. A row of D A D is
        scaled by D twice, once as a column; so D takes the root of what is missing, more than once.

        References:
            Bradley 2010, "Algorithms for the equilibration of matrices and their application to
            limited-memory quasi-Newton methods", chapter 3.
        """
        d = torch.ones_like(self._a.f)
        operator = LinearOperator(self._a, self._structure, transposed=True)
        generator = torch.Generator().manual_seed(1)
        for _ in range(_SWEEPS):
            probes = [d * _probe(d, generator) for _ in range(2)]
            images = [operator(v.reshape(-1)).reshape(d.shape) for v in probes]
            crooked = _asymmetry(probes, images) > limits_of(d.dtype).asymmetry
            if self._a.symmetric and bool(crooked.any()):
                self._a = Derivative(self._a.at, self._a.f, symmetric=False)
            rows = d * torch.maximum(*(v.abs() for v in images))
            missing = rows.amax(1, keepdim=True) / torch.where(rows > 0, rows, 1)
            wide = (rows > 0) & (missing > _ALIKE) & torch.isfinite(missing)
            if not bool(wide.any()):
                break
            # By powers of two, which round nothing.
            d = d * torch.where(wide, missing, 1).sqrt().log2().round().exp2()
        return None if bool((d == 1).all()) else d

    def figures(
        self, derivative: Derivative, sizes: Sizes, limits: Limits, inputs: Inputs
    ) -> Figures:
        """The Newton step is measured by its largest component, against each tensor of the unknown,
        in units in which the equations are alike. `_size_of_step` says what is known of it."""
        left = self.residual
        figures = self._by_products(derivative, sizes, limits, inputs)
        self.residual = left
        if self._dense is not None:
            return self._dense.figures(derivative, sizes, limits, inputs)
        return figures

    def _by_products(
        self, derivative: Derivative, sizes: Sizes, limits: Limits, inputs: Inputs
    ) -> Figures:
        self.residual = 0.0
        f = self._a.f.detach()
        measured = Figures.unmeasured(f)
        if self._dense is not None:
            return measured
        near, far = map(units, sizes.by_leaf(self._units))

        def measure(v: Tensor, error: Tensor) -> Tensor:
            return _largest(v / torch.where(error, far, near))

        size, step = self._size_of_step(f, near, limits)
        change = measured.change
        asked = size > limits.negligible
        if step is None:
            unknown = asked & (size > limits.certain) & (size <= limits.step)
            change = torch.where(unknown, torch.inf, change)
        elif bool((asked & (_largest(step / far) <= limits.step)).any()):
            size, change = look(
                derivative,
                inputs,
                sizes,
                self.newton_step(),
                sizes.near,
                functools.partial(self._solve, transposed=False, relative=1e-2),
                measure,
                limits,
                directions=1,
                floor=_SHARE,
            )
        return measured._replace(
            finite=measured.finite & torch.isfinite(self._a.at.detach()).all(1),
            step=size.to(f.dtype),
            change=change,
            residual=torch.full_like(measured.residual, self.residual),
        )

    def _size_of_step(
        self, f: Tensor, unit: Tensor, limits: Limits
    ) -> tuple[Tensor, Tensor | None]:
        """The largest component of the Newton step s, about; and s, unless it is negligible or
        products of A are not to be had.

        A product with s takes a solution with A^T: v^T s = w^T F for the w with A^T w = v. Its
        terms w_k F_k are what each equation has to do with it, whatever units that is in. For a
        random v it is about the norm of s, so about the largest component where one is far off;
        where many are, it is up to sqrt(n) times that, and s itself has to say.

        What was solved for is no such v: it may not hear of a component that is far off, while what
        it is differentiated by multiplies that (a gate that is still shut)."""
        if not bool(f.any()) or not bool(torch.isfinite(f).all()):
            return torch.zeros_like(f[:, 0]), None
        if self._a.symmetric:
            known, _ = self._solve_each(f, transposed=False)
            return _largest(known / unit), known
        generator = torch.Generator().manual_seed(0)
        v: Tensor = _probe(f, generator) / unit
        w, quick = self._solve_each(v, transposed=True)
        terms = w * f
        heard, together = terms.sum(1), norm(terms)[:, 0]
        most = torch.maximum(heard.abs(), together)
        if quick:  # A is about a number: so are v s the terms, unless they add up in one component
            alone = heard.abs() <= _ALIGNED * together
            most = torch.where(alone, _largest(terms / (v * unit)), most)
        if bool((most <= limits.negligible).all()):
            return most, None
        step = self._step_in_full(f, w, limits)
        if step is not None:
            apart = ((v * step).sum(1) - heard).abs()
            # A custom Function may have a derivative of its derivative that is none.
            if bool((apart <= (norm(v * step)[:, 0] + together) / 2).all()):
                return _largest(step / unit), step
        pointed = self._heard_where_far(f, w, unit, generator)
        return torch.maximum(pointed, heard.abs() / math.sqrt(f.shape[1])), None

    def _step_in_full(self, f: Tensor, w: Tensor, limits: Limits) -> Tensor | None:
        """A^-1 f, so closely that w does not hear what is left of `f`; None where A is not known
        so well."""
        terms, size, before = _largest(w * f), norm(f)[:, 0], self.residual
        left = _SHARE * torch.clamp(terms, min=limits.negligible) / _largest(w)
        relative = float((left / torch.where(size > 0, size, left)).amin())
        self.residual = 0.0
        try:
            step, _ = self._solve_each(
                f, transposed=False, relative=min(max(relative, self._relative), 1e-2)
            )
            left_over = self.residual
        except RuntimeError:  # what PyTorch cannot differentiate twice
            return None
        finally:
            self.residual = before
        return step if left_over <= limits.residual else None

    def _heard_where_far(
        self, f: Tensor, w: Tensor, unit: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The root of a mean square over the components of the Newton step, each with a weight: the
        gradient of |w F|^2 / 2, which is large where a component is far off."""
        terms = w * f
        largest = _largest(terms)[:, None]
        weights = self._a.transposed(w * (terms / torch.where(largest > 0, largest, 1)))
        v = _probe(f, generator) * weights
        w, _ = self._solve_each(v, transposed=True)
        whole = norm(v * unit)[:, 0]
        return (w * f).sum(1).abs() / torch.where(whole > 0, whole, 1)

    def _solve_each(
        self, b: Tensor, *, transposed: bool, relative: float | None = None
    ) -> tuple[Tensor, bool]:
        """As `_solved`, each problem to `relative` by its own scale; by default so closely that no
        number of a `b` of numbers about 1 is left by more than 0.3."""
        scale = b.abs().amax(1, keepdim=True)
        scale = torch.where(scale > 0, scale, 1)
        relative = relative or _SHARE / math.sqrt(b.shape[1])
        u, quick = self._solved(b / scale, transposed, relative / math.sqrt(len(b)))
        return u * scale, quick

    def _solve(self, b: Tensor, transposed: bool, relative: float) -> Tensor:  # noqa: FBT001
        return self._solved(b, transposed, relative)[0]

    def _solved(
        self,
        b: Tensor,
        transposed: bool,  # noqa: FBT001
        relative: float,
    ) -> tuple[Tensor, bool]:
        """`u`, and whether A contracted quickly along it."""
        if self._dense is not None:
            return self._dense.solve(b, transposed=transposed), False
        if not bool(b.any()):
            return torch.zeros_like(b), True
        operator = LinearOperator(self._a, self._structure, transposed=transposed)
        if self._own is not None:
            return self._by_own(self._own, operator, b), False
        # Norms are of dimensionless vectors: the system is L A R v = L b, with u = R v.
        scales = self._scales(transposed=transposed)
        right = b if scales is None else scales[0] * b
        scale = right.abs().max()  # squares of small numbers are no numbers
        right = (right / scale).reshape(-1)
        dtype = torch.promote_types(right.dtype, torch.float32)

        flat = None if scales is None else [d.reshape(-1) for d in scales]

        def matvec(v: Tensor) -> Tensor:
            v = v.to(right.dtype)
            image = operator(v) if flat is None else flat[0] * operator(flat[1] * v)
            return image.to(dtype)

        found = quick = False
        if self._minimum:
            u, found = conjugate_gradients(matvec, right.to(dtype), relative, self._steps)
        if not found:
            first = richardson(matvec, right.to(dtype), relative)
            quick = first.solved
            u, found = gmres(matvec, right.to(dtype), relative, self._steps, start=first)
        if not found and self._fits:
            self._dense = self._make_dense()
            return self._dense.solve(b, transposed=transposed), False
        if not found:
            self._measure(matvec, u, right)
        u = u.to(b.dtype).reshape(b.shape) * scale
        return (u if scales is None else scales[1] * u), quick

    def _scales(self, *, transposed: bool) -> tuple[Tensor, Tensor] | None:
        """L and R, of powers of two: the units of the unknown where its tensors are far apart, or
        those in which the equations of a minimum are alike; None where nothing is scaled."""
        if self._units is not None:
            return self._units, self._units
        if self._apart is None:
            return None
        rows = 1 / self._apart if self._fixed_point else torch.ones_like(self._apart)
        return (self._apart, rows) if transposed else (rows, self._apart)

    def _by_own(self, own: LinearSolve, operator: LinearOperator, b: Tensor) -> Tensor:
        scale = b.abs().max()
        right = (b / scale).reshape(-1)
        u = own(operator, right)
        if not isinstance(own, Truncated):  # which does not solve, on purpose
            self._measure(operator, u, right)
        return u.reshape(b.shape) * scale

    def _measure(self, operator: Callable[[Tensor], Tensor], u: Tensor, b: Tensor) -> None:
        left = float(torch.linalg.vector_norm(operator(u) - b) / torch.linalg.vector_norm(b))
        self.residual = max(self.residual, left) if left == left else float("inf")  # noqa: PLR0124


def _apart(size: Tensor) -> Tensor | None:
    """Units, by powers of two, from the sizes of tensors; None where these are alike. One that is
    zero has a unit between the others'."""
    known = (size > 0) & torch.isfinite(size)
    if not bool(known.any()):
        return None
    least, most = size[known].amin(), size[known].amax()
    if bool(most <= _ALIKE * least):
        return None
    one = torch.ones_like(least).clamp(least, most)
    return torch.where(known, size, one).log2().round().exp2()


def _asymmetry(probes: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
    """|A - A^T| / 2|A| of each problem, about: u^T A w is w^T A u where A is symmetric. Both
    products are of vectors without a pattern: about 1 / sqrt(n) of what they may be."""
    (u, w), (au, aw) = map(_about_one, (probes, images))
    norm = functools.partial(torch.linalg.vector_norm, dim=1)
    scale = norm(u) * norm(aw) + norm(w) * norm(au)
    apart = ((u * aw).sum(1) - (w * au).sum(1)).abs()
    return apart / torch.where(scale > 0, scale, 1) * math.sqrt(u.shape[1])


def _about_one(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Two vectors next to the largest number in them: squares of small numbers are no numbers."""
    largest = torch.maximum(*(v.abs() for v in vectors)).amax(1, keepdim=True)
    return [v / torch.where(largest > 0, largest, 1) for v in vectors]


def _largest(v: Tensor) -> Tensor:
    return v.abs().amax(1)


def _probe(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of about 1 and of either sign, the same from run to run."""
    sizes = torch.rand(like.shape, generator=generator, device="cpu").to(like) + 0.5
    signs = torch.randint(0, 2, like.shape, generator=generator, device="cpu").to(like) * 2 - 1
    return sizes * signs
