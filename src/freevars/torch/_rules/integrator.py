"""Solvers of integrals and differential equations: what both decorators have in common.

One call is an operation on tensors (`Operation`), whose derivatives are calls of the same solver
for other functions, and so operations again: to any order, in both modes, under torch.func. Not
here: what the derivative is (`integral`, `odeint`).
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Concatenate, ParamSpec, Protocol, Self, TypeVar, overload

import torch
from torch import Tensor

from freevars._solvers.decorated import DecoratedSolver
from freevars._solvers.options import check_options
from freevars._solvers.signature import SolverCall
from freevars.errors import StructureError
from freevars.torch import _compat, _hooks
from freevars.torch._compat import pytree

__all__ = ["Integrator", "Operation", "Options", "operate"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")


class Options:
    """The options of one call: its tensors are inputs, whose derivative is zero."""

    def __init__(self, options: dict[str, Any]) -> None:
        leaves, self._spec = pytree.tree_flatten(options)
        self._where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors = [leaves[i] for i in self._where]
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.count = len(self.tensors)

    def rebuilt(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The options with other tensors in the same places."""
        leaves = list(self._leaves)
        for i, t in zip(self._where, tensors, strict=True):
            leaves[i] = t
        options: dict[str, Any] = pytree.tree_unflatten(leaves, self._spec)
        return options


class Operation(Protocol):
    """What `operate` runs and differentiates."""

    solver: Any  # the decorated one

    def run(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """From tensors without history."""

    def pull(
        self, tensors: Sequence[Tensor], out: Sequence[Tensor], g: Sequence[Tensor], needed: Any
    ) -> Sequence[Tensor | None]:
        """The cotangents of the tensors, differentiable."""

    def push(
        self, tensors: Sequence[Tensor], out: Sequence[Tensor], dots: Sequence[Tensor | None]
    ) -> Sequence[Tensor]:
        """The tangent of the result, differentiable."""


def operate(operation: Operation, tensors: Sequence[Tensor]) -> list[Tensor]:
    """`operation.run(tensors)`, with its derivatives."""
    return list(_Operate.apply(operation, *tensors))  # type: ignore[no-untyped-call]


class _Operate(torch.autograd.Function):
    @staticmethod
    def forward(operation: Operation, *tensors: Tensor) -> tuple[Tensor, ...]:
        plain = [t.detach() for t in tensors]
        with _hooks.solver_running(), torch.inference_mode(mode=False), torch.enable_grad():
            return tuple(t.detach() for t in operation.run(plain))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operation, *tensors = inputs
        ctx.n = len(tensors)
        ctx.save_for_backward(*tensors, *output)
        if _compat.transforms_active():
            ctx.save_for_forward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        if any(map(_compat.is_grads_batch, g)):
            message = (
                f"{ctx.operation.solver.__name__}: many cotangents at once by"
                " torch.autograd.grad(is_grads_batched=True) are not taken here. Take them one by"
                " one, or torch.func.vmap of the function that torch.func.vjp returns."
            )
            raise NotImplementedError(message)
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        return None, *ctx.operation.pull(saved[: ctx.n], saved[ctx.n :], g, needed)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        # As in `implicit`: forward mode is off here, and on again this one's tangents come off.
        primal = _compat.primal_and_tangent
        with _compat.forward_mode(True):
            saved = [primal(t).primal for t in ctx.saved_tensors]
            dots = [None if t is None else primal(t).primal for t in tangents[1:]]
            return tuple(ctx.operation.push(saved[: ctx.n], saved[ctx.n :], dots))

    @staticmethod
    def vmap(info: Any, in_dims: Any, operation: Operation, *tensors: Tensor) -> Any:
        def member(i: int) -> list[Tensor]:
            some = (
                t if d is None else t.select(d, i)
                for t, d in zip(tensors, in_dims[1:], strict=True)
            )
            return operate(operation, list(some))

        every = [member(i) for i in range(info.batch_size)]
        out = tuple(torch.stack(each) for each in zip(*every, strict=True))
        return out, (0,) * len(out)


class Integrator(DecoratedSolver[P, R]):
    """What the decorated solvers of `integral` and `odeint` have in common."""

    kind: ClassVar[str]
    options: ClassVar[Any]  # a TypedDict

    def __init__(self, solver: Callable[P, R], /, **options: Any) -> None:
        check_options(self.kind, options, self.options)
        self.given = options
        self.has_aux = bool(options.get("has_aux", False))
        super().__init__(solver, **options)

    @overload
    def __get__(self, instance: None, owner: Any = None, /) -> Self: ...
    @overload
    def __get__(
        self: "Integrator[Concatenate[Any, Q], S]", instance: object, owner: Any = None, /
    ) -> "Integrator[Q, S]": ...
    def __get__(self, instance: Any, owner: Any = None, /) -> Any:
        return super().__get__(instance, owner)

    def __repr__(self) -> str:
        return f"<{self.__name__} with the derivative rule of {self.kind}>"

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R
        if _compat.compiling():
            result = self._eagerly(*args, **kwargs)
        else:
            result = super().__call__(*args, **kwargs)
        return result

    @_compat.eagerly  # type: ignore[untyped-decorator]
    def _eagerly(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    def call_solver(
        self, fun: Callable[..., Any], at: tuple[Any, Any], call: SolverCall, what: str
    ) -> tuple[Any, Any]:
        """The user's solver for `fun`: its result, and its aux, None where it returns none."""
        out = self._signature.call(self._solver, call._replace(fun=fun, x0=at))
        if not self.has_aux:
            return out, None
        if not (isinstance(out, tuple) and len(out) == 2):  # noqa: PLR2004
            message = (
                f"{self.__name__}: with has_aux=True a solver returns ({what}, aux), got {out!r}."
            )
            raise StructureError(message)
        return out
