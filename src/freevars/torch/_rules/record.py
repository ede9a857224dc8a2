"""A first derivative in PyTorch's own reverse mode, from what was recorded once.

The forward pass evaluates F at the solution, from the user's functions as they are. A tensor that
is changed in place before the backward pass raises PyTorch's own error, except for small constants
(`snapshot.py`). Not here: what follows from the recorded F (`attach.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from freevars._solvers.signature import SolverCall
from freevars.torch import _compat, _modes
from freevars.torch._convert.convert import Converted
from freevars.torch._rules.attach import attached, record
from freevars.torch._rules.problem import Problem

__all__ = ["solve_and_attach"]


def solve_and_attach(
    problem: Problem,
    call: SolverCall,
    given: Mapping[str, Callable[..., Any]],
    values: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """The root, differentiable in whatever the user's function reads, and what comes with it;
    `given` are the functions of the problem as they were before conversion."""
    plain = tuple(_compat.not_inference(v.detach()) for v in values)
    with _modes.solver_running(), problem.running_as_it_is(call.fun):
        x, columns, others = problem.find(*plain)
    x = x.detach()
    if not torch.is_grad_enabled() or not any(v.requires_grad for v in values):
        return x, *others
    stated = {name: _as_it_is(given[name], of, call) for name, of in problem.stating.items()}

    def equations(x: Tensor) -> Tensor:
        return problem.completed(problem.optimality(stated, x, values[0]), x, columns, *values)

    record(problem, equations, x, plain[0])
    return attached(problem, columns, *problem.inputs.attached()), *others


def _as_it_is(
    given: Callable[..., Any], converted: Converted[..., Any], call: SolverCall
) -> Callable[[Any], Any]:
    """A function before conversion, as a function of x that draws what its conversion drew."""

    def function(x: Any) -> Any:
        with converted.replay.replayed():
            return given(x, call.args, call.kwargs)

    return function
