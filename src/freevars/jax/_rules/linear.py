"""The linear system of an implicit derivative: which method solves it, and how a failure shows.

One unknown is a division. A small system on one device is written out as a matrix and factorised
once, for all right-hand sides and for the transpose. Everything else is only ever applied to
pytrees as they are: conjugate gradients for a second derivative, BiCGStab(2) otherwise; where these
stand still, the matrix while it fits, then least squares. A caller's own method takes the place of
all of that. An exact solve sits in `jax.lax.custom_linear_solve`, so that its derivatives of any
order and its transpose come from the system and not from the steps of a method. What a method
returns is put back into the system; what does not solve it is NaN. Not here: the methods
(`krylov`), where the system comes from (`implicit`), and what is done about a failure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from freevars._solvers.verdict import Limits
from freevars.jax import _compat
from freevars.jax._rules import krylov, scaled
from freevars.jax._rules.coordinates import Space
from freevars.jax._rules.krylov import Solution, System
from freevars.jax._rules.operator import LinearOperator, lineax_module
from freevars.jax._rules.truncated import Truncated
from freevars.jax._solver.unknown import like

__all__ = [
    "DENSE_FALLBACK",
    "DENSE_LIMIT",
    "LinearSolve",
    "LinearSystem",
    "Method",
    "guarded",
    "nothing_if",
]

Tree: TypeAlias = Any  # a pytree of real arrays of one dtype
Solve: TypeAlias = Callable[[Tree], Tree]  # b -> x
# None, a lineax solver, or a callable solve(operator, b) -> x
LinearSolve: TypeAlias = Any
# preconditioner(operator) -> a function of v that is about A^-1 v
Preconditioner: TypeAlias = Callable[[LinearOperator], Solve]

# Up to this size the matrix is written out. Below it a factorisation costs less than an iteration's
# bookkeeping, and tells a singular system from a slow one.
DENSE_LIMIT = 512
# Up to this size the matrix is written out where an iteration stands still: 32 MB in float64.
DENSE_FALLBACK = 2048


class LinearSystem(NamedTuple):
    """A x = b, prepared for any number of b. Trees are as the operator's."""

    operator: LinearOperator
    space: Space
    # (b, good) -> x, linear in b, differentiable, its transpose too. Unless `good` (True, or an
    # array) it is NaN where b is not zero: what is refused adds nothing where nothing is asked.
    solve: Callable[..., Tree]
    apply_inverse: Callable[[list[Tree]], list[Tree]]  # of several b at once, without derivatives
    matrix: Any = None  # Float[n, n] where it is written out, a constant
    least_squares: bool = False  # a solution is the shortest one, and may leave a residual
    rests_on_symmetry: bool = False  # the method takes the matrix for symmetric
    exact: bool = True  # not a truncated series, whose residual means nothing
    scaled: scaled.Scaled | None = None  # the factors, where it is written out
    # (b, tol) -> x with |A x - b| <= tol |b|, a constant, where it is not written out
    roughly: Callable[[Tree, float], Tree] | None = None


class Method(NamedTuple):
    """How the systems of one decorated solver are solved: its caller's choices."""

    linear_solve: LinearSolve = None
    preconditioner: Preconditioner | None = None
    dense_limit: int = DENSE_LIMIT
    least_squares: bool = False
    check: bool = True

    def validate(self) -> None:
        """Refuse what is neither a lineax solver nor a function, or finds no shortest solution."""
        solve = self.linear_solve
        if _is_lineax(solve):
            lx = lineax_module()
            if self.least_squares and not isinstance(solve, (lx.SVD, lx.LSMR)):
                message = (
                    'on_failure="least_squares" needs a linear solver that finds the shortest'
                    " solution of a singular system: None, lineax.SVD() or lineax.LSMR(...), got"
                    f" {solve!r}."
                )
                raise ValueError(message)
        elif isinstance(solve, type) or not (solve is None or callable(solve)):
            message = (
                "linear_solve: expected None, a lineax solver such as lineax.LU(), or a function"
                f" solve(operator, b), got {solve!r}."
            )
            raise TypeError(message)
        if not (self.preconditioner is None or callable(self.preconditioner)):
            message = (
                "preconditioner: expected a function that takes the operator and returns a function"
                f" of v, about A^-1 v; got {self.preconditioner!r}."
            )
            raise TypeError(message)
        if self.preconditioner is not None and solve is not None:
            message = (
                "preconditioner: it is for the default method; a linear_solve of your own brings"
                " its own."
            )
            raise ValueError(message)
        if isinstance(self.dense_limit, bool) or not isinstance(self.dense_limit, int):
            message = f"dense_limit: expected a number of unknowns, got {self.dense_limit!r}."
            raise TypeError(message)

    @property
    def is_truncated(self) -> bool:
        """Whether it is a truncated series, not a solve."""
        return isinstance(self.linear_solve, Truncated)

    @property
    def calls_users_functions(self) -> bool:
        """Whether it runs functions that may capture traced values."""
        return self.preconditioner is not None or (
            self.linear_solve is not None and not _is_lineax(self.linear_solve)
        )

    def prepare(
        self,
        operator: LinearOperator,
        space: Space,
        eps: float,
        captured: tuple[Solve, Solve] | None = None,
        sizes: tuple[Any, Any, Limits] | None = None,
    ) -> LinearSystem:
        """The system of an operator. `captured` solves it and its transpose if the functions of
        `calls_users_functions` capture traced values, which are made explicit there. `sizes` are x,
        the sizes of its components, and the limits: what a matrix is scaled by."""
        if operator.size == 0:
            return LinearSystem(operator, space, lambda b, _=True: b, lambda bs: bs)
        local = space.is_local and not _is_sharded(operator)
        if self.is_truncated:
            solve = captured[0] if captured else lambda b: self.linear_solve(operator, b)
            return LinearSystem(
                operator,
                space,
                lambda b, good=True: _pass_if(good, space, solve(_pass_if(good, space, b))),
                lambda bs: [*map(solve, bs)],
                exact=False,
            )
        if captured:
            return self._iterative(operator, space, *captured, captured[0])
        direct = self._direct(operator.size, symmetric=operator.symmetric)
        if direct and local:
            if operator.size == 1 and not self.least_squares:
                return _division(operator, space, _vectors(operator, sizes) if self.check else None)
            factorise = None if direct == "scaled" else direct
            system = _dense(operator, space, factorise, _vectors(operator, sizes))
            return system._replace(least_squares=self.least_squares)
        raw, _ = self._replace(check=False).methods(operator, space, eps, sizes)
        system = self._iterative(operator, space, *self.methods(operator, space, eps, sizes), raw)
        if self.linear_solve is not None:
            return system

        def roughly(b: Tree, tol: float) -> Tree:
            unchecked = self._replace(check=False)
            return unchecked._by_default(operator, space, eps, b, tol=tol, sizes=sizes)  # noqa: SLF001

        return system._replace(roughly=roughly)

    def prepare_matrix(
        self, operator: LinearOperator, space: Space, matrix: Any, sizes: Any
    ) -> LinearSystem:
        """The system of an operator whose matrix is known."""
        direct = self._direct(0, symmetric=operator.symmetric)
        factorise = None if direct == "scaled" else direct
        system = _dense(operator, space, factorise, _vectors(operator, sizes), matrix)
        return system._replace(least_squares=self.least_squares)

    def methods(
        self, operator: LinearOperator, space: Space, eps: float, sizes: Any = None
    ) -> tuple[Solve, Solve]:
        """Solvers of a system that is not written out, and of its transpose."""

        def solve(b: Tree) -> Tree:
            return self._solve(operator, space, eps, b, sizes)

        def transposed(b: Tree) -> Tree:
            if self.linear_solve is None or _is_lineax(self.linear_solve):
                return self._solve(operator.T, space, eps, b, None)
            x = _transposed_solve(
                functools.partial(self._ask, operator), functools.partial(self._ask, operator.T), b
            )
            return self._checked(operator.T, space, x, b)

        return solve, transposed

    def _solve(
        self, operator: LinearOperator, space: Space, eps: float, b: Tree, sizes: Any
    ) -> Tree:
        if self.linear_solve is None:
            return self._by_default(operator, space, eps, b, sizes=sizes)
        if _is_lineax(self.linear_solve):
            x = _by_lineax(self.linear_solve, operator, space, b)
        else:
            x = self._ask(operator, b)
        return self._checked(operator, space, x, b)

    def _ask(self, operator: LinearOperator, b: Tree) -> Tree:
        """The solution by a caller's function."""
        return like(self.linear_solve(operator, b), b, "linear_solve: the returned solution")

    def _checked(self, operator: LinearOperator, space: Space, x: Tree, b: Tree) -> Tree:
        if not self.check or self.is_truncated:
            return x
        return _nan_unless_solved(operator, space, x, b, self)

    def _iterative(
        self, operator: LinearOperator, space: Space, solve: Solve, transposed: Solve, raw: Solve
    ) -> LinearSystem:
        def linear(b: Tree, good: Any = True) -> Tree:  # noqa: FBT002
            # Not told to be symmetric: then what solves the transpose is checked in that.
            return jax.lax.custom_linear_solve(
                operator.matvec,
                b,
                lambda _, b: guarded(space, good, solve(b), b),
                lambda _, b: guarded(space, good, transposed(b), b),
            )

        def inverse(b: Tree) -> Tree:
            return jax.lax.custom_linear_solve(
                operator.matvec, b, lambda _, b: raw(b), lambda _, b: raw(b)
            )

        fixed = jax.lax.stop_gradient
        solver = self.linear_solve
        by_cg = solver is None or (_is_lineax(solver) and isinstance(solver, lineax_module().CG))
        return LinearSystem(
            operator,
            space,
            linear,
            lambda bs: [fixed(inverse(fixed(b))) for b in bs],
            least_squares=self.least_squares,
            rests_on_symmetry=operator.symmetric and by_cg and not self.least_squares,
        )

    # Direct methods.

    def _direct(self, n: int, *, symmetric: bool) -> Any:
        """How a matrix is factorised, or None where it is not written out."""
        solver = self.linear_solve
        if solver is None:
            if n > self.dense_limit or self.preconditioner is not None:
                return None
            return _pseudoinverse if self.least_squares else "scaled"
        if not _is_lineax(solver):
            return None
        lx = lineax_module()
        if isinstance(solver, (lx.CG, lx.BiCGStab, lx.GMRES, lx.LSMR, lx.Normal)):
            return None
        return lambda matrix: _factorise_by_lineax(solver, matrix, symmetric=symmetric)

    # The default for a system that is only applied.

    def _by_default(
        self,
        operator: LinearOperator,
        space: Space,
        eps: float,
        b: Tree,
        *,
        tol: float | None = None,
        sizes: Any = None,
    ) -> Tree:
        n = space.size(b)
        fits = n <= max(DENSE_FALLBACK, self.dense_limit) and space.is_local
        fits = fits and not _is_sharded(operator)
        # In units in which b and A b are about 1, no square of anything overflows.
        b_scale = _power_of_two(space.max(b))
        b = _times(1 / b_scale, b)
        image = operator.matvec(b)
        scale = _power_of_two(space.max(image))

        def matvec(v: Tree) -> Tree:
            return _times(1 / scale, operator.matvec(v))

        def rmatvec(v: Tree) -> Tree:
            return _times(1 / scale, operator.rmatvec(v))

        bb = space.dot(b, b)
        size = jnp.sqrt(krylov.divide(space.dot(image, image), bb)) / scale
        precondition = None
        if self.preconditioner is not None:
            about_inverse = self.preconditioner(operator)
            name = "preconditioner: the result"
            precondition = lambda v: _times(scale, like(about_inverse(v), v, name))  # noqa: E731
        steps = 4 * n + 100 if fits else min(10 * n + 100, 20_000)
        tol = eps**0.75 if tol is None else tol
        symmetric = operator.symmetric
        # Of conjugate gradients, the residual that they carry along is close to the true one.
        verify = self.check or fits or not symmetric
        system = System(matvec, b, space.dot, tol, eps, size, steps, precondition, verify)
        if self.least_squares:
            found = krylov.least_squares(system._replace(max_steps=2 * steps), rmatvec)
            acceptable = found.solved
        else:
            found = (krylov.conjugate_gradients if symmetric else krylov.bicgstab)(system)
            if fits:
                found = _unless_solved(
                    found, lambda _, zero: _by_matrix(system, operator, scale, sizes, zero)
                )
            elif not symmetric:
                found = _unless_solved(found, lambda x, _: krylov.least_squares(system, rmatvec, x))
            acceptable = found.rr <= eps**0.5 * bb
        x = _times(b_scale / scale, found.x)
        return _where(acceptable, x) if self.check else x


def _unless_solved(first: Solution, then: Callable[[Tree, Any], Solution]) -> Solution:
    """The solution of a second method, which is run only if the first solves nothing.

    A loop of no or one turn, not a `cond`: under `vmap` that would compute both for every member.
    `then` takes the x that there is, and the number of turns, which is 0. What depends on them is
    computed in the loop; the rest XLA moves out of it, and computes in any case.
    """

    def turn(state: tuple[Solution, Any]) -> tuple[Solution, Any]:
        first, turns = state
        second = then(first.x, turns)
        return second._replace(steps=first.steps + second.steps), turns + 1

    return jax.lax.while_loop(lambda s: ~s[0].solved & (s[1] < 1), turn, (first, 0))[0]


def _by_matrix(
    system: System, operator: LinearOperator, scale: Any, sizes: Any, zero: Any
) -> Solution:
    columns = operator.columns(jnp.arange(operator.size) + zero)
    matrix = jax.lax.stop_gradient(columns).T / scale
    factors = scaled.factorise(matrix, *_vectors(operator, sizes))
    x = operator.unravel(factors.of(operator.ravel(system.b)))
    r = krylov.combine(-1, system.matvec(x), system.b)
    rr = system.dot(r, r)
    return Solution(x, rr, jnp.isfinite(rr), zero)


def _vectors(operator: LinearOperator, sizes: Any) -> tuple[Any, Any, Limits]:
    """x, the sizes of its components and the limits, for a matrix; all alike where not known."""
    if sizes is None:
        dtype = jax.tree.leaves(operator.structure)[0].dtype
        ones = jnp.ones(operator.size, dtype)
        return ones, ones, Limits.of(float(jnp.finfo(dtype).eps))
    x, d, limits = sizes
    return operator.ravel(x), operator.ravel(d), limits


def _transposed_solve(solve: Solve, again: Solve, b: Tree) -> Tree:
    """The transpose of a caller's solver.

    Where JAX can transpose what the function does, that is it: then also a function that uses
    factors of its own, and never asks the operator, is transposed. What it cannot transpose, such
    as a loop that stops by itself, is called `again`, for the transposed operator.
    """
    try:
        transpose = jax.linear_transpose(solve, b)
        jax.eval_shape(transpose, b)
    except Exception:  # noqa: BLE001 (JAX says so with many classes; `solve` itself has run before)
        return again(b)
    return transpose(b)[0]


def _division(operator: LinearOperator, space: Space, sizes: Any) -> LinearSystem:
    slope = operator.matvec(jax.tree.map(jnp.ones_like, operator.example))

    def product(v: Tree) -> Tree:
        return jax.tree.map(jnp.multiply, slope, v)

    def solve(b: Tree, good: Any = True) -> Tree:  # noqa: FBT002
        if good is True:
            return jax.tree.map(jnp.divide, b, slope)

        def quotient(_: Any, b: Tree) -> Tree:
            return guarded(space, good, jax.tree.map(jnp.divide, b, constant), b)

        constant = jax.lax.stop_gradient(slope)
        return jax.lax.custom_linear_solve(product, b, quotient, quotient)

    matrix = jax.lax.stop_gradient(operator.ravel(slope))[:, None]
    return LinearSystem(
        operator,
        space,
        solve,
        lambda bs: [*map(solve, bs)],
        matrix,
        scaled=None if sizes is None else scaled.factorise(matrix, *sizes),
    )


def _dense(
    operator: LinearOperator,
    space: Space,
    factorise: Callable[[Any], tuple[Solve, Solve]] | None,
    sizes: Any,
    matrix: Any = None,
) -> LinearSystem:
    """Write the matrix out and factorise it once; None: in the units of the unknowns."""
    matrix = operator.as_matrix() if matrix is None else matrix
    constant = jax.lax.stop_gradient(matrix)
    if factorise is None:
        factors = scaled.factorise(constant, *sizes)
    else:
        factors = scaled.wrap(constant, sizes[1], *factorise(constant))
    solve, transpose_solve = factors.of, factors.transpose_of

    def linear(b: Tree, good: Any = True) -> Tree:  # noqa: FBT002
        return operator.unravel(
            jax.lax.custom_linear_solve(
                lambda v: matrix @ v,
                operator.ravel(b),
                lambda _, b: guarded(space, good, solve(b), b),
                lambda _, b: guarded(space, good, transpose_solve(b), b),
            )
        )

    def apply_inverse(bs: list[Tree]) -> list[Tree]:
        # All at once: two right-hand sides cost little more than one.
        columns = jnp.stack([*map(operator.ravel, bs)], axis=1)
        return [*map(operator.unravel, jax.vmap(solve, in_axes=1)(columns))]

    return LinearSystem(operator, space, linear, apply_inverse, constant, scaled=factors)


def guarded(space: Space, good: Any, x: Tree, b: Tree) -> Tree:
    """What solves a good system: x; else NaN, but 0 for a b of zeros."""
    if good is True:
        return x
    nothing = jax.tree.map(jnp.zeros_like, x)
    return krylov.choose(space.max(b) == 0, nothing, _where(good, x))


def _pass_if(good: Any, space: Space, b: Tree) -> Tree:
    """b, or NaN unless good; linear, and so for its transpose."""
    if good is True:
        return b

    def same(_: Any, b: Tree) -> Tree:
        return guarded(space, good, b, b)

    return jax.lax.custom_linear_solve(lambda v: v, b, same, same)


def nothing_if(good: Any, space: Space, like: Tree, dots: list[Any]) -> Tree:
    """Zeros, for directions in which nothing changes if that is `good`; else NaN, unless these
    directions are zero. Linear in them, and so for its transpose."""
    if not jax.tree.leaves(like):
        return like
    total = sum(jnp.sum(jnp.real(dot)).astype(jax.tree.leaves(like)[0].dtype) for dot in dots)
    spread = jax.tree.map(
        lambda leaf: _compat.like_type(jnp.broadcast_to(total, leaf.shape), leaf), like
    )

    def nothing(_: Any, b: Tree) -> Tree:
        return guarded(space, good, jax.tree.map(jnp.zeros_like, b), b)

    return jax.lax.custom_linear_solve(lambda v: v, spread, nothing, nothing)


def _pseudoinverse(matrix: Any) -> tuple[Solve, Solve]:
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    cut = matrix.shape[0] * jnp.finfo(matrix.dtype).eps * jnp.max(s, initial=0)
    kept = s > cut
    inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    return lambda b: vt.T @ (inverse * (u.T @ b)), lambda b: u @ (inverse * (vt @ b))


def _factorise_by_lineax(solver: Any, matrix: Any, *, symmetric: bool) -> tuple[Solve, Solve]:
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


def _by_lineax(solver: Any, operator: LinearOperator, space: Space, b: Tree) -> Tree:
    if not space.is_local:
        message = (
            f"linear_solve: {solver!r} sums over one device only, and the function couples the"
            " unknowns of several by a collective. Leave linear_solve out, or give a function"
            " solve(operator, b)."
        )
        raise NotImplementedError(message)
    lx = lineax_module()
    definite = operator.symmetric and isinstance(solver, lx.CG)
    # Only a solver for symmetric systems rests on symmetry.
    plain = LinearOperator(operator.matvec, operator.structure, rmatvec=operator.rmatvec)
    return solver.compute(solver.init(plain.as_lineax(definite=definite), {}), b, {})[0]


def _nan_unless_solved(
    operator: LinearOperator, space: Space, x: Tree, b: Tree, method: Method
) -> Tree:
    tol = float(jnp.finfo(jax.tree.leaves(b)[0].dtype).eps) ** 0.25
    left = krylov.combine(-1, b, operator.matvec(x))
    good = space.norm(left) <= tol * space.norm(b)
    if method.least_squares:  # then the normal equations hold
        normal, scale = (space.norm(operator.rmatvec(r)) for r in (left, b))
        good |= normal <= tol * scale
    return _where(good, x)


def _where(good: Any, x: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.where(good, leaf, jnp.nan), x)


def _times(a: Any, x: Tree) -> Tree:
    return jax.tree.map(lambda leaf: a * leaf, x)


def _power_of_two(x: Any) -> Any:
    """One near x, so that a product with it rounds nothing; 1 for what has none."""
    good = (x > 0) & jnp.isfinite(x)
    return jnp.where(good, jnp.exp2(jnp.round(jnp.log2(jnp.where(good, x, 1)))), 1)


def _is_sharded(operator: LinearOperator) -> bool:
    return any(_compat.is_sharded(leaf) for leaf in jax.tree.leaves(operator.example))


def _is_lineax(x: Any) -> bool:
    return any(kind.__module__.split(".")[0] == "lineax" for kind in type(x).__mro__)
