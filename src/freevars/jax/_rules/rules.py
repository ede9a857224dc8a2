"""Decorators that give any solver derivatives, from the condition that its result satisfies.

Not here: the decorated solver (`solver`), the mathematics (`implicit`), how the linear system is
solved (`linear`), and when a result counts (`diagnostics`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, Unpack, overload

from freevars._solvers.options import check_options
from freevars._solvers.stated import States, check_condition, kind_of
from freevars.jax._rules.solver import ImplicitSolver, Options

__all__ = ["Options", "argmin", "fixed_point", "implicit", "least_squares", "root"]

P = ParamSpec("P")
R = TypeVar("R")


class Decorator(Protocol):
    """Gives a solver a rule."""

    def __call__(self, solver: Callable[P, R], /) -> ImplicitSolver[P, R]:
        """The solver with derivatives."""


def _decorate(solver: Callable[..., Any] | None, states: States, options: Options) -> Any:
    check_options(kind_of(states), options, Options)

    def decorate(solver: Callable[P, R], /) -> ImplicitSolver[P, R]:
        return ImplicitSolver(solver, states, **options)

    return decorate if solver is None else decorate(solver)


def implicit(
    condition: Callable[..., Any],
    /,
    *,
    argument: Callable[[Any], Any] | None = None,
    **options: Unpack[Options],
) -> Decorator:
    """Derivatives for a solver whose result x satisfies `condition(fun, x) = 0`.

    The decorator on which `root`, `argmin`, `fixed_point` and `least_squares` stand. Everything
    else is as for `root`.

    Args:
        condition: `condition(fun, x)` returns floating or complex arrays in any structure, as many
            numbers as x has. `fun` is the function that the solver was given, with its extra
            arguments; the condition may use its derivatives, other functions beside it, or other
            functions only. Derivatives flow into everything that it captures.
        argument: what `fun` takes, as a function of x; None: x itself.
        **options: as for `root`.

    Returns:
        A decorator for `solver(fun, x0, ...)`.

    Raises:
        freevars.errors.FreevarsError: as for `root`.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax as fv
        >>> def eigenpair(matvec, x):
        ...     return matvec(x["v"]) - x["l"] * x["v"], x["v"] @ x["v"] - 1
        >>> @fv.implicit(eigenpair, argument=lambda x: x["v"])
        ... def largest(matvec, x0):
        ...     step = lambda _, v: matvec(v) / jnp.linalg.norm(matvec(v))
        ...     v = jax.lax.fori_loop(0, 100, step, x0["v"])
        ...     return {"v": v, "l": v @ matvec(v)}
        >>> x0 = {"v": jnp.array([0.6, 0.8]), "l": jnp.array(0.0)}
        >>> a = jnp.diag(jnp.array([1.0, 3.0]))
        >>> slope = jax.grad(lambda a: largest(lambda v: a @ v, x0)["l"])(a)
        >>> print(jnp.abs(slope).round(3))
        [[0. 0.]
         [0. 1.]]
    """
    check_condition(condition, argument)
    decorator: Decorator = _decorate(None, (condition, argument), options)
    return decorator


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
            `dense_limit` unknowns, beyond that BiCGStab(2) (conjugate gradients for `argmin`; for
            `fixed_point` the iteration of its own system first, while it contracts quickly) until
            |r| <= eps^(3/4) |b|, and the matrix or least squares where these stand still.
        preconditioner: for None: a function that takes the operator and returns a linear function
            of v that is about A^-1 v, symmetric and definite for `argmin`. With it nothing is
            factorised.
        dense_limit: see linear_solve. 0 never factorises a system of more than one unknown at once.
        on_failure: what happens where the derivative cannot be trusted. That is: the solver did not
            converge (a Newton step from its result would move a component by more than 1% of its
            size, 1.9% in float32; or by more than the fourth root of the dtype's spacing, at most
            0.1%, while the derivative changes by more than 2% along that step),
            something is not finite, the system is singular (reciprocal condition number below 10
            eps, in units of the unknowns and of the equations), or it was not solved (residual
            above the fourth root of the spacing, relative). "raise": an error where values are
            known; NaN inside `jit` and `vmap`, and in a backward pass where an iterative linear
            solver stopped short. "warn": NaN always, and a warning that says why, from inside `jit`
            too. "nan": NaN always. "least_squares": the shortest solution of a singular system, if
            it has one, else as "raise".
        check: False leaves all of that out.
        tol: the largest Newton step, relative to each component, that counts as converged, whatever
            the derivative does along it. None: see `on_failure`.
        polish: True adds a Newton step to x before it is returned or differentiated, unless a
            second one would be no shorter.
        conserved: `conserved(x)`, an array or pytree of totals of x that the solver keeps as they
            are in x0. They complete equations that repeat each other, and derivatives flow into x0.
            What it captures has derivatives too; a number that it states is a constant, so capture
            what the totals turn with.
        jit: False runs the solver as it is, for one that cannot be traced; it then needs known
            values.
        one_sided: of `argmin` and `least_squares` with constraints. True: where a constraint is
            reached with a multiplier of zero, the derivative is the one that keeps it active.

    Raises:
        freevars.errors.NotASolutionError: see `on_failure`.
        freevars.errors.SingularError: the same.
        freevars.errors.StructureError: the solver returns another structure, shape or dtype than
            `x0`.
        TypeError: an unknown is neither floating nor complex, or there is not one equation for
            each.

    References:
        The implicit function theorem; Blondel et al. 2022, "Efficient and Modular Implicit
        Differentiation".

    Example:
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

    A minimum, a maximum or a saddle of a real function of shape (): x has to be where the gradient
    vanishes, and the second derivative there has to be regular. Everything else is as for `root`.

    Constraints are what a call gives for parameters of the solver with these names; derivatives
    flow into them and into what they capture:

    - `bounds`: a pair (lower, upper), each like x0, a number, or None for no bound.
    - `equality`: a function with c(x) = 0, `inequality`: one with g(x) >= 0, as in scipy. They
      reach the solver as closures, one on the host as NumPy functions with `jacobian`.

    Then x is a root of the Karush-Kuhn-Tucker system of the constraints that are active at x, for
    multipliers that the system determines. It is refused where x violates a constraint, a
    multiplier has the wrong sign, the gradients of the active constraints depend on each other, or
    a constraint is reached with a multiplier of zero (see `one_sided`).

    Args:
        solver: `solver(fun, x0, ...)`, as for `root`.
        **options: as for `root`.

    Raises:
        freevars.errors.FreevarsError: as for `root`.
        NotImplementedError: a constraint sends values along a named axis (`psum`, say): outside of
            `shard_map` an array that is spread over devices is one unknown.

    References:
        Fiacco 1983, "Introduction to Sensitivity and Stability Analysis in Nonlinear Programming",
        chapter 3.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax as fv
        >>> @fv.argmin
        ... def descend(fun, x0, steps=200):
        ...     return jax.lax.fori_loop(0, steps, lambda _, x: x - 0.3 * jax.grad(fun)(x), x0)
        >>> data = jnp.array([1.0, 2.0, 6.0])
        >>> def center(penalty):
        ...     return descend(lambda m: jnp.mean((data - m) ** 2) + penalty * m**2, 0.0)
        >>> print(f"{center(0.5):.3f} {jax.grad(center)(0.5):.3f}")  # 3 / (1 + p), -3 / (1 + p)^2
        2.000 -1.333

        >>> @fv.argmin
        ... def project(fun, x0, *, bounds):
        ...     step = lambda _, x: jnp.clip(x - 0.3 * jax.grad(fun)(x), *bounds)
        ...     return jax.lax.fori_loop(0, 100, step, x0)
        >>> def nearest(cap):
        ...     return project(lambda x: jnp.sum((x - data) ** 2), jnp.zeros(3), bounds=(0.0, cap))
        >>> print(nearest(3.0), jax.jacobian(nearest)(3.0))
        [1. 2. 3.] [0. 0. 1.]
    """
    return _decorate(solver, "argmin", options)


@overload
def fixed_point(solver: Callable[P, R], /, **options: Unpack[Options]) -> ImplicitSolver[P, R]: ...
@overload
def fixed_point(**options: Unpack[Options]) -> Decorator: ...
def fixed_point(solver: Callable[..., Any] | None = None, /, **options: Unpack[Options]) -> Any:
    """Derivatives for a solver whose result x satisfies `fun(x, *args, **kwargs) = x`.

    `fun` returns the structure and shapes of x. Everything else is as for `root`.

    Args:
        solver: `solver(fun, x0, ...)`, as for `root`.
        **options: as for `root`.

    Raises:
        freevars.errors.FreevarsError: as for `root`.

    Example:
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


@overload
def least_squares(
    solver: Callable[P, R], /, **options: Unpack[Options]
) -> ImplicitSolver[P, R]: ...
@overload
def least_squares(**options: Unpack[Options]) -> Decorator: ...
def least_squares(solver: Callable[..., Any] | None = None, /, **options: Unpack[Options]) -> Any:
    """Derivatives for a solver whose result x makes `|fun(x, *args, **kwargs)|^2` least.

    `fun` returns the residuals r, floating or complex arrays in any structure; x makes J^T r = 0
    for their Jacobian J. The system of the derivative is the whole second derivative, J^T J and
    what the curvature of r adds to it: exact where residuals remain. With `has_aux=True`, a pair
    that `fun` returns is `(residuals, aux)`. Everything else is as for `root`; the constraints
    are those of `argmin`.

    Args:
        solver: `solver(fun, x0, ...)`, as for `root`.
        **options: as for `root`.

    Raises:
        freevars.errors.FreevarsError: as for `root`.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax as fv
        >>> @fv.least_squares
        ... def gauss_newton(fun, x0):
        ...     step = lambda _, x: x - jnp.linalg.pinv(jax.jacobian(fun)(x)) @ fun(x)
        ...     return jax.lax.fori_loop(0, 5, step, x0)
        >>> t = jnp.array([0.0, 1.0, 2.0])
        >>> def slope(y):
        ...     return gauss_newton(lambda x: x[0] + x[1] * t - y, jnp.zeros(2))[1]
        >>> print(jax.grad(slope)(jnp.array([1.0, 2.0, 4.0])).round(3) + 0.0)
        [-0.5  0.   0.5]
    """
    return _decorate(solver, "least_squares", options)
