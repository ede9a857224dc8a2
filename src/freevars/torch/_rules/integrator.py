"""Solvers of integrals and differential equations: what both decorators have in common.

One call is an operation on tensors (`Operation`), whose derivatives are calls of the same solver
for other functions, and so operations again: to any order, in both modes, under torch.func. Not
here: what the derivative is (`integral`, `odeint`).
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import (
    Any,
    ClassVar,
    Concatenate,
    NoReturn,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
    overload,
)

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from freevars._solvers.integration import IntegralRule, no_derivative
from freevars._solvers.options import check_options
from freevars._solvers.signature import SolverCall
from freevars.errors import NotASolutionError
from freevars.torch import _compat, _modes
from freevars.torch._compat import pytree
from freevars.torch._convert import contents
from freevars.torch._convert.autograd_graph import leaves_behind
from freevars.torch._describe import describe, reachable
from freevars.torch._rules.asked import Asked
from freevars.torch._rules.autocast import Autocast
from freevars.torch._rules.eager import EagerSolver
from freevars.torch._rules.partition import Remainder
from freevars.torch._rules.unsupported import check_forward_mode, check_not_exported

__all__ = ["Integrator", "Operation", "operate"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")
Told = Callable[..., NotASolutionError]  # of a name, error= and limit=


class Operation(Protocol):
    """What `operate` runs and differentiates."""

    solver: Any  # the decorated one
    options: Remainder  # of the call, by whose tensors there is no derivative
    first_option: int  # its position among the tensors
    aux: Any  # what the solver returned beside the result, after `run`

    def run(self, tensors: Sequence[Tensor], asked: Asked) -> Sequence[Tensor]:
        """From tensors without history; takes note of what the solver asks the function."""

    def answer(self, tensors: Sequence[Tensor], point: tuple[Tensor, ...]) -> Sequence[Tensor]:
        """What the function returns where the solver asked for it."""

    def pull(
        self, tensors: Sequence[Tensor], out: Sequence[Tensor], g: Sequence[Tensor], needed: Any
    ) -> Sequence[Tensor | None]:
        """The cotangents of the tensors, differentiable."""

    def push(
        self, tensors: Sequence[Tensor], out: Sequence[Tensor], dots: Sequence[Tensor | None]
    ) -> Sequence[Tensor]:
        """The tangent of the result, differentiable."""


def operate(operation: Operation, tensors: Sequence[Tensor]) -> list[Tensor]:
    """`operation.run(tensors)`, with its derivatives.

    The tensors of `operation.aux` are results too, without derivatives: so they are batched where
    the result is.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        check_not_exported(operation.solver.__name__)
    reads = _OwnReads(operation.solver.of_a_transform() if _compat.functorch_active() else ())
    out = list(_Operate.apply(operation, reads, *tensors))  # type: ignore[no-untyped-call]
    if reads.found and torch.is_grad_enabled():
        _refuse(operation, describe(reads.found[0], operation.solver.__wrapped__))
    beside = _beside(operation)
    n = len(out) - len(beside)
    moved = iter(out[n:])
    operation.aux = pytree.tree_map_only(Tensor, lambda _: next(moved), operation.aux)
    return out[:n]


def _beside(operation: Operation) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(operation.aux) if isinstance(leaf, Tensor)]


class _OwnReads:
    """What a solver reads itself, and a derivative could flow into.

    What it is given has no history: so all that is behind its result, it reads itself. A tensor of
    torch.func leaves no trace there, and is met where the solver uses it.
    """

    def __init__(self, of_a_transform: Sequence[Tensor]) -> None:
        self._of_a_transform = {id(t) for t in of_a_transform}
        self.found: list[Tensor] = []
        self.asked = Asked()

    def run(self, operation: Operation, plain: Sequence[Tensor]) -> Sequence[Tensor]:
        """`operation.run`, watched."""
        ids = self._of_a_transform
        with _Watch(ids, self.found) if ids else nullcontext():
            out = operation.run(plain, self.asked)
        tracked = [t for t in out if t.requires_grad]
        self.found += [*(t for t in tracked if t.is_leaf), *leaves_behind(tracked)]
        return out


class _Watch(TorchFunctionMode):
    """Takes note of the tensors of these ids that operations are given."""

    def __init__(self, ids: set[int], found: list[Tensor]) -> None:
        super().__init__()
        self._ids, self._found = ids, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if next(contents.tensors(out), None) is not None:  # a shape or dtype has no derivative
            given = contents.given_tensors(args, kwargs or {})
            self._found += [t for t in given if id(t) in self._ids]
        return out


def _refuse_options(operation: Operation, asked: Sequence[bool]) -> None:
    start, options = operation.first_option, operation.options
    mark = object()
    marked = [mark if is_asked else None for is_asked in asked[start : start + options.count]]
    for name, value in options.combine(marked).items():
        if any(leaf is mark for leaf in pytree.tree_leaves(value)):
            _refuse(operation, f"the option {name}=")


def _refuse(operation: Operation, by: str) -> NoReturn:
    solver = operation.solver
    raise no_derivative(solver.__name__, by, solver.leads, "its .detach()")


def _compare(operation: Operation, asked: Asked, tensors: Sequence[Tensor]) -> None:
    """Refuses a function that is not what the solver was given."""
    solver, plain = operation.solver, [t.detach() for t in tensors]
    asked.compare(lambda point: operation.answer(plain, point), solver.__name__, solver.leads[0])


class _Operate(torch.autograd.Function):
    @staticmethod
    def forward(operation: Operation, reads: _OwnReads, *tensors: Tensor) -> tuple[Tensor, ...]:
        plain = [t.detach() for t in tensors]
        with _modes.solver_running():
            out = reads.run(operation, plain)
            return tuple(t.detach() for t in (*out, *_beside(operation)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        operation, reads, *tensors = inputs
        ctx.operation, ctx.asked, ctx.autocast = operation, reads.asked, Autocast.now(tensors)
        ctx.set_materialize_grads(False)  # a tangent of zero would be one that is asked for
        ctx.n, ctx.results = len(tensors), len(output) - len(_beside(operation))
        results, beside = output[: ctx.results], output[ctx.results :]
        ctx.mark_non_differentiable(*beside)
        ctx.save_for_backward(*tensors, *results)
        if _compat.transforms_active():
            ctx.save_for_forward(*tensors, *results)

    @staticmethod
    @_compat.uncompiled
    def backward(ctx: Any, *g: Tensor | None) -> Any:
        given = g[: ctx.results]
        if all(t is None for t in given):
            return (None,) * len(ctx.needs_input_grad)
        if any(t is not None and _compat.is_legacy_batched(t) for t in given):
            message = (
                f"{ctx.operation.solver.__name__}: many cotangents at once by"
                " torch.autograd.grad(is_grads_batched=True) are not taken here. Take them one by"
                " one, or torch.func.vmap of the function that torch.func.vjp returns."
            )
            raise NotImplementedError(message)
        saved = ctx.saved_tensors  # once: a checkpoint gives them a single time
        tensors, out = saved[: ctx.n], saved[ctx.n :]
        needed = ctx.needs_input_grad[2:]
        _refuse_options(ctx.operation, needed)
        whole = [torch.zeros_like(o) if t is None else t for t, o in zip(given, out, strict=True)]
        with ctx.autocast.again():
            if not _compat.functorch_active():  # else the transform, open still, takes both
                _compare(ctx.operation, ctx.asked, tensors)
            return None, None, *ctx.operation.pull(tensors, out, whole, needed)

    @staticmethod
    @_compat.uncompiled
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        # As in `implicit`: forward mode is off here, and on again this one's tangents come off.
        primal = _compat.primal_and_tangent
        check_forward_mode(tangents)
        with _compat.forward_mode(True):
            saved = [primal(t).primal for t in ctx.saved_tensors]
            dots = [None if t is None else primal(t).primal for t in tangents[2:]]
            _refuse_options(ctx.operation, [dot is not None for dot in dots])
            pushed = ctx.operation.push(saved[: ctx.n], saved[ctx.n :], dots)
            return (*pushed, *(None for _ in _beside(ctx.operation)))

    @staticmethod
    @_compat.uncompiled
    def vmap(
        info: Any, in_dims: Any, operation: Operation, reads: _OwnReads, *tensors: Tensor
    ) -> Any:
        del reads  # each member looks for itself

        def member(i: int) -> list[Tensor]:
            some = (
                t if d is None else t.select(d, i)
                for t, d in zip(tensors, in_dims[2:], strict=True)
            )
            out = operate(operation, list(some))
            return [*out, *_beside(operation)]

        every = [member(i) for i in range(info.batch_size)]
        out = tuple(torch.stack(each) for each in zip(*every, strict=True))
        return out, (0,) * len(out)


class Integrator(EagerSolver[P, R]):
    """What the decorated solvers of `integral` and `odeint` have in common."""

    kind: ClassVar[str]
    options: ClassVar[Any]  # a TypedDict
    stated: ClassVar[type[IntegralRule]]

    def __init__(self, solver: Callable[P, R], /, **options: Any) -> None:
        check_options(self.kind, options, self.options)
        self.rule: Any = self.stated(**options)
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

    def judged(
        self, error: Tensor, eps: float, asked: Sequence[Tensor], told: Told
    ) -> Tensor | float:
        """1, or NaN for a derivative that cannot be trusted, or an error that says why."""
        if not self.rule.check:
            return 1.0
        limit = self.rule.limit(eps)
        with torch.no_grad():
            nothing = torch.stack([(t == 0).all() for t in asked]).all()
            good = (error <= limit) | nothing
            known = _compat.innermost(good)
        if bool(known.all()):
            return 1.0
        worst = float(_compat.innermost(error).max())
        problem = told(self.__name__, error=worst, limit=limit)
        if self.rule.on_failure == "raise":
            raise problem
        if self.rule.on_failure == "warn":
            warnings.warn(str(problem), stacklevel=2)
        return torch.where(good, 1.0, torch.nan)

    def of_a_transform(self) -> list[Tensor]:
        """What the solver reaches itself and a torch.func derivative is by."""
        return [t for t, _ in reachable(self._solver).values() if _compat.is_grad_tracking(t)]

    def call_solver(
        self, fun: Callable[..., Any], at: tuple[Any, Any], call: SolverCall, what: str
    ) -> tuple[Any, Any]:
        """The user's solver for `fun`: its result, and its aux, None where it returns none."""
        out = self._signature.call(self._solver, call._replace(fun=fun, x0=at))
        result: tuple[Any, Any] = self.rule.split_aux(out, self.__name__, what)
        return result
