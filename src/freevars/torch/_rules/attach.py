"""A solution as a function of what a recorded F reads.

F is evaluated once at the solution with a graph, at a leaf of its own, as in a handwritten
deep-equilibrium layer. In the backward pass, A^T u = g is solved with vector-Jacobian products of
that graph, and -u is sent into it: the derivative flows into everything that the graph reaches,
under the modes and with the random numbers of the forward pass, and the function does not run
again.

With `create_graph=True` the values get the cotangents in place of the graph, by a second
evaluation (`implicit.py`): there x depends on the values, while the recorded leaf does not.

Not here: what F is evaluated from (`record.py`, `batch.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from freevars.torch import _compat
from freevars.torch._rules.autocast import Autocast
from freevars.torch._rules.comparison import compare_derivatives
from freevars.torch._rules.condition import Condition, Solution
from freevars.torch._rules.implicit import pull_back
from freevars.torch._rules.sharded import no_gradient
from freevars.torch._rules.sizes import PARTS
from freevars.torch._rules.unsupported import check_not_exported

__all__ = ["attached", "record"]


def record(
    condition: Condition, equations: Callable[[Tensor], Tensor], x: Tensor, x0: Tensor
) -> Tensor:
    """F at a solution with a graph, which the condition keeps; from plain x and x0."""
    check_not_exported(condition.rule.name)
    leaf = x.clone().requires_grad_()
    is_tiny = condition.rule.check and _is_tiny(x, condition.start(x0))
    condition.saved = _compat.Saved()
    with condition.constants_as_they_are():
        with condition.saved.collecting(), _compat.for_many_passes():
            f = equations(leaf)
        if is_tiny:
            with torch.no_grad():
                condition.nearby = [equations((1 - part) * x).detach() for part in PARTS]
    condition.recorded = (leaf, f)
    return f


def attached(
    condition: Condition, columns: Tensor, values: Sequence[Tensor], behind: Sequence[Tensor] = ()
) -> Tensor:
    """The solution at which F was recorded, with its derivative. A derivative with respect to a
    tensor of `values` or `behind` that F does not read has the solution checked."""
    assert condition.recorded is not None  # noqa: S101 (for the type checker)
    leaf, f = condition.recorded
    given = (condition, len(values), leaf, f, columns, *values, *behind)
    out: Tensor = _Attach.apply(*given)  # type: ignore[no-untyped-call]
    return out


def _is_tiny(x: Tensor, x0: Tensor) -> bool:
    """Whether a problem's whole solution is tiny next to how far the solver came."""
    if not x.numel() or x.is_meta:
        return False
    size, way = x.abs().amax(1), (x - x0).abs().amax(1)
    return bool(((size > 0) & (size <= torch.finfo(x.dtype).eps ** 0.5 * way)).any())


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        condition: Condition,
        n: int,
        leaf: Tensor,
        f: Tensor,
        columns: Tensor,
        *values: Tensor,
    ) -> Tensor:
        ctx.condition, ctx.autocast = condition, Autocast.now([leaf])
        ctx.set_materialize_grads(False)
        out = leaf.detach().clone()
        ctx.save_for_backward(out, leaf, f, columns, *values[:n])
        return out

    @staticmethod
    @_compat.uncompiled
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        condition = ctx.condition
        x, leaf, f, columns, *values = ctx.saved_tensors
        condition.saved.restore()
        n, needed = len(values), ctx.needs_input_grad[5:]
        behind = (None,) * (len(needed) - n)
        if torch.is_grad_enabled():
            saved = (x, f.detach(), columns, *values)
            with ctx.autocast.again():
                grads = pull_back(condition, saved, g, needed[:n])
            with torch.no_grad():
                _compare(condition, Solution(leaf, f, columns), values, g, grads)
            return None, None, None, no_gradient(f), None, *grads, *behind
        u = _Answer.apply(condition, Solution(leaf, f, columns), values, g)  # type: ignore[no-untyped-call]
        return None, None, None, -u.to(f.dtype), None, *(None,) * n, *behind


def _compare(
    condition: Condition, at: Solution, values: list[Tensor], g: Tensor, grads: list[Tensor | None]
) -> None:
    """Refuses cotangents from a second evaluation that differ from those of the recorded graph: a
    change in what the function reads may affect its derivative but not its value."""
    read = condition.read(values)
    wanted = [i for i, grad in enumerate(grads) if grad is not None and values[i].requires_grad]
    if not wanted or _compat.transforms_active():
        return
    u = condition.linear(True, at, tuple(values), g)
    # One captured tensor may be computed from another: both sides include all paths.
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
            condition.unknown.dtype,
            condition.rule.name,
        )


class _Answer(torch.autograd.Function):
    """`u` with A^T u = g, also for many `g` at once, as `is_grads_batched=True` gives them."""

    @staticmethod
    def forward(condition: Condition, at: Solution, values: list[Tensor], g: Tensor) -> Tensor:
        return condition.linear(True, at, tuple(values), g)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    @_compat.uncompiled
    def vmap(
        info: Any, in_dims: Any, condition: Condition, at: Solution, values: list[Tensor], g: Tensor
    ) -> tuple[Tensor, int]:
        del info
        g = g.movedim(in_dims[-1], 0)
        shape = g.shape
        u = condition.linear(True, at, tuple(values), g.reshape(-1, *shape[-2:]))
        return u.reshape(shape), 0
