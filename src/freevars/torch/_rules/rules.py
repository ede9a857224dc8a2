"""Derivative rules for any solver: `argmin`, `root`, `fixed_point`, `least_squares`, `implicit`.

    @argmin
    def minimize(objective, x0): ...          # torch.optim, scipy, by hand: anything

Not here: what a decorated solver does (`solver.py`), linear systems (`linear.py`).
"""

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, Unpack, overload

from freevars._solvers.options import check_options
from freevars._solvers.stated import States, check_condition, kind_of
from freevars.torch._rules.solver import ImplicitSolver, Options

__all__ = ["ImplicitSolver", "argmin", "fixed_point", "implicit", "least_squares", "root"]

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
        condition: `condition(fun, x)` returns real or complex tensors in any structure, as many
            numbers as x has. `fun` is the function that the solver was given, with its extra
            arguments; the condition may use its derivatives, other functions beside it, or other
            functions only. Derivatives flow into everything that it reads.
        argument: what `fun` takes, as a function of x; None: x itself.
        **options: as for `root`.

    Returns:
        A decorator for `solver(fun, x0, ...)`.

    Raises:
        freevars.errors.FreevarsError: as for `root`.

    Example:
        >>> import torch, freevars.torch as fv
        >>> def eigenpair(matvec, x):
        ...     return matvec(x["v"]) - x["l"] * x["v"], x["v"] @ x["v"] - 1
        >>> @fv.implicit(eigenpair, argument=lambda x: x["v"])
        ... def largest(matvec, x0):
        ...     v = x0["v"]
        ...     for _ in range(100):
        ...         v = matvec(v) / torch.linalg.vector_norm(matvec(v))
        ...     return {"v": v, "l": v @ matvec(v)}
        >>> a = torch.diag(torch.tensor([1.0, 3.0])).requires_grad_()
        >>> x0 = {"v": torch.tensor([0.6, 0.8]), "l": torch.tensor(0.0)}
        >>> torch.autograd.grad(largest(lambda v: a @ v, x0)["l"], a)[0].round(decimals=3).abs()
        tensor([[0., 0.],
                [0., 1.]])
    """
    check_condition(condition, argument)
    decorator: Decorator = _decorate(None, (condition, argument), options)
    return decorator


@overload
def argmin(solver: Callable[P, R], /, **options: Unpack[Options]) -> ImplicitSolver[P, R]: ...
@overload
def argmin(**options: Unpack[Options]) -> Decorator: ...
def argmin(solver: Callable[..., Any] | None = None, /, **options: Unpack[Options]) -> Any:
    """Derivatives for a solver whose result x satisfies `grad(fun)(x, *args, **kwargs) = 0`.

    A minimum, a maximum or a saddle of a real function of shape (): x has to be where the gradient
    vanishes, and the second derivative there has to be regular. With `batch_dims`, `fun` returns
    one number for each problem. Everything else is as for `root`.

    Constraints are what a call gives for parameters of the solver with these names; derivatives
    flow into them and into what they capture:

    - `bounds`: a pair (lower, upper), each like x0, a number, or None for no bound.
    - `equality`: a function with c(x) = 0, `inequality`: one with g(x) >= 0, as in scipy; with
      `batch_dims`, the axes of the problems come first.

    Then x is a root of the Karush-Kuhn-Tucker system of the constraints that are active at x, for
    multipliers that the system determines. It is refused where x violates a constraint, a
    multiplier has the wrong sign, the gradients of the active constraints depend on each other, or
    a constraint is reached with a multiplier of zero (see `one_sided`).

    Args:
        solver: `solver(fun, x0, ...)`, as for `root`.
        **options: as for `root`.

    Raises:
        freevars.errors.FreevarsError: as for `root`.

    References:
        For constraints: Fiacco 1983, "Introduction to Sensitivity and Stability Analysis in
        Nonlinear Programming", chapter 3.

    Example:
        >>> import torch, freevars.torch as fv
        >>> @fv.argmin
        ... def minimize(fun, x0):
        ...     return x0 - torch.func.grad(fun)(x0) / 2  # a Newton step
        >>> a = torch.tensor(3.0, requires_grad=True)
        >>> x = minimize(lambda x: (x - a) ** 2, torch.tensor(0.0))
        >>> torch.autograd.grad(x, a)
        (tensor(1.),)
    """
    return _decorate(solver, "argmin", options)


@overload
def root(solver: Callable[P, R], /, **options: Unpack[Options]) -> ImplicitSolver[P, R]: ...
@overload
def root(**options: Unpack[Options]) -> Decorator: ...
def root(solver: Callable[..., Any] | None = None, /, **options: Unpack[Options]) -> Any:
    """Derivatives for a solver whose result x satisfies `fun(x, *args, **kwargs) = 0`.

    The decorated solver is called as before, `solver(fun, x0, ...)`, and returns what it returned
    before. Derivatives, forward and reverse, of any order and under every torch.func transform,
    flow into every tensor that `fun` captures and into the extra arguments that the solver passes
    on to `fun`: what its signature collects in `*args` and `**kwargs`, or a tuple named `args`.
    Everything else in its signature is an option of its own; options, `x0`, what the solver itself
    captures and what the object of a method holds get no derivative, unless `fun` reads them: a
    solution does not depend on how it was found. Where a derivative by any of these is asked for
    and the result is no solution, an error names it.

    At the solution `fun` runs once more, as it is, with a graph. A first derivative in PyTorch's
    own reverse mode takes vector-Jacobian products of that graph and sends the result into it:
    `fun` never runs again, so that loop variables, attributes, modes (autocast, `eval()`) and
    random numbers are those of the call, under `torch.func.vmap` as well. Higher orders, forward
    mode and the derivatives of torch.func evaluate it again, under the autocast of the call, and
    compare the result with what was recorded, bit for bit.

    The solver sees tensors without history, so its own use of autograd touches no `.grad` of the
    caller. The `.grad` of a tensor that the solver can reach itself, by an optimizer that it holds,
    say, is None when it starts and afterwards what it was.

    Args:
        solver: `solver(fun, x0, ...)` takes any pytree of real or complex tensors and returns `x`
            of the structure of `x0`. It may leave PyTorch. `torch.func.vmap` runs it once for a
            whole batch where it can, else once for each element.
        has_aux: the solver returns `(x, aux)`, and `fun` may return `(value, aux)`; aux has no
            derivative. Under `torch.func.vmap`, what is no tensor in it must be the same for all
            elements.
        linear_solve: a callable `solve(operator, b)` on real vectors (a complex unknown counts as
            two) for the systems of the derivative. `operator(u)` is their product; it also has
            `matvec`, `rmatvec`, `as_matrix()`, `diagonal()`, `symmetric` and `structure`. By
            default a factorisation up to 512 unknowns; beyond, conjugate gradients for `argmin`
            and else Richardson's iteration where it contracts quickly, or GMRES, to a residual of
            eps^(3/4) relative to the norm of `b`, in units of the tensors of `x` where these are
            far apart, and a factorisation where that stalls, up to 5,000 unknowns.
        on_failure: what happens where a derivative is taken that cannot be trusted: the solver did
            not converge (see `tol`), the result is not finite, or the system is singular (its
            reciprocal condition number, in units of the unknowns and equations, is below 10 eps).
            "raise": an error. "nan": a derivative of NaN. "least_squares": the shortest solution of
            a singular system of up to 512 unknowns, where it has one and what it leaves open is a
            gauge (a shift), and as "raise" for the rest. Problems of a batch that the derivative
            does not depend on are not checked.
        check: False leaves all of that out: a singular system gives what its factorisation gives,
            which is not finite, or what `linear_solve` does.
        tol: how far the result may be from a solution: a Newton step may change no term of an
            equation by more than `tol` of the sum of the equation's terms, relative to how large
            the unknowns are; one that is zero but for errors, to how far the solver moved it.
            None: 1% (1.9% in float32) where neither the system nor the derivative changes by more
            than 2% along the step, which is asked of what was recorded. Nothing is asked below the
            root of the dtype's spacing (1.5e-8; 3.5e-4 in float32); where it cannot be known, the
            fourth root is accepted, 1.2e-4, and 1e-3 in float32. Beyond 512 unknowns the step
            is measured by its largest component, against each tensor of the unknown as a whole;
            it is estimated where it is negligible, or `fun` cannot be differentiated twice.
        polish: True adds a Newton step to what the solver returns, unless a second one would be no
            shorter.
        conserved: `conserved(x)` returns real tensors that the solver keeps as they are in `x0`
            (the amounts of the elements in a reaction), where the equations alone do not determine
            `x`. Then `x0` has a derivative too, and so has what `conserved` reads; a number that it
            states, or a detached tensor, is a constant. Writes out a matrix.
        batch_dims: how many axes in front of each tensor of `x0` count independent problems. The
            system is then one of small blocks, from as many products as one problem has unknowns.
            `fun` of `argmin` returns one number for each problem.
        rng: "replay" gives every evaluation of `fun` in one solve the same random numbers, so that
            dropout draws one mask for each solve; "allow" draws afresh in each; "error" refuses.
        one_sided: of `argmin` and `least_squares` with constraints. True: where a constraint is
            reached with a multiplier of zero, the derivative is the one that keeps it active.

    Raises:
        freevars.errors.NotASolutionError: see `on_failure`; raised where the derivative is taken.
        freevars.errors.SingularError: the same.
        freevars.errors.StructureError: the solver returns another structure than `x0` has, or `fun`
            another than one equation for each unknown.
        freevars.errors.CaptureError: as for `closure_convert`.

    References:
        The implicit function theorem; Blondel et al. 2022, "Efficient and Modular Implicit
        Differentiation".

    Example:
        >>> import torch, freevars.torch as fv
        >>> @fv.root
        ... def newton(fun, x0):
        ...     for _ in range(20):
        ...         x0 = x0 - fun(x0) / torch.func.grad(fun)(x0)
        ...     return x0
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> torch.autograd.grad(newton(lambda x: x**2 - a, torch.tensor(1.0)), a)
        (tensor(0.2500),)
    """
    return _decorate(solver, "root", options)


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
        >>> import torch, freevars.torch as fv
        >>> @fv.fixed_point
        ... def iterate(fun, x0):
        ...     for _ in range(60):
        ...         x0 = fun(x0)
        ...     return x0
        >>> a = torch.tensor(3.0, requires_grad=True)
        >>> torch.autograd.grad(iterate(lambda x: x / 2 + a, torch.tensor(0.0)), a)
        (tensor(2.),)
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

    `fun` returns the residuals r, real or complex tensors in any structure; x makes J^T r = 0 for
    their Jacobian J. The system of the derivative is the whole second derivative, J^T J and what
    the curvature of r adds to it: exact where residuals remain. With `has_aux=True`, a pair that
    `fun` returns is `(residuals, aux)`. Everything else is as for `root`; the constraints are those
    of `argmin`.

    Args:
        solver: `solver(fun, x0, ...)`, as for `root`.
        **options: as for `root`.

    Raises:
        freevars.errors.FreevarsError: as for `root`.

    Example:
        >>> import torch, freevars.torch as fv
        >>> @fv.least_squares
        ... def gauss_newton(fun, x0):
        ...     for _ in range(10):
        ...         x0 = x0 - torch.linalg.pinv(torch.func.jacrev(fun)(x0)) @ fun(x0)
        ...     return x0
        >>> t = torch.tensor([0.0, 1.0, 2.0])
        >>> y = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
        >>> slope = gauss_newton(lambda x: x[0] + x[1] * t - y, torch.zeros(2))[1]
        >>> torch.autograd.grad(slope, y)[0].round(decimals=3) + 0.0
        tensor([-0.5000,  0.0000,  0.5000])
    """
    return _decorate(solver, "least_squares", options)
