"""Decorators that give solvers of integrals and of differential equations derivatives.

Not here: the decorated solvers and the mathematics (`integral`, `odeint`, `adjoint`).
"""

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, Unpack, overload

from freevars._solvers.integration import IntegralOptions, OdeOptions
from freevars._solvers.options import check_options
from freevars.torch._rules.integral import IntegralSolver
from freevars.torch._rules.odeint import OdeintSolver

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
def integral(**options: Unpack[IntegralOptions]) -> "IntegralDecorator": ...
def integral(
    solver: Callable[..., Any] | None = None, /, **options: Unpack[IntegralOptions]
) -> Any:
    """Derivatives for a solver that computes the integral of a function from a to b.

    The decorated solver is called as before, `solver(integrand, a, b, ...)`, and returns what it
    returned before. Derivatives, forward and reverse, of any order and under every torch.func
    transform, flow into every tensor that the integrand captures, into the extra arguments that the
    solver passes on to it (what its signature collects in `*args` and `**kwargs`, or a tuple named
    `args`), and into the limits. They are integrals too, by the same solver: it has to be as good
    for the derivative of the integrand as for the integrand. What the solver itself reads, its
    options included, has no derivative, and one that is asked for is refused. A backward pass runs
    the integrand again, and refuses one that has changed since the call. All evaluations in one
    call draw the same random numbers.

    Args:
        solver: `solver(integrand, a, b, ...)`, which may leave PyTorch. `integrand(t)` takes a real
            number or tensor of shape () and returns a tensor or a pytree of tensors, real or
            complex; the integral has that structure. The limits reach the solver as tensors of
            shape (), in the default dtype where they are numbers; an infinite number stays one, and
            has derivative zero.
        has_aux: the solver returns `(integral, aux)`; aux has no derivative.
        takes: what the solver can integrate. A backward pass integrates tensors like everything
            that is differentiated by: "pytree": at once, as a tuple; "array": at once, as a vector
            of real numbers; "scalar": number by number, one after the other. None: what the call
            shows, "scalar" if its integrand returns a number, "array" if a tensor, "pytree" if
            something else.
        on_failure: what happens where a derivative cannot be trusted: its integrals over both
            halves differ from that over the whole by more than 1% of its size (1.9% in float32).
            "raise": an error. "warn": NaN, and a warning that says why.
            "nan": NaN.
        check: False leaves that out, which costs two more integrals for a derivative: in reverse
            mode of one number.
        tol: the difference that is accepted, relative. None: see `on_failure`. A rule that draws
            its points at random needs more.

    Raises:
        freevars.errors.NotASolutionError: see `on_failure`; or the function has changed since.
        freevars.errors.CaptureError: as for `closure_convert`; or a derivative is asked for by what
            the solver reads itself.
        freevars.errors.StructureError: the solver returns another structure or shape than the
            integrand does, or asks for a point of a wider dtype than the limits have, or a limit is
            not a real number.

    References:
        Leibniz' rule for the derivative of an integral.

    Example:
        >>> import torch, freevars.torch as fv
        >>> @fv.integral
        ... def midpoint(f, a, b, n=1000):
        ...     t = a + (b - a) * (torch.arange(n) + 0.5) / n
        ...     return (b - a) * torch.func.vmap(f)(t).mean()
        >>> p, b = (torch.tensor(x, requires_grad=True) for x in (2.0, 1.0))
        >>> grads = torch.autograd.grad(midpoint(lambda t: t**p, 0.0, b), (p, b))
        >>> [f"{float(g):.3f}" for g in grads]  # of b^(p+1) / (p+1): -1/9, 1
        ['-0.111', '1.000']
    """
    check_options("integral", options, IntegralOptions)

    def decorate(solver: Callable[P, R], /) -> IntegralSolver[P, R]:
        return IntegralSolver(solver, **options)

    return decorate if solver is None else decorate(solver)


@overload
def odeint(solver: Callable[P, R], /, **options: Unpack[OdeOptions]) -> OdeintSolver[P, R]: ...
@overload
def odeint(**options: Unpack[OdeOptions]) -> "OdeDecorator": ...
def odeint(solver: Callable[..., Any] | None = None, /, **options: Unpack[OdeOptions]) -> Any:
    """Derivatives for a solver of an ordinary differential equation y' = field(t, y).

    The decorated solver is called as before, `solver(field, y0, ts, ...)`, and returns what it
    returned before: the states at the times `ts`, the first of which is y0. Derivatives, forward
    and reverse, of any order and under every torch.func transform, flow into every tensor that the
    field captures, into the extra arguments that the solver passes on to it (what its signature
    collects in `*args` and `**kwargs`, or a tuple named `args`), into `y0` and into `ts`. The same
    solver solves for them: forward sensitivities in forward mode, the adjoint equation backwards in
    reverse mode. What the solver itself reads, its options included, has no derivative, and one
    that is asked for is refused. A batch (`torch.func.vmap`) is solved one member after the other.
    A backward pass runs the field again, and refuses one that has changed since the call. All
    evaluations in one call draw the same random numbers.

    Args:
        solver: `solver(field, y0, ts, ...)`, which may leave PyTorch. `y0` is a pytree of real or
            complex tensors; `ts` is a vector of times that increase or decrease, of one or more,
            which may repeat each other as far as the solver takes that. It returns a pytree like
            y0, each tensor with a leading axis over `ts`.
        tfirst: True: the solver calls `field(t, y)`, as torchdiffeq and scipy's `solve_ivp` do;
            False: `field(y, t)`.
        has_aux: the solver returns `(ys, aux)`; aux has no derivative.
        takes: the states that the solver is given for a derivative, which are larger: "array": a
            vector of real numbers; "pytree": a tuple of tensors. None: as y0, a tensor or a pytree.
        reverse: "adjoint": a backward pass costs about two solves, however much the field captures;
            y is solved for backwards, anew from each time in `ts`. "sensitivities": it solves
            forwards for the derivative by every number that is differentiated by, at once: for
            equations that are unstable backwards (stiff or dissipative ones) and few such numbers.
        on_failure: what happens where a derivative cannot be trusted: y, solved for once more along
            with it, is not what the solver returned, by more than 1% of a component's largest size
            (1.9% in float32). "raise": an error. "warn": NaN, and a warning that says why. "nan":
            NaN.
        check: False leaves that out.
        tol: the difference that is accepted, relative. None: see `on_failure`.

    Raises:
        freevars.errors.NotASolutionError: see `on_failure`; or the function has changed since.
        freevars.errors.CaptureError: as for `closure_convert`; or a derivative is asked for by what
            the solver reads itself.
        freevars.errors.StructureError: the field returns another structure or shape than y0, the
            solver one that is not like y0 with an axis over `ts`, or calls the field in the other
            order than `tfirst` says.

    References:
        Pontryagin et al. 1962, "The Mathematical Theory of Optimal Processes"; Chen et al. 2018,
        "Neural Ordinary Differential Equations".

    Example:
        >>> import torch, freevars.torch as fv
        >>> @fv.odeint
        ... def heun(field, y0, ts, steps=100):
        ...     ys = [y0]
        ...     for t, h in zip(ts[:-1], ts.diff() / steps):
        ...         y = ys[-1]
        ...         for k in range(steps):
        ...             slope = field(t + k * h, y)
        ...             y = y + h / 2 * (slope + field(t + (k + 1) * h, y + h * slope))
        ...         ys.append(y)
        ...     return torch.stack(ys)
        >>> rate = torch.tensor(1.0, requires_grad=True)
        >>> ys = heun(lambda t, y: -rate * y, torch.tensor(2.0), torch.tensor([0.0, 1.0]))
        >>> grad = torch.autograd.grad(ys[-1], rate)[0]
        >>> f"{float(ys[-1].detach()):.3f} {float(grad):.3f}"  # 2 exp(-rate), -2 exp(-rate)
        '0.736 -0.736'
    """
    check_options("odeint", options, OdeOptions)

    def decorate(solver: Callable[P, R], /) -> OdeintSolver[P, R]:
        return OdeintSolver(solver, **options)

    return decorate if solver is None else decorate(solver)
