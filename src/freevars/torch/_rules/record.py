"""A first derivative in PyTorch's own reverse mode, from what was recorded once.

The forward pass evaluates F at the solution with a graph, at a leaf of its own, as a
deep-equilibrium layer by hand does. In the backward pass, A^T u = g is solved with vector-Jacobian
products of that graph, and -u is sent into it: the derivative flows into whatever the graph
reaches, under the modes and with the random numbers of the forward pass, and the user's function
does not run again. A tensor that was changed in place raises PyTorch's own error, small constants
excepted (`snapshot.py`).

With `create_graph=True` the values get the cotangents in place of the graph, by a second
evaluation (`implicit.py`): there x depends on the values, while the recorded leaf does not.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from freevars._solvers.signature import SolverCall
from freevars.torch import _compat, _modes
from freevars.torch._convert.convert import Converted
from freevars.torch._rules.comparison import compare_derivatives
from freevars.torch._rules.condition import Condition, Solution
from freevars.torch._rules.implicit import pull_back
from freevars.torch._rules.problem import Problem
from freevars.torch._rules.sharded import no_gradient
from freevars.torch._rules.sizes import PARTS
from freevars.torch._rules.snapshot import constants_as_they_are

__all__ = ["solve_and_attach"]


def solve_and_attach(
    problem: Problem,
    call: SolverCall,
    given: Mapping[str, Callable[..., Any]],
    values: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """The root, differentiable in whatever the user's function reads, and what comes with it;
    `given` are the functions of the problem as they were before conversion."""
    plain = tuple(v.detach() for v in values)
    with (
        _modes.solver_running(),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        problem.running_as_it_is(call.fun),
    ):
        x, columns, others = problem.find(*plain)
    x = x.detach()
    if not torch.is_grad_enabled() or not any(v.requires_grad for v in values):
        return x, *others
    leaf = x.clone().requires_grad_()
    stated = {name: _as_it_is(given[name], of, call) for name, of in problem.stating.items()}

    def equations(x: Tensor) -> Tensor:
        return problem.completed(problem.optimality(stated, x), x, values[0], columns)

    with ExitStack() as constants:
        for name, function in problem.stating.items():
            constants.enter_context(constants_as_they_are(given[name], function.constants))
        f = equations(leaf)
        if problem.rule.check and _is_tiny(x, plain[0]):
            with torch.no_grad():
                problem.nearby = [equations((1 - part) * x).detach() for part in PARTS]
    problem.recorded = (leaf, f)
    attached, behind = problem.inputs.attached()
    fixed = (problem, len(attached), x)
    out: Tensor = _Attach.apply(*fixed, leaf, f, columns, *attached, *behind)  # type: ignore[no-untyped-call]
    return out, *others


def _is_tiny(x: Tensor, x0: Tensor) -> bool:
    """Whether a problem's whole solution is tiny next to how far the solver came."""
    if not x.numel():
        return False
    size, way = x.abs().amax(1), (x - x0).abs().amax(1)
    return bool(((size > 0) & (size <= torch.finfo(x.dtype).eps ** 0.5 * way)).any())


def _as_it_is(
    given: Callable[..., Any], converted: Converted[..., Any], call: SolverCall
) -> Callable[[Any], Any]:
    """A function before conversion, as a function of x that draws what its conversion drew."""

    def function(x: Any) -> Any:
        with nullcontext() if converted.replay is None else converted.replay.replayed():
            return given(x, call.args, call.kwargs)

    return function


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        condition: Problem,
        n: int,
        x: Tensor,
        leaf: Tensor,
        f: Tensor,
        columns: Tensor,
        *values: Tensor,
    ) -> Tensor:
        ctx.condition = condition
        ctx.set_materialize_grads(False)
        out = x.detach().clone()
        ctx.save_for_backward(out, leaf, f, columns, *values[:n])
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        condition = ctx.condition
        x, leaf, f, columns, *values = ctx.saved_tensors
        n, needed = len(values), ctx.needs_input_grad[6:]
        behind = (None,) * (len(needed) - n)
        if torch.is_grad_enabled():
            saved = (x, f.detach(), columns, *values)
            grads = pull_back(condition, saved, g, needed[:n])
            with torch.no_grad():
                _compare(condition, Solution(leaf, f, columns), values, g, grads)
            return None, None, None, None, no_gradient(f), None, *grads, *behind
        u = _Answer.apply(condition, Solution(leaf, f, columns), values, g)  # type: ignore[no-untyped-call]
        return None, None, None, None, -u.to(f.dtype), None, *(None,) * n, *behind


def _compare(
    problem: Problem, at: Solution, values: list[Tensor], g: Tensor, grads: list[Tensor | None]
) -> None:
    """Refuses cotangents from a second evaluation that are not those of the recorded graph: what
    the function reads may have changed its derivative and not its value."""
    read = problem.inputs.as_read(values, problem.captured)
    wanted = [i for i, grad in enumerate(grads) if grad is not None and values[i].requires_grad]
    if not wanted or _compat.transforms_active():
        return
    u = problem.linear(True, at, tuple(values), g)
    # One captured tensor may be computed from another: both sides by all paths.
    totals = [
        torch.autograd.grad(
            outputs, [read[i] for i in wanted], cotangents, retain_graph=True, allow_unused=True
        )
        for outputs, cotangents in (
            ([values[i] for i in wanted], [grads[i] for i in wanted]),
            ([at.f], [-u.to(at.f.dtype)]),
        )
    ]
    for i, now, before in zip(wanted, *totals, strict=True):
        zero = torch.zeros_like(read[i])
        compare_derivatives(
            zero if now is None else now,
            zero if before is None else before,
            problem.unknown.dtype,
            problem.rule.name,
        )


class _Answer(torch.autograd.Function):
    """`u` with A^T u = g, also for many `g` at once, as `is_grads_batched=True` gives them."""

    @staticmethod
    def forward(condition: Condition, at: Solution, values: list[Tensor], g: Tensor) -> Tensor:
        return condition.linear(True, at, tuple(values), g)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, condition: Condition, at: Solution, values: list[Tensor], g: Tensor
    ) -> tuple[Tensor, int]:
        del info
        g = g.movedim(in_dims[-1], 0)
        shape = g.shape
        u = condition.linear(True, at, tuple(values), g.reshape(-1, *shape[-2:]))
        return u.reshape(shape), 0
