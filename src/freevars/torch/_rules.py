"""Derivative rules for any solver: `argmin`, `root`, `fixed_point`.

    @argmin
    def minimize(objective, x0): ...          # torch.optim, scipy, by hand: anything

The decorated solver converts the function it is given, runs the solver on tensors without history, and
attaches the implicit function theorem (`_implicit.py`) at the solution. Not here: linear systems
(`_linear.py`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from freevars.errors import SolveError, StructureError
from freevars.torch._compat import pytree
from freevars.torch._convert import Converted, closure_convert
from freevars.torch._flat import Flat
from freevars.torch._implicit import implicit, vjp
from freevars.torch._linear import DIRECT_LIMIT, OnFailure, direct, solve_matrix_free
from freevars.torch._names import called
from freevars.torch._structure import Structure

__all__ = ["argmin", "fixed_point", "root"]

Solver = Callable[..., Any]
LinearSolve = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
Kind = Literal["argmin", "root", "fixed_point"]


class _Problem:
    """One call of a decorated solver: `residual(x, *values) = 0` over a flat real vector.

    The values are the tensors among the solver's arguments, then the hoisted values of `fun`. Those of
    its own options are constants.
    """

    def __init__(
        self, rule: "_Rule", converted: Converted, x: Flat, given: Sequence[Any], spec: Any, arguments: int
    ) -> None:
        self.rule = rule
        self.converted = converted
        self.x = x
        self.leaves = list(given)  # of (args, options); tensors are replaced by the values
        self.spec = spec
        self.where = [i for i, leaf in enumerate(given) if isinstance(leaf, Tensor)]
        self.constants = frozenset(k for k, i in enumerate(self.where) if i >= arguments)
        self.aux: Any = None
        self._matrix: tuple[tuple[Tensor, ...], Tensor] | None = None

    def _call(self, values: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any], Callable[..., Any]]:
        """The arguments of `fun`, the solver's options, and `fun` itself, with the given values."""
        leaves = list(self.leaves)
        for i, t in zip(self.where, values, strict=False):
            leaves[i] = t
        args, options = pytree.tree_unflatten(leaves, self.spec)
        hoisted = values[len(self.where) :]

        @functools.wraps(self.converted)
        def fun(x: Any, *args: Any) -> Any:
            return self.converted(x, *args, *hoisted)

        return args, options, fun

    def _value(self, x: Tensor, values: Sequence[Tensor]) -> Any:
        args, _, fun = self._call(values)
        return fun(self.x.unravel(x), *args)

    def residual(self, x: Tensor, *values: Tensor) -> Tensor:
        if self.rule.kind == "argmin":
            one = torch.ones((), dtype=x.dtype, device=x.device)
            return vjp(lambda z: self._objective(z, values), x, one)
        out = self.x.ravel(self._value(x, values), f"the result of {called(self.converted)}")
        return out - x if self.rule.kind == "fixed_point" else out

    def _objective(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        out: Tensor = self._value(x, values)
        return out

    def solve(self, x0: Tensor, values: tuple[Tensor, ...]) -> Tensor:
        args, options, fun = self._call(values)
        out = self.rule.solver(fun, self.x.unravel(x0), *args, **options)
        if self.rule.has_aux:
            out, self.aux = out
        name = called(self.rule.solver)
        x = self.x.ravel(out, f"the result of {name}").detach()
        if not self.rule.check:
            return x
        if not bool(torch.isfinite(x).all()):
            return self._failed(f"{name} expected to return a finite solution, got {out}", x)
        norm = float(self.residual(x, *values).detach().abs().max()) if x.numel() else 0.0
        start = float(self.residual(x0, *values).detach().abs().max()) if x.numel() else 0.0
        limit = self.rule.tolerance(x.dtype) * max(1.0, start if start < float("inf") else 1.0)
        if not norm <= limit:
            what = {"argmin": "gradient", "root": "residual", "fixed_point": "step"}[self.rule.kind]
            message = (
                f"{name} expected to converge, got a {what} of size {norm:.1e} at the solution it returned "
                f"(tolerance {limit:.1e}). The derivative of a point that is no solution means nothing"
            )
            return self._failed(message, x)
        return x

    def _failed(self, message: str, x: Tensor) -> Tensor:
        if self.rule.on_failure == "raise":
            message += ": let it run longer, or choose tol=, on_failure='nan' or check=False."
            raise SolveError(message)
        return torch.full_like(x, float("nan")) if self.rule.on_failure == "nan" else x

    def linear(self, transposed: bool, x: Tensor, values: tuple[Tensor, ...], b: Tensor) -> Tensor:  # noqa: FBT001
        transposed = transposed and self.rule.kind != "argmin"  # a Hessian is symmetric
        x, values = x.detach(), tuple(v.detach() for v in values)
        with torch.enable_grad():
            at = x.requires_grad_()
            out = self.residual(at, *values)
        if not out.requires_grad:
            return direct(torch.zeros(len(b), len(b), dtype=b.dtype), b, self.rule.on_failure)
        if self.rule.linear_solve is None and len(b) <= DIRECT_LIMIT:
            a = self._jacobian((at, *values), out)
            return direct(a.T if transposed else a, b, self.rule.on_failure)

        def by_transpose(u: Tensor) -> Tensor:
            return torch.autograd.grad(out, at, u, retain_graph=True)[0].detach()

        def by_itself(u: Tensor) -> Tensor:
            with torch.enable_grad():
                dummy = torch.zeros_like(out, requires_grad=True)
                (pullback,) = torch.autograd.grad(out, at, dummy, create_graph=True)
            if not pullback.requires_grad:
                return torch.zeros_like(u)
            return torch.autograd.grad(pullback, dummy, u, materialize_grads=True)[0].detach()

        matvec = by_transpose if transposed or self.rule.kind == "argmin" else by_itself
        if self.rule.linear_solve is not None:
            return self.rule.linear_solve(matvec, b)
        return solve_matrix_free(matvec, b, self.rule.on_failure, symmetric=self.rule.kind == "argmin")

    def _jacobian(self, key: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The derivative of the residual as a matrix: by one batched sweep where every operation has a
        batching rule, row by row elsewhere. The backward passes of one call share it."""
        known = self._matrix
        if known is not None and all(a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in zip(known[0], key, strict=True)):
            return known[1]
        at = key[0]
        eye = torch.eye(len(out), dtype=out.dtype, device=out.device)
        try:
            (a,) = torch.autograd.grad(out, at, eye, is_grads_batched=True, retain_graph=True)
        except RuntimeError:
            rows = [torch.autograd.grad(out, at, e, retain_graph=True)[0] for e in eye]
            a = torch.stack(rows)
        self._matrix = (key, a.detach())
        return a.detach()


class _Rule:
    """A decorated solver's options."""

    def __init__(self, kind: Kind, solver: Solver, options: dict[str, Any]) -> None:
        self.kind = kind
        self.solver = solver
        self.has_aux: bool = options.pop("has_aux", False)
        self.linear_solve: LinearSolve | None = options.pop("linear_solve", None)
        self.on_failure: OnFailure = options.pop("on_failure", "raise")
        self.check: bool = options.pop("check", True)
        self.tol: float | None = options.pop("tol", None)
        if options or self.on_failure not in {"raise", "nan", "least_squares"}:
            got = f"{options}" if options else f"on_failure={self.on_failure!r}"
            message = f"{kind} expected has_aux, linear_solve, on_failure, check, tol; got {got}."
            raise StructureError(message)

    def tolerance(self, dtype: torch.dtype) -> float:
        return float(torch.finfo(dtype).eps ** 0.25) if self.tol is None else self.tol

    def __call__(self, fun: Callable[..., Any], x0: Any, *args: Any, **options: Any) -> Any:
        converted, hoisted = closure_convert(fun, x0, *args)
        leaves, spec = pytree.tree_flatten((args, options))
        flat = Flat(x0)
        self._check(converted, flat)
        problem = _Problem(self, converted, flat, leaves, spec, len(pytree.tree_leaves(args)))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        x = flat.unravel(implicit(problem, flat.ravel(x0, "x0").detach(), *given, *hoisted))
        return (x, problem.aux) if self.has_aux else x


    def _check(self, converted: Converted, flat: Flat) -> None:
        """What `fun` returned on the example, against what the rule needs, before the solver runs."""
        out = converted.out_struct
        if self.kind != "argmin":
            flat.check(out, f"the result of {called(converted)}")
        elif not isinstance(out, Tensor) or out.shape != () or not out.is_floating_point():
            name = called(converted)
            message = f"argmin expected {name} to return a real scalar tensor, got {Structure.shown(out)}."
            raise StructureError(message)


def _decorator(kind: Kind, solver: Solver | None, options: dict[str, Any]) -> Any:
    if solver is None:
        return lambda solver: _decorator(kind, solver, dict(options))
    rule = _Rule(kind, solver, options)

    @functools.wraps(solver)
    def solve(fun: Callable[..., Any], x0: Any, *args: Any, **options: Any) -> Any:
        return rule(fun, x0, *args, **options)

    return solve


@overload
def argmin(solver: Solver) -> Solver: ...
@overload
def argmin(**options: Any) -> Callable[[Solver], Solver]: ...
def argmin(solver: Solver | None = None, **options: Any) -> Any:
    """Attaches the derivative of a minimiser `x = argmin fun(x, *args)` to a solver.

    The decorated `solver(fun, x0, *args, **its_options)` returns the same `x`, now a differentiable
    function of everything that `fun` captures and of `args`: to any order, in reverse and forward mode,
    under every torch.func transform. `x0` and the solver's own options get no derivative. The solver sees
    tensors without history, so its own use of autograd touches no `.grad` of the caller.

    Args:
        solver: takes `fun` and `x0` (any pytree of real or complex tensors) and returns `x` of the
            structure of `x0`. It may leave PyTorch. `torch.func.vmap` runs it once for each element.
        has_aux: the solver returns `(x, aux)`; `aux` passes through without derivative.
        linear_solve: a callable `solve(matvec, b)` for the systems of the derivative. By default a
            factorisation up to 100 unknowns; beyond, conjugate gradients for `argmin`, GMRES else.
        check: whether to check that `x` is a solution; `False` costs nothing.
        tol: how large the gradient (residual, step) may be there, in the largest component, absolute and
            relative to the one at `x0`. By default the fourth root of the machine epsilon.
        on_failure: "raise"; "nan" for a solution or derivative of NaN; "least_squares" for the derivative
            of least norm where the linear system is singular.

    Raises:
        SolveError: the solver returned no solution, or the derivative's linear system is singular.
        StructureError: the solver or `fun` returned another structure than expected.
        CaptureError: as `closure_convert` does.

    The mathematics: the implicit function theorem; Blondel et al. 2022, "Efficient and Modular Implicit
    Differentiation".

    Example:
        >>> @argmin
        ... def minimize(fun, x0):
        ...     return x0 - torch.func.grad(fun)(x0) / 2  # a Newton step
        >>> a = torch.tensor(3.0, requires_grad=True)
        >>> x = minimize(lambda x: (x - a) ** 2, torch.tensor(0.0))
        >>> torch.autograd.grad(x, a)
        (tensor(1.),)
    """
    return _decorator("argmin", solver, options)


@overload
def root(solver: Solver) -> Solver: ...
@overload
def root(**options: Any) -> Callable[[Solver], Solver]: ...
def root(solver: Solver | None = None, **options: Any) -> Any:
    """Attaches the derivative of a root, `fun(x, *args) = 0`, to a solver; else as `argmin`.

    `fun` returns the structure of `x`.

    Example:
        >>> @root
        ... def newton(fun, x0):
        ...     for _ in range(20):
        ...         x0 = x0 - fun(x0) / torch.func.grad(fun)(x0)
        ...     return x0
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> torch.autograd.grad(newton(lambda x: x**2 - a, torch.tensor(1.0)), a)
        (tensor(0.2500),)
    """
    return _decorator("root", solver, options)


@overload
def fixed_point(solver: Solver) -> Solver: ...
@overload
def fixed_point(**options: Any) -> Callable[[Solver], Solver]: ...
def fixed_point(solver: Solver | None = None, **options: Any) -> Any:
    """Attaches the derivative of a fixed point, `x = fun(x, *args)`, to a solver; else as `argmin`.

    Example:
        >>> @fixed_point
        ... def iterate(fun, x0):
        ...     for _ in range(60):
        ...         x0 = fun(x0)
        ...     return x0
        >>> a = torch.tensor(3.0, requires_grad=True)
        >>> torch.autograd.grad(iterate(lambda x: x / 2 + a, torch.tensor(0.0)), a)
        (tensor(2.),)
    """
    return _decorator("fixed_point", solver, options)
