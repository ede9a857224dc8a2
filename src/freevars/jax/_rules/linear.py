"""The linear system of an implicit derivative: which method solves it, and how a failure shows.

One unknown is a division. A small system on one device is written out as a matrix and factorised
once, for all right-hand sides and for the transpose. Everything else is only applied to pytrees as
they are: conjugate gradients for a second derivative, BiCGStab(2) otherwise, for a fixed point
after the iteration that its own system defines; where these stall, the matrix if it fits, then
least squares. A caller's own method replaces all of this. An exact solve sits in
`jax.lax.custom_linear_solve`, so that its derivatives of any order and its transpose come from the
system and not from the steps of a method. Results are checked in the system; those that do not
solve it become NaN. Not here: the methods (`krylov`), where the system comes from (`implicit`), and
what is done about a failure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from freevars._solvers.verdict import Limits
from freevars.jax._rules.coordinates import Space, known_size
from freevars.jax._rules.direct import dense, division, factorise_by_lineax, pseudoinverse, vectors
from freevars.jax._rules.iterative import (
    Choice,
    is_sharded,
    nan_unless_solved,
    solve_by_default,
    solve_by_lineax,
    solve_transposed,
    symmetric_units,
)
from freevars.jax._rules.krylov import choose
from freevars.jax._rules.operator import LinearOperator, lineax_module
from freevars.jax._rules.system import LinearSystem, guarded, linear_solve, pass_if, where
from freevars.jax._rules.truncated import Truncated
from freevars.jax._solver.unknown import like

__all__ = ["CHOICES", "LinearSolve", "Method", "Preconditioner"]

Tree: TypeAlias = Any  # a pytree of real arrays of one dtype
Solve: TypeAlias = Callable[[Tree], Tree]  # b -> x
# None, a lineax solver, or a callable solve(operator, b) -> x
LinearSolve: TypeAlias = Any
# preconditioner(operator) -> a function of v that is about A^-1 v
Preconditioner: TypeAlias = Callable[[LinearOperator], Solve]

# Up to this size the matrix is written out. Below it a factorisation costs less than an iteration's
# bookkeeping, and tells a singular system from a slow one.
DENSE_LIMIT = 512

# The fields of `Method` that are options of a decorator.
CHOICES = ("linear_solve", "preconditioner", "dense_limit")


class Method(NamedTuple):
    """How the systems of one decorated solver are solved: its caller's choices."""

    linear_solve: LinearSolve = None
    preconditioner: Preconditioner | None = None
    dense_limit: int = DENSE_LIMIT
    least_squares: bool = False
    check: bool = True

    def validate(self) -> None:
        """Refuse what is neither a lineax solver nor a function, or cannot find a shortest
        solution."""
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
                "preconditioner: it is for the default method; a linear_solve of your own"
                " brings its own."
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

    @property
    def _choice(self) -> Choice:
        return Choice(self.preconditioner, self.dense_limit, self.least_squares, self.check)

    def prepare(
        self,
        operator: LinearOperator,
        space: Space,
        eps: float,
        captured: tuple[Solve, Solve] | None,
        sizes: tuple[Any, Any, Any, Limits],
    ) -> LinearSystem:
        """The system of an operator. `captured` solves it and its transpose if the functions of
        `calls_users_functions` capture traced values, which are made explicit there. `sizes` are x,
        how far the solver came with its components, the sizes of these, and the limits: what a
        matrix is scaled by."""
        if operator.size == 0:
            return LinearSystem(operator, space, lambda b, _=True: b, lambda bs: bs)
        local = space.is_local and not is_sharded(operator)
        if self.is_truncated:
            solve = captured[0] if captured else lambda b: self.linear_solve(operator, b)
            return LinearSystem(
                operator,
                space,
                lambda b, good=True: pass_if(good, space, solve(pass_if(good, space, b))),
                lambda bs: [*map(solve, bs)],
                exact=False,
            )
        if captured:
            return self._iterative(operator, space, *captured, captured[0])
        if local and self._direct(operator.size, symmetric=operator.symmetric):
            if operator.size == 1 and not self.least_squares:
                return division(operator, space, vectors(operator, sizes) if self.check else None)
            return self.prepare_matrix(operator, space, operator.as_matrix(), sizes)
        units = tried = None
        if operator.symmetric and self.linear_solve is None and not self.least_squares:
            tried = symmetric_units(operator, space)
            units = tried.units
        raw, _ = self._replace(check=False).methods(operator, space, eps, units)
        system = self._iterative(operator, space, *self.methods(operator, space, eps, units), raw)
        if self.linear_solve is not None:
            return system

        def roughly(b: Tree, tol: float) -> tuple[Tree, Any]:
            unchecked = self._choice._replace(check=False)
            return solve_by_default(unchecked, operator, space, eps, b, tol=tol, units=units)

        return system._replace(roughly=roughly, tried=tried)

    def prepare_matrix(
        self, operator: LinearOperator, space: Space, matrix: Any, sizes: Any
    ) -> LinearSystem:
        """The system of an operator with this matrix."""
        direct = self._direct(0, symmetric=operator.symmetric)
        factorise = None if direct == "scaled" else direct
        system = dense(operator, space, matrix, factorise, vectors(operator, sizes))
        return system._replace(least_squares=self.least_squares)

    def methods(
        self, operator: LinearOperator, space: Space, eps: float, units: Any = None
    ) -> tuple[Solve, Solve]:
        """Solvers of a system that is not written out, and of its transpose."""

        def solve(b: Tree) -> Tree:
            return self._solve(operator, space, eps, b, units)

        def transposed(b: Tree) -> Tree:
            if self.linear_solve is None or _is_lineax(self.linear_solve):
                return self._solve(operator.T, space, eps, b, units)
            x = solve_transposed(
                functools.partial(self._ask, operator), functools.partial(self._ask, operator.T), b
            )
            return self._checked(operator.T, space, x, b)

        return solve, transposed

    def _solve(
        self, operator: LinearOperator, space: Space, eps: float, b: Tree, units: Any
    ) -> Tree:
        if self.linear_solve is None:
            x, residual = solve_by_default(self._choice, operator, space, eps, b, units=units)
            return where(residual <= eps**0.25, x) if self.check else x
        if _is_lineax(self.linear_solve):
            x = solve_by_lineax(self.linear_solve, operator, space, b)
        else:
            x = self._ask(operator, b)
        return self._checked(operator, space, x, b)

    def _ask(self, operator: LinearOperator, b: Tree) -> Tree:
        """The solution by a caller's function."""
        return like(self.linear_solve(operator, b), b, "linear_solve: the returned solution")

    def _checked(self, operator: LinearOperator, space: Space, x: Tree, b: Tree) -> Tree:
        if not self.check or self.is_truncated:
            return x
        return nan_unless_solved(operator, space, x, b, least_squares=self.least_squares)

    def _iterative(
        self, operator: LinearOperator, space: Space, solve: Solve, transposed: Solve, raw: Solve
    ) -> LinearSystem:
        def linear(b: Tree, good: Any = True) -> Tree:  # noqa: FBT002
            def only_if_good(solve: Solve) -> Solve:
                # A refused system is not solved; and the verdict comes first, so that its memory is
                # free again.
                if good is True:
                    return solve
                nothing = functools.partial(jax.tree.map, jnp.zeros_like)
                return lambda b: guarded(space, good, solve(choose(good, b, nothing(b))), b)

            # Not told to be symmetric: then what solves the transpose is checked in that.
            return linear_solve(operator.matvec, b, only_if_good(solve), only_if_good(transposed))

        def inverse(b: Tree) -> Tree:
            return linear_solve(operator.matvec, b, raw, raw)

        fixed = jax.lax.stop_gradient
        return LinearSystem(
            operator,
            space,
            linear,
            lambda bs: [fixed(inverse(fixed(b))) for b in bs],
            least_squares=self.least_squares,
        )

    # Direct methods.

    def _direct(self, n: int, *, symmetric: bool) -> Any:
        """How a matrix is factorised, or None where it is not written out."""
        solver = self.linear_solve
        if solver is None:
            if known_size(n) > self.dense_limit or self.preconditioner is not None:
                return None
            return pseudoinverse if self.least_squares else "scaled"
        if not _is_lineax(solver):
            return None
        lx = lineax_module()
        if isinstance(solver, (lx.CG, lx.BiCGStab, lx.GMRES, lx.LSMR, lx.Normal)):
            return None
        return lambda matrix: factorise_by_lineax(solver, matrix, symmetric=symmetric)


def _is_lineax(x: Any) -> bool:
    return any(kind.__module__.split(".")[0] == "lineax" for kind in type(x).__mro__)
