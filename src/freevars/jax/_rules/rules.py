"""Decorators that give any solver derivatives, from the condition that its result satisfies.

Not here: the decorated solver (`solver`), the mathematics (`implicit`), how the linear system is
solved (`linear`), and when a result counts (`diagnostics`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, Unpack, overload

from freevars._solvers.options import check_options
from freevars._solvers.verdict import Kind
from freevars.jax._rules.solver import ImplicitSolver, Options

__all__ = ["Options", "argmin", "fixed_point", "root"]

P = ParamSpec("P")
R = TypeVar("R")


class Decorator(Protocol):
    """Gives a solver a rule."""

    def __call__(self, solver: Callable[P, R], /) -> ImplicitSolver[P, R]:
        """The solver with derivatives."""


def _decorate(solver: Callable[..., Any] | None, kind: Kind, options: Options) -> Any:
    check_options(kind, options, Options)

    def decorate(solver: Callable[P, R], /) -> ImplicitSolver[P, R]:
        return ImplicitSolver(solver, kind, **options)

    return decorate if solver is None else decorate(solver)


@overload
def root(solver: Callable[P, R], /, **options: Unpack[Options]) -> ImplicitSolver[P, R]: ...
@overload
def root(**options: Unpack[Options]) -> Decorator: ...
def root(solver: Callable[..., Any] | None = None, /, **options: Unpack[Options]) -> Any:
    """Derivatives for a solver whose result x satisfies `fun(x, *args, **kwargs) = 0`.

    The decorated solver is called as before, `solver(fun, x0, ...)`, and returns what it returned
    before. Derivatives, forward and reverse and of any order, flow into every value that `fun`
    captures and into the extra arguments that the solver passes on to `fun`: what its signature
    collects in `*args` and `**kwargs`, or a tuple named `args`. Everything else in its signature is
    an option of its own; options and `x0` get derivative zero, because a solution does not depend
    on them; that it is one is checked then too.

    Args:
        solver: `solver(fun, x0, ...)` in JAX, pure. `x0` is a pytree of floating or complex arrays,
            and so is the x that it returns. `fun` reaches it as a `Closure`.
        has_aux: the solver returns `(x, aux)`, and `fun` may return `(value, aux)`. This declares
            the aux constant: it has derivative zero.
        linear_solve: how the system of the derivative is solved: a lineax solver, a truncated
            series (`neumann`, `one_step`), or a function `solve(operator, b)` that takes a
            `LinearOperator` and returns a pytree like b: like x, with a pair of real arrays for
            each complex one. It may call the operator, as in `solve(matvec, b)`. A backward pass
            takes the transpose of the function where JAX can transpose it, and calls it for the
            transposed operator where not. None: divide by the slope of one unknown, factorise up to
            `dense_limit` unknowns, beyond that BiCGStab(2) (conjugate gradients for `argmin`) until
            |r| <= eps^(3/4) |b|, and the matrix or least squares where these stand still.
        preconditioner: for None: a function that takes the operator and returns a linear function
            of v that is about A^-1 v, symmetric and definite for `argmin`. With it nothing is
            factorised.
        dense_limit: see linear_solve. 0 never factorises a system of more than one unknown at once.
        on_failure: what happens where the derivative cannot be trusted. That is: the solver did not
            converge (a Newton step from its result would move a component by more than 1% of its
            size, 1.9% in float32; or by more than the fourth root of the dtype's spacing, at most
            0.1%, while a second step with the same matrix is no smaller than 2% of the first),
            something is not finite, the system is singular (reciprocal condition number below 10
            eps, in units of the unknowns and of the equations), or it was not solved (residual
            above the fourth root of the spacing, relative). "raise": an error where values are
            known; NaN inside `jit` and `vmap`, and in a backward pass where an iterative linear
            solver stopped short. "warn": NaN always, and a warning that says why, from inside `jit`
            too. "nan": NaN always. "least_squares": the shortest solution of a singular system,
            else as "raise".
        check: False leaves all of that out.
        tol: the largest Newton step, relative to each component, that counts as converged, whatever
            a second one is. None: see `on_failure`.
        polish: True adds a Newton step to x before it is returned or differentiated.
        conserved: `conserved(x)`, an array or pytree of totals of x that the solver keeps as they
            are in x0. They complete equations that repeat each other, and derivatives flow into x0.
            It captures nothing that is differentiated by.
        jit: False runs the solver as it is, for one that cannot be traced; it then needs known
            values.

    Raises:
        freevars.errors.NotASolutionError, freevars.errors.SingularError: see `on_failure`.
        freevars.errors.StructureError: the solver returns another structure, shape or dtype than
            `x0`.
        TypeError: an unknown is neither floating nor complex, or there is not one equation for
            each.

    Source: the implicit function theorem; Blondel et al. 2022, "Efficient and Modular Implicit
    Differentiation".

    >>> import jax, freevars.jax as fv
    >>> @fv.root
    ... def newton(fun, x0):
    ...     return jax.lax.fori_loop(0, 20, lambda _, x: x - fun(x) / jax.grad(fun)(x), x0)
    >>> square_root = lambda a: newton(lambda x: x**2 - a, 1.0)
    >>> print(square_root(4.0), jax.grad(square_root)(4.0))
    2.0 0.25
    """
    return _decorate(solver, "root", options)


@overload
def argmin(solver: Callable[P, R], /, **options: Unpack[Options]) -> ImplicitSolver[P, R]: ...
@overload
def argmin(**options: Unpack[Options]) -> Decorator: ...
def argmin(solver: Callable[..., Any] | None = None, /, **options: Unpack[Options]) -> Any:
    """Derivatives for a solver whose result x satisfies `grad(fun)(x, *args, **kwargs) = 0`.

    A minimum, a maximum or a saddle of a real function of shape (), without constraints: x has to
    be where the gradient vanishes, and the second derivative there has to be regular. Everything
    else is as for `root`, which also says what may be given as options.

    >>> import jax, jax.numpy as jnp, freevars.jax as fv
    >>> @fv.argmin
    ... def descend(fun, x0, steps=200):
    ...     return jax.lax.fori_loop(0, steps, lambda _, x: x - 0.3 * jax.grad(fun)(x), x0)
    >>> data = jnp.array([1.0, 2.0, 6.0])
    >>> def center(penalty):
    ...     return descend(lambda m: jnp.mean((data - m) ** 2) + penalty * m**2, 0.0)
    >>> print(f"{center(0.5):.3f} {jax.grad(center)(0.5):.3f}")  # 3 / (1 + p), -3 / (1 + p)^2
    2.000 -1.333
    """
    return _decorate(solver, "argmin", options)


@overload
def fixed_point(solver: Callable[P, R], /, **options: Unpack[Options]) -> ImplicitSolver[P, R]: ...
@overload
def fixed_point(**options: Unpack[Options]) -> Decorator: ...
def fixed_point(solver: Callable[..., Any] | None = None, /, **options: Unpack[Options]) -> Any:
    """Derivatives for a solver whose result x satisfies `fun(x, *args, **kwargs) = x`.

    `fun` returns the structure and shapes of x. Everything else is as for `root`, which also says
    what may be given as options.

    >>> import jax, jax.numpy as jnp, freevars.jax as fv
    >>> @fv.fixed_point
    ... def iterate(fun, x0):
    ...     return jax.lax.fori_loop(0, 100, lambda _, x: fun(x), x0)
    >>> def kepler(eccentricity):  # E = M + e sin E
    ...     return iterate(lambda angle: 1.0 + eccentricity * jnp.sin(angle), 1.0)
    >>> print(f"{kepler(0.1):.4f} {jax.grad(kepler)(0.1):.4f}")  # sin E / (1 - e cos E)
    1.0886 0.9291
    """
    return _decorate(solver, "fixed_point", options)
