"""One call of a decorated solver, as a problem for `implicit.py`.

Its unknown is one real vector; its values are the tensors among the arguments of the call, then the
hoisted values of `fun`. Not here: the decorators (`rules.py`).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from freevars._solvers.signature import SolverCall, SolverSignature
from freevars.errors import FreevarsError, NotASolutionError, StructureError
from freevars.torch._compat import pytree
from freevars.torch._convert.convert import Converted
from freevars.torch._convert.structure import Structure, same
from freevars.torch._describe import function_name
from freevars.torch._rules.implicit import vjp
from freevars.torch._rules.linear import (
    DIRECT_LIMIT,
    Dense,
    LinearSolve,
    MatrixFree,
    System,
    tolerance,
)
from freevars.torch._rules.preserve_grad import caller_leaves, preserve_grad
from freevars.torch._rules.ravel import Flat

__all__ = ["Kind", "OnFailure", "Problem", "Rule"]

Kind = Literal["argmin", "root", "fixed_point"]
OnFailure = Literal["raise", "nan", "least_squares"]


@dataclass(frozen=True)
class Rule:
    """What was said when the solver was decorated."""

    kind: Kind
    solver: Callable[..., Any]
    name: str
    has_aux: bool = False
    linear_solve: LinearSolve | None = None
    on_failure: OnFailure = "raise"
    check: bool = True

    def __post_init__(self) -> None:
        if self.on_failure not in {"raise", "nan", "least_squares"}:
            message = (
                f'on_failure: expected "raise", "nan" or "least_squares", got {self.on_failure!r}.'
            )
            raise ValueError(message)


class _Tensor:
    """Stands for a tensor of aux."""

    def __repr__(self) -> str:
        return "a tensor"


_A_TENSOR = _Tensor()


class Problem:
    """`residual(x, *values) = 0`, and how the user's solver finds `x`."""

    def __init__(
        self,
        rule: Rule,
        converted: Converted[..., Any],
        unknown: Flat,
        signature: SolverSignature,
        call: SolverCall,
    ) -> None:
        fun_arguments, options = (call.args, call.kwargs), call.options
        self.rule = rule
        self.converted = converted
        self.unknown = unknown
        self.signature = signature
        self._callers = caller_leaves(rule.solver, *options.values())
        self._aux: tuple[list[Any], Any] | None = None
        leaves, self._spec = pytree.tree_flatten((fun_arguments, options))
        self._where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        of_fun = len(pytree.tree_leaves(fun_arguments))
        self.constants = frozenset(k for k, i in enumerate(self._where) if i >= of_fun)
        self._known: tuple[tuple[Tensor, ...], System] | None = None
        self._check_result()

    # --- the function

    def _arguments(self, values: Sequence[Tensor]) -> tuple[Any, Any, dict[str, Any]]:
        """Positional and keyword arguments of `fun`, and the solver's options, with the given
        values."""
        leaves = list(self._leaves)
        for i, t in zip(self._where, values, strict=False):
            leaves[i] = t
        (args, kwargs), options = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs, options

    def _value(self, x: Tensor, values: Sequence[Tensor]) -> Any:
        args, kwargs, _ = self._arguments(values)
        out = self.converted(self.unknown.unravel(x), args, kwargs, *values[len(self._where) :])
        return out[0] if self.rule.has_aux else out

    def residual(self, x: Tensor, /, *values: Tensor) -> Tensor:
        """The optimality function: `fun`, its gradient, or the step of its iteration."""
        if self.rule.kind == "argmin":
            return vjp(
                lambda z: self._value(z, values), x, torch.ones((), dtype=x.dtype, device=x.device)
            )
        out = self.unknown.ravel(
            self._value(x, values), f"the result of {function_name(self.converted)}"
        )
        return out - x if self.rule.kind == "fixed_point" else out

    def _check_result(self) -> None:
        """What `fun` returned on the example, against what the rule needs, before the solver
        runs."""
        out, name = self.converted.out_struct, function_name(self.converted)
        if self.rule.has_aux:
            if not isinstance(out, tuple) or len(out) != 2:  # noqa: PLR2004
                got = Structure.shown(out)
                message = f"has_aux=True expected {name} to return (value, aux), got {got}."
                raise StructureError(message)
            out = out[0]
        if self.rule.kind != "argmin":
            self.unknown.check(out, f"the result of {name}")
        elif not isinstance(out, Tensor) or out.shape != () or not out.is_floating_point():
            got = Structure.shown(out)
            message = f"argmin expected {name} to return a real scalar tensor, got {got}."
            raise StructureError(message)

    # --- the solver

    def solve(self, x0: Tensor, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Runs the user's solver, as it was called, on plain tensors: x, and the tensors of aux."""
        args, kwargs, options = self._arguments(values)
        hoisted = values[len(self._where) :]

        @functools.wraps(self.converted)
        def fun(x: Any, *args: Any, **kwargs: Any) -> Any:
            return self.converted(x, args, kwargs, *hoisted)

        call = SolverCall(fun, self.unknown.unravel(x0), args, kwargs, options)
        with preserve_grad(self._callers):
            out = self.signature.call(self.rule.solver, call)
        tensors = []
        if self.rule.has_aux:
            if not (isinstance(out, tuple) and len(out) == 2):  # noqa: PLR2004
                message = (
                    f"{self.rule.name}: with has_aux=True a solver returns (x, aux), got "
                    f"{Structure.shown(out)}."
                )
                raise StructureError(message)
            out, aux = out
            tensors = self._take_apart(aux)
        return self.unknown.ravel(out, f"the result of {self.rule.name}"), *tensors

    def _take_apart(self, aux: Any) -> list[Tensor]:
        """The tensors of aux, as copies that nobody else writes to. What is no tensor is told
        beside, once for a whole batch."""
        leaves, spec = pytree.tree_flatten(aux)
        rest = [_A_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if self._aux is None:
            self._aux = (rest, spec)
        elif spec != self._aux[1] or not all(map(same, rest, self._aux[0])):
            before, now = (pytree.tree_unflatten(*aux) for aux in (self._aux, (rest, spec)))
            message = (
                f"{self.rule.name}: expected an aux that differs in tensors only from one element "
                f"of a batch to the next, got {before} and {now}. Return what differs as tensors."
            )
            raise StructureError(message)
        return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]

    def with_aux(self, tensors: Sequence[Tensor]) -> Any:
        """Aux as the solver returned it, of the tensors that came back with `x`."""
        assert self._aux is not None  # noqa: S101 (a solver has run)
        rest, spec = self._aux
        left = iter(tensors)
        return pytree.tree_unflatten([next(left) if x is _A_TENSOR else x for x in rest], spec)

    # --- the linear systems of its derivative

    def linear(self, transposed: bool, x: Tensor, values: tuple[Tensor, ...], b: Tensor) -> Tensor:  # noqa: FBT001
        """`u` with `F_x u = b` or `F_x^T u = b`; raises, or is NaN, where it cannot be trusted."""
        if not b.numel():
            return b
        try:
            system = self._system(x.detach(), tuple(v.detach() for v in values))
            return system.solve(b, transposed=transposed and self.rule.kind != "argmin")
        except FreevarsError:
            if self.rule.on_failure != "nan":
                raise
            return torch.full_like(b, float("nan"))

    def _system(self, x: Tensor, values: tuple[Tensor, ...]) -> System:
        """The derivative of the residual at `x`, checked; the backward passes of one call share
        it."""
        key = (x, *values)
        if self._known is not None and all(map(torch.equal, self._known[0], key)):
            return self._known[1]
        if self.rule.check and not bool(torch.isfinite(x).all()):
            message = (
                f"{self.rule.name}: expected a finite solution, got {self.unknown.unravel(x)}."
            )
            raise NotASolutionError(message)
        at = x.clone().requires_grad_()
        with torch.enable_grad():
            f = self.residual(at, *values)
        system = self._of_derivative(at, f)
        if self.rule.check:
            self._check_converged(system, x, f.detach())
        self._known = (key, system)
        return system

    def _check_converged(self, system: System, x: Tensor, f: Tensor) -> None:
        step = system.size_of_step(f) / max(1.0, float(torch.linalg.vector_norm(x)))
        if not step <= tolerance(x.dtype):
            message = (
                f"{self.rule.name}: the solver did not converge: a Newton step from its result "
                "would still "
                f"move it by {step:.1e}, relative to its norm (absolute below norm 1); up to "
                f"{tolerance(x.dtype):.1e} is accepted. Let it run longer, or declare the "
                "result good with "
                "check=False."
            )
            raise NotASolutionError(message)

    def _of_derivative(self, at: Tensor, f: Tensor) -> System:
        name, symmetric = self.rule.name, self.rule.kind == "argmin"
        options = {
            "least_squares": self.rule.on_failure == "least_squares",
            "check": self.rule.check,
        }
        if not f.requires_grad:
            zero = torch.zeros(len(f), len(f), dtype=f.dtype, device=f.device)
            return Dense(zero, name, **options)
        if self.rule.linear_solve is None and len(f) <= DIRECT_LIMIT:
            return Dense(_jacobian(f, at), name, **options)

        def by_transpose(u: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(f, at, u, retain_graph=True, materialize_grads=True)
            return product.detach()

        with torch.enable_grad():
            dummy = torch.zeros_like(f, requires_grad=True)
            (pullback,) = torch.autograd.grad(
                f, at, dummy, create_graph=True, materialize_grads=True
            )

        def by(u: Tensor) -> Tensor:
            if not pullback.requires_grad:
                return torch.zeros_like(u)
            return torch.autograd.grad(
                pullback, dummy, u, retain_graph=True, materialize_grads=True
            )[0]

        return MatrixFree(
            by_transpose if symmetric else by,
            by_transpose,
            name,
            symmetric=symmetric,
            own=self.rule.linear_solve,
            check=self.rule.check,
        )


def _jacobian(f: Tensor, at: Tensor) -> Tensor:
    """By one batched sweep where every operation has a batching rule, row by row elsewhere."""
    eye = torch.eye(len(f), dtype=f.dtype, device=f.device)
    try:
        (a,) = torch.autograd.grad(
            f, at, eye, is_grads_batched=True, retain_graph=True, materialize_grads=True
        )
    except RuntimeError:
        rows = [
            torch.autograd.grad(f, at, e, retain_graph=True, materialize_grads=True)[0] for e in eye
        ]
        a = torch.stack(rows)
    return a.detach()
