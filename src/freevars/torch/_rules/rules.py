"""Derivative rules for any solver: `argmin`, `root`, `fixed_point`.

    @argmin
    def minimize(objective, x0): ...          # torch.optim, scipy, by hand: anything

The decorated solver converts the function it is given, runs the solver on tensors without
history, and attaches the implicit function theorem (`implicit.py`) at the solution. Not here:
one call of a solver as a problem (`problem.py`), linear systems (`linear.py`).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

from torch import Tensor

from freevars.errors import StructureError
from freevars.torch import _compat
from freevars.torch._compat import pytree
from freevars.torch._convert.convert import closure_convert
from freevars.torch._describe import function_name
from freevars.torch._rules.implicit import implicit
from freevars.torch._rules.linear import LinearSolve
from freevars.torch._rules.problem import Kind, OnFailure, Problem, Rule
from freevars.torch._rules.ravel import Flat

__all__ = ["argmin", "fixed_point", "root"]

Solver = Callable[..., Any]


class ImplicitSolver:
    """A solver with a derivative rule; made by `argmin`, `root` and `fixed_point`."""

    def __init__(self, kind: Kind, solver: Solver, options: "Options") -> None:
        functools.update_wrapper(self, solver, updated=())
        unknown = set(options) - set(Options.__annotations__)
        if unknown:
            known = ", ".join(Options.__annotations__)
            message = f"{kind}: expected the options {known}, got {', '.join(sorted(unknown))}."
            raise TypeError(message)
        self._rule = Rule(kind, solver, function_name(solver), **options)
        self._signature = inspect.signature(solver)
        if len(self._signature.parameters) < len(("fun", "x0")):
            got = f"{function_name(solver)}{self._signature}"
            message = f"expected a solver that takes (fun, x0, ...), got {got}."
            raise StructureError(message)

    def __repr__(self) -> str:
        return f"<{self._rule.name} with the derivative rule of {self._rule.kind}>"

    def __call__(self, fun: Callable[..., Any], x0: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._eagerly if _compat.compiling() else self._call
        return call(fun, x0, *args, **kwargs)

    @_compat.eagerly  # type: ignore[untyped-decorator]
    def _eagerly(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def _call(self, fun: Callable[..., Any], x0: Any, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(fun, x0, *args, **kwargs)
        fun_args, fun_kwargs, options = _sort_arguments(bound)

        @functools.wraps(fun, updated=())
        def extended(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return fun(x, *args, **kwargs)

        flat = Flat(x0)
        converted, hoisted = closure_convert(extended, x0, fun_args, fun_kwargs)
        problem = Problem(self._rule, converted, flat, bound, (fun_args, fun_kwargs), options)
        leaves = pytree.tree_leaves(((fun_args, fun_kwargs), options))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        v, *aux = implicit(problem, flat.ravel(x0, "x0").detach(), *given, *hoisted)
        x = flat.unravel(v)
        return (x, problem.with_aux(aux)) if self._rule.has_aux else x


def _sort_arguments(
    bound: inspect.BoundArguments,
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """The extra arguments of `fun`, and the solver's own options.

    What a solver collects in `*args` and `**kwargs`, or takes as a tuple named `args` as scipy's
    do, it passes on to `fun`; what it names is its own.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[2:]:
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            kwargs = dict(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL or name == "args":
            args = tuple(value) if isinstance(value, tuple | list) else (value,)
        else:
            options[name] = value
    return args, kwargs, options


class Options(TypedDict, total=False):
    """The keyword arguments of `argmin`, `root` and `fixed_point`; see `argmin`."""

    has_aux: bool  # False
    linear_solve: LinearSolve | None  # None
    on_failure: OnFailure  # "raise"
    check: bool  # True


def _decorator(kind: Kind, solver: Solver | None, options: Options) -> Any:
    if solver is None:
        return lambda solver: ImplicitSolver(kind, solver, options)
    return ImplicitSolver(kind, solver, options)


def argmin(solver: Solver | None = None, /, **options: Unpack[Options]) -> Any:
    """Attaches the derivative of a minimiser `x = argmin fun(x, *args)` to a solver.

    The decorated solver is called as before and returns what it returned before, now a
    differentiable function of everything that `fun` captures and of the extra arguments that the
    solver passes on to `fun`: what its signature collects in `*args` and `**kwargs`, or a tuple
    named `args`. To any order, in reverse and forward mode, under every torch.func transform.
    Everything else in its signature is an option of its own and gets no derivative, and neither
    does `x0`. What the solver itself captures gets none either: the solution does not depend on how
    it was found.

    The solver sees tensors without history, so its own use of autograd touches no `.grad` of the
    caller. The `.grad` of a tensor that the solver can reach itself, by an optimizer that it holds,
    say, is None when it starts and afterwards what it was.

    Args:
        solver: `solver(fun, x0, ...)` takes any pytree of real or complex tensors and returns `x`
            of the structure of `x0`. It may leave PyTorch. `torch.func.vmap` runs it once for
            each element.
        has_aux: the solver returns `(x, aux)`, and `fun` returns `(value, aux)`; aux has no
            derivative. Under `torch.func.vmap`, what is no tensor in it must be the same for all
            elements.
        linear_solve: a callable `solve(matvec, b)` on real vectors (a complex unknown counts as
            two) for the systems of the derivative. By default a factorisation up to 100 unknowns;
            beyond, conjugate gradients for `argmin`, GMRES else.
        on_failure: what happens where a derivative is taken that cannot be trusted: the solver
            did not converge (a Newton step from its result would move it by more than the fourth
            root of the dtype's spacing, relative to the norm of x, absolute below 1), the result
            is not finite, or the system is singular (reciprocal condition number below 10 n eps).
            "raise": an error. "nan": a derivative of NaN. "least_squares": the shortest solution
            of a singular system of up to 100 unknowns, and as "raise" for the rest.
        check: False leaves all of that out: a singular system gives what its factorisation gives,
            which is not finite, or what `linear_solve` does. The check costs one more right-hand
            side, and the inverse of a small matrix.

    Raises:
        NotASolutionError, SingularError: see `on_failure`; where the derivative is taken.
        StructureError: the solver or `fun` returned another structure than expected.
        CaptureError: as `closure_convert` does.

    The mathematics: the implicit function theorem; Blondel et al. 2022, "Efficient and Modular
    Implicit Differentiation".

    Example:
        >>> import torch
        >>> import freevars.torch as fv
        >>> @fv.argmin
        ... def minimize(fun, x0):
        ...     return x0 - torch.func.grad(fun)(x0) / 2  # a Newton step
        >>> a = torch.tensor(3.0, requires_grad=True)
        >>> x = minimize(lambda x: (x - a) ** 2, torch.tensor(0.0))
        >>> torch.autograd.grad(x, a)
        (tensor(1.),)
    """
    return _decorator("argmin", solver, options)


def root(solver: Solver | None = None, /, **options: Unpack[Options]) -> Any:
    """Attaches the derivative of a root, `fun(x, *args) = 0`, to a solver; else as `argmin`.

    `fun` returns the structure of `x`.

    Example:
        >>> import torch
        >>> import freevars.torch as fv
        >>> @fv.root
        ... def newton(fun, x0):
        ...     for _ in range(20):
        ...         x0 = x0 - fun(x0) / torch.func.grad(fun)(x0)
        ...     return x0
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> torch.autograd.grad(newton(lambda x: x**2 - a, torch.tensor(1.0)), a)
        (tensor(0.2500),)
    """
    return _decorator("root", solver, options)


def fixed_point(solver: Solver | None = None, /, **options: Unpack[Options]) -> Any:
    """Attaches the derivative of a fixed point, `x = fun(x, *args)`, to a solver; else as `argmin`.

    Example:
        >>> import torch
        >>> import freevars.torch as fv
        >>> @fv.fixed_point
        ... def iterate(fun, x0):
        ...     for _ in range(60):
        ...         x0 = fun(x0)
        ...     return x0
        >>> a = torch.tensor(3.0, requires_grad=True)
        >>> torch.autograd.grad(iterate(lambda x: x / 2 + a, torch.tensor(0.0)), a)
        (tensor(2.),)
    """
    return _decorator("fixed_point", solver, options)
