"""Decorators that give solvers of integrals and of differential equations derivatives.

Not here: the decorated solvers and the mathematics (`integral`, `odeint`, `adjoint`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, Unpack, overload

from freevars._solvers.integration import IntegralOptions, OdeOptions
from freevars._solvers.options import check_options
from freevars.jax._rules.integral import IntegralSolver
from freevars.jax._rules.odeint import OdeintSolver

__all__ = ["integral", "odeint"]

P = ParamSpec("P")
R = TypeVar("R")


class IntegralDecorator(Protocol):
    """Gives a solver a rule."""

    def __call__(self, solver: Callable[P, R], /) -> IntegralSolver[P, R]:
        """The solver with derivatives."""


class OdeDecorator(Protocol):
    """Gives a solver a rule."""

    def __call__(self, solver: Callable[P, R], /) -> OdeintSolver[P, R]:
        """The solver with derivatives."""


@overload
def integral(
    solver: Callable[P, R], /, **options: Unpack[IntegralOptions]
) -> IntegralSolver[P, R]: ...
@overload
def integral(**options: Unpack[IntegralOptions]) -> IntegralDecorator: ...
def integral(
    solver: Callable[..., Any] | None = None, /, **options: Unpack[IntegralOptions]
) -> Any:
    """Derivatives for a solver that computes the integral of a function from a to b.

    The decorated solver is called as before, `solver(integrand, a, b, ...)`, and returns what it
    returned before. Derivatives, forward and reverse and of any order, flow into every value that
    the integrand captures, into the extra arguments that the solver passes on to it (what its
    signature collects in `*args` and `**kwargs`, or a tuple named `args`), and into the limits.
    They are integrals too, by the same solver: it has to be as good for the derivative of the
    integrand as for the integrand. What the solver itself reads, its options included, has no
    derivative, and one that is asked for is refused.

    On the host (a solver under `on_host`) the integrand gives a float; where it is no real number,
    a vector of real numbers (a complex array as its real, then its imaginary parts). The solver
    returns the same.

    Args:
        solver: `solver(integrand, a, b, ...)` in JAX, pure, or one `on_host`. `integrand(t)` takes
            a real number of shape () and returns a number, an array or a pytree, floating or
            complex; the integral has that structure. The limits are real numbers; an infinite one
            has derivative zero, and reaches the solver as it was given.
        has_aux: the solver returns `(integral, aux)`; aux has derivative zero.
        takes: what the solver can integrate. A backward pass integrates a list of arrays like
            everything that is differentiated by: "pytree": at once, as a tuple; "array": at once,
            as a vector of real numbers; "scalar": number by number, in a batch (`jax.vmap`), so
            that a rule with fixed nodes evaluates the integrand once; on the host one after the
            other. None: what the call shows, "scalar" if its integrand returns a number, "array" if
            an array, "pytree" if something else.
        on_failure: what happens where a derivative cannot be trusted: its integrals over both
            halves differ from that over the whole by more than 1% of its size (1.9% in float32).
            "raise": an error where values are known, NaN inside `jit`
            and `vmap`. "warn": NaN, and a warning that says why, from inside `jit` too. "nan": NaN.
        check: False leaves that out, which costs two more integrals for a derivative: in reverse
            mode of one number.
        tol: the difference that is accepted, relative. None: see `on_failure`. A rule that draws
            its points at random needs more.

    Raises:
        freevars.errors.NotASolutionError: see `on_failure`.
        freevars.errors.CaptureError: a derivative is asked for by what the solver reads itself.
        freevars.errors.StructureError: the solver returns another structure or shape than the
            integrand does, or a limit is not a real number.

    References:
        Leibniz' rule for the derivative of an integral.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax as fv
        >>> @fv.integral
        ... def midpoint(f, a, b, n=1000):
        ...     t = a + (b - a) * (jnp.arange(n) + 0.5) / n
        ...     return (b - a) * jnp.mean(jax.vmap(f)(t))
        >>> power = lambda p, b: midpoint(lambda t: t**p, 0.0, b)  # b^(p+1) / (p+1)
        >>> print([f"{x:.3f}" for x in jax.grad(power, (0, 1))(2.0, 1.0)])  # -1/9, 1
        ['-0.111', '1.000']
    """
    check_options("integral", options, IntegralOptions)

    def decorate(solver: Callable[P, R], /) -> IntegralSolver[P, R]:
        return IntegralSolver(solver, **options)

    return decorate if solver is None else decorate(solver)


@overload
def odeint(solver: Callable[P, R], /, **options: Unpack[OdeOptions]) -> OdeintSolver[P, R]: ...
@overload
def odeint(**options: Unpack[OdeOptions]) -> OdeDecorator: ...
def odeint(solver: Callable[..., Any] | None = None, /, **options: Unpack[OdeOptions]) -> Any:
    """Derivatives for a solver of an ordinary differential equation y' = field(t, y).

    The decorated solver is called as before, `solver(field, y0, ts, ...)`, and returns what it
    returned before: the states at the times `ts`, the first of which is y0. Derivatives, forward
    and reverse and of any order, flow into every value that the field captures, into the extra
    arguments that the solver passes on to it (what its signature collects in `*args` and
    `**kwargs`, or a tuple named `args`), into `y0` and into `ts`. The same solver solves for them:
    forward sensitivities in forward mode, the adjoint equation backwards in reverse mode. What
    the solver itself reads, its options included, has no derivative, and one that is asked for is
    refused.

    On the host (a solver under `on_host`) y0 is a float64 vector of shape (n,) (a complex array as
    its real, then its imaginary parts), the solver returns an array of shape (times, n), and the
    field is a NumPy function with `field.jacobian(t, y)`, of shape (n, n), for methods that take
    it.

    Args:
        solver: `solver(field, y0, ts, ...)` in JAX, pure, or one `on_host`. `y0` is a pytree of
            floating or complex arrays; `ts` is a vector of times that increase or decrease, of one
            or more, which may repeat each other as far as the solver takes that. It returns a
            pytree like y0, each array with a leading axis over `ts`.
        tfirst: True: the solver calls `field(t, y)`, as scipy's `solve_ivp`, diffrax and
            torchdiffeq do; False: `field(y, t)`, as `jax.experimental.ode.odeint` does.
        has_aux: the solver returns `(ys, aux)`; aux has derivative zero.
        takes: the states that the solver is given for a derivative, which are larger: "array": a
            vector of real numbers; "pytree": a tuple of arrays. None: as y0, an array or a pytree.
        reverse: "adjoint": a backward pass costs about two solves, however much the field captures;
            y is solved for backwards, anew from each time in `ts`. "sensitivities": it solves
            forwards for the derivative by every number that is differentiated by, at once: for
            equations that are unstable backwards (stiff or dissipative ones) and few such numbers.
        on_failure: what happens where a derivative cannot be trusted: y, solved for once more along
            with it, is not what the solver returned, by more than 1% of a component's largest size
            (1.9% in float32). "raise": an error where values are known, NaN inside `jit` and
            `vmap`. "warn": NaN, and a warning that says why, from inside `jit` too. "nan": NaN.
        check: False leaves that out.
        tol: the difference that is accepted, relative. None: see `on_failure`.

    Raises:
        freevars.errors.NotASolutionError: see `on_failure`.
        freevars.errors.CaptureError: a derivative is asked for by what the solver reads itself.
        freevars.errors.StructureError: the field returns another structure or shape than y0, the
            solver one that is not like y0 with an axis over `ts`, or calls the field in the other
            order than `tfirst` says.
        NotImplementedError: a derivative with `reverse="sensitivities"` where the field sends
            values along a named axis (`psum`, say); the adjoint is right there.

    References:
        Pontryagin et al. 1962, "The Mathematical Theory of Optimal Processes"; Chen et al. 2018,
        "Neural Ordinary Differential Equations".

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax as fv
        >>> from jax.experimental import ode
        >>> solve = fv.odeint(ode.odeint, tfirst=False)
        >>> ts = jnp.array([0.0, 1.0])
        >>> end = lambda rate: solve(lambda y, t: -rate * y, 2.0, ts)[-1]  # 2 exp(-rate)
        >>> print(f"{end(1.0):.3f} {jax.grad(end)(1.0):.3f}")
        0.736 -0.736
    """
    check_options("odeint", options, OdeOptions)

    def decorate(solver: Callable[P, R], /) -> OdeintSolver[P, R]:
        return OdeintSolver(solver, **options)

    return decorate if solver is None else decorate(solver)
