"""The implicit function theorem as one differentiable operation, for every order, mode and
torch.func transform: it evaluates F again.

Where A = F_x is regular, the root x of F(x, *values) = 0 is a function of the values (Blondel et
al. 2022, "Efficient and Modular Implicit Differentiation", eq. 2): A dx + F_v dv = 0. Hence, with
cotangent `g` of `x` and tangents `t` of the values,

    reverse:  A^T u = g,      cotangent of v = -F_v^T u
    forward:  A dx  = -F_v t

Both linear systems are conditions again, linear in the unknown. So they are solved by the same
operation, which makes derivatives of any order: nothing here is differentiated by hand twice. `x`
in the formulas is the operation's own output, which depends on the values.

Not here: a first derivative in PyTorch's own reverse mode, which needs no second evaluation
(`record.py`), and batches of conditions (`batch.py`).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from freevars._sequences import replaced
from freevars.torch import _compat, _modes
from freevars.torch._rules.autocast import Autocast
from freevars.torch._rules.forms import is_smooth
from freevars.torch._rules.products import jvp, vjps
from freevars.torch._rules.unsupported import check_forward_mode

__all__ = ["Solvable", "implicit", "pull_back"]

# A solution in a list of tensors: x, the recorded F, the completing columns (see `condition.py`).
_PARTS = 3


class Solvable(Protocol):
    """What `implicit` solves: a condition, or a linear system of one."""

    constants: frozenset[int]
    """The positions of values that the root does not depend on, or not differentiably."""

    others: frozenset[int]
    """Those of them that it does not depend on if it is a root: to be asked where one moves."""

    def residual(self, x: Tensor, columns: Tensor, /, *values: Tensor) -> Tensor:
        """The optimality function, differentiable to any order."""

    def solve(self, *values: Tensor) -> tuple[Tensor, ...]:
        """A solution and whatever tensors come with it, from plain tensors; no derivative is taken
        of this."""

    def system(self, values: tuple[Tensor, ...], b: Tensor, *, transposed: bool) -> Tensor:
        """`u` with A u = b, or A^T u = b, differentiable; `values` begin with the solution."""

    def compare(self, now: Tensor, recorded: Tensor) -> None:
        """Refuses a value of the function that is not what was recorded."""

    def solve_batch(
        self, size: int, dims: Sequence[int | None], *values: Tensor
    ) -> tuple[Tensor, ...]:
        """What `implicit` gives for `size` of it at once, each tensor with the new axis in front;
        the values have one more axis where `dims` says."""


def implicit(condition: Solvable, *values: Tensor) -> tuple[Tensor, ...]:
    """A solution, whose root is differentiable in the values to any order and in forward mode, and
    what comes with it, which is constant."""
    out: tuple[Tensor, ...] = _Implicit.apply(condition, *values)  # type: ignore[no-untyped-call]
    return out


class _Implicit(torch.autograd.Function):
    """Takes `(condition, *values)`, gives `(x, *others)`."""

    @staticmethod
    def forward(condition: Solvable, *values: Tensor) -> tuple[Tensor, ...]:
        # The solver may use autograd as it likes: it sees copies without history.
        plain = tuple(_compat.not_inference(v.detach()) for v in values)
        with _modes.solver_running():
            return tuple(t.detach() for t in condition.solve(*plain))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.condition, *values = inputs
        ctx.autocast = Autocast.now(values)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.n_others = len(output) - 1
        saved = (*output[:_PARTS], *values)
        ctx.save_for_backward(*saved)
        if _compat.transforms_active():
            # This one is a cycle: it would live until the next collection.
            ctx.save_for_forward(*saved)

    @staticmethod
    @_compat.uncompiled
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Any:
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        if _compat.is_legacy_batched(g):
            message = (
                "expected torch.func.hessian for a second derivative of a rule, got many cotangents"
                " at once by torch.autograd.grad(is_grads_batched=True) or"
                " torch.autograd.functional.hessian(vectorize=True), whose vmap of old cannot run"
                " the linear system. Without vectorize= they are taken one by one."
            )
            raise NotImplementedError(message)  # a RuntimeError: a rule outside goes on row by row
        saved = ctx.saved_tensors
        if not _modes.active():
            # The pullback of `torch.func.vjp` runs when its transform is over. While a conversion
            # looks on, what a wrapper holds would be a tensor that nobody was seen to make.
            saved = [_compat.without_ended(t) for t in saved]
        with ctx.autocast.again():
            return None, *pull_back(ctx.condition, saved, g, ctx.needs_input_grad[1:])

    @staticmethod
    @_compat.uncompiled
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        # PyTorch calls this with forward mode off, which would also lose the tangents of every
        # outer transform. On again, the tangents of this one must be taken off, or this rule
        # calls itself.
        primal = _compat.primal_and_tangent
        check_forward_mode(tangents[1:])
        with _compat.forward_mode(True):
            saved = [primal(t).primal for t in ctx.saved_tensors]
            x, _, columns, *values = saved
            wanted = [i for i in _smooth(ctx.condition, values) if tangents[i + 1] is not None]
            some = [primal(tangents[i + 1]).primal for i in wanted]

            def residual(*inputs: Tensor) -> Tensor:
                return ctx.condition.residual(x, columns, *replaced(values, wanted, inputs))  # type: ignore[no-any-return]

            r = jvp(residual, [values[i] for i in wanted], some, like=x)
            dx = ctx.condition.system(tuple(saved), -r, transposed=False)
            # Where a value moves on which a solution does not depend, x must be one; and where F at
            # x does not see its values move: elsewhere it may.
            others = [tangents[i + 1] for i in ctx.condition.others]
            others = [primal(t).primal for t in others if t is not None]
            asked = (_moves(some, x) & ~_moves([r], x)) | _moves(others, x)
            if bool(_compat.innermost(asked).any()):
                asked = asked.to(x.dtype).expand_as(x)
                dx = dx + 0 * ctx.condition.system(tuple(saved), asked, transposed=False)
            return dx, *(None,) * ctx.n_others

    @staticmethod
    @_compat.uncompiled
    def vmap(info: Any, in_dims: Any, condition: Solvable, *values: Tensor) -> Any:
        out = condition.solve_batch(info.batch_size, in_dims[1:], *values)
        return out, (0,) * len(out)


def _moves(tangents: Sequence[Tensor], like: Tensor) -> Tensor:
    """Whether one of the tangents is not zero: Bool[Tensor, ""] on the device of `like`."""
    if not tangents:
        return torch.zeros((), dtype=torch.bool, device=like.device)
    return torch.stack([(t != 0).any() for t in tangents]).any()


def pull_back(
    condition: Solvable, saved: Sequence[Tensor], g: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The cotangents of the values, differentiable again; `saved` is a solution and the values."""
    x, f, columns, *values = saved
    u = condition.system(tuple(saved), g, transposed=True)
    wanted = [i for i in _smooth(condition, values) if needed[i]]

    def residual(*some: Tensor) -> Tensor:
        out = condition.residual(x, columns, *replaced(values, wanted, some))
        if not _compat.transforms_active():
            condition.compare(out.detach(), f)
        return out

    grads: list[Tensor | None] = [None] * len(values)
    if wanted:
        found = vjps(residual, [values[i] for i in wanted], u)
        for i, grad in zip(wanted, found, strict=True):
            grads[i] = -grad
    return grads


def _smooth(condition: Solvable, values: Sequence[Tensor]) -> list[int]:
    """The positions of the values that the root depends on differentiably."""
    smooth = (i for i, v in enumerate(values) if is_smooth(v))
    return [i for i in smooth if i not in condition.constants]
