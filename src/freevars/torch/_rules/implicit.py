"""The implicit function theorem as one differentiable operation.

A problem has a residual `F(x, *values)` and a way to find `x` with `F = 0`. Where `F_x` is
regular, `x` is a function of the values (Blondel et al. 2022, "Efficient and Modular Implicit
Differentiation", eq. 2): `F_x dx + F_v dv = 0`. Hence, with cotangent `g` of `x` and tangents `t`
of the values,

    reverse:  F_x^T u = g,        cotangent of v = -F_v^T u
    forward:  F_x dx  = -F_v t

Both linear systems are problems again, linear in the unknown, with values `(x, *values, g)`. So
they are solved by the same operation, which makes derivatives of any order: nothing here is
differentiated by hand twice. `x` in the formulas is the operation's own output, which depends on
the values.

The unknown is one real vector here. Not here: user functions, pytrees, checks (`rules.py`), and
how a linear system is solved (`linear.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from freevars.torch import _compat, _hooks

__all__ = ["Linear", "Problem", "implicit", "jvp", "vjp"]

Fun = Callable[..., Tensor]


class Problem(Protocol):
    """What `implicit` solves: `residual(x, *values) = 0`, for one real vector `x`."""

    constants: frozenset[int]
    """The positions of values that the residual does not depend on, or not continuously."""

    def residual(self, x: Tensor, /, *values: Tensor) -> Tensor:
        """The optimality function, differentiable to any order."""

    def solve(self, x0: Tensor, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A root and whatever tensors come with it, from plain tensors; no derivative is taken of
        this."""

    def linear(self, transposed: bool, x: Tensor, values: tuple[Tensor, ...], b: Tensor) -> Tensor:  # noqa: FBT001
        """`u` with `F_x u = b`, or `F_x^T u = b`, from plain tensors."""


def implicit(problem: Problem, x0: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """The root of `problem`, differentiable in the values to any order and in forward mode, and
    what comes with it, which is constant."""
    out: tuple[Tensor, ...] = _Implicit.apply(problem, x0, *values)  # type: ignore[no-untyped-call]
    return out


class Linear:
    """The system `F_x^T u = b` (or `F_x u = b`) as a problem; its values are `(x, *values, b)`."""

    def __init__(self, of: Problem, *, transposed: bool) -> None:
        self.of = of
        self.transposed = transposed
        self.constants = frozenset(i + 1 for i in of.constants)

    def residual(self, u: Tensor, /, *given: Tensor) -> Tensor:
        x, *values, b = given
        product = vjp if self.transposed else _product
        return product(lambda z: self.of.residual(z, *values), x, u) - b

    def solve(self, _: Tensor, values: tuple[Tensor, ...]) -> tuple[Tensor]:
        x, *rest = values
        return (self.of.linear(self.transposed, x, tuple(rest[:-1]), rest[-1]),)

    def linear(self, transposed: bool, _: Tensor, values: tuple[Tensor, ...], b: Tensor) -> Tensor:  # noqa: FBT001
        x, *rest = values  # the matrix of this system does not depend on its unknown
        return self.of.linear(transposed != self.transposed, x, tuple(rest[:-1]), b)


class _Implicit(torch.autograd.Function):
    """Takes `(problem, x0, *values)`, gives `(x, *others)`. `x0` gets no derivative: the root does
    not depend on it."""

    @staticmethod
    def forward(problem: Problem, x0: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        # The solver may use autograd as it likes: it sees copies without history.
        plain = tuple(v.detach() for v in values)
        with _hooks.solver_running(), torch.inference_mode(mode=False), torch.enable_grad():
            return tuple(t.detach() for t in problem.solve(x0.detach(), plain))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.problem, _, *values = inputs
        x, *others = output
        ctx.mark_non_differentiable(*others)
        ctx.n_others = len(others)
        ctx.save_for_backward(x, *values)
        if (
            _compat.transforms_active()
        ):  # this one is a cycle: it would live until the next collection
            ctx.save_for_forward(x, *values)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        x, *values = ctx.saved_tensors
        (u,) = implicit(Linear(ctx.problem, transposed=True), torch.zeros_like(g), x, *values, g)
        wanted = [i for i in _continuous(ctx.problem, values) if ctx.needs_input_grad[i + 2]]

        def residual(*some: Tensor) -> Tensor:
            return ctx.problem.residual(x, *_merged(values, wanted, some))  # type: ignore[no-any-return]

        grads: list[Tensor | None] = [None] * len(values)
        for i, grad in zip(wanted, _vjps(residual, [values[i] for i in wanted], u), strict=True):
            grads[i] = -grad
        return None, None, *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        # PyTorch calls this with forward mode off, which would also lose the tangents of every
        # outer transform. On again, the tangents of this one must be taken off, or this rule
        # calls itself.
        primal = _compat.primal_and_tangent
        with _compat.forward_mode(True):
            x, *values = (primal(t).primal for t in ctx.saved_tensors)
            wanted = [i for i in _continuous(ctx.problem, values) if tangents[i + 2] is not None]
            some = [primal(tangents[i + 2]).primal for i in wanted]

            def residual(*inputs: Tensor) -> Tensor:
                return ctx.problem.residual(x, *_merged(values, wanted, inputs))  # type: ignore[no-any-return]

            r = jvp(residual, [values[i] for i in wanted], some, like=x)
            (dx,) = implicit(
                Linear(ctx.problem, transposed=False), torch.zeros_like(r), x, *values, -r
            )
            return dx, *(None,) * ctx.n_others

    @staticmethod
    def vmap(info: Any, in_dims: Any, problem: Problem, *inputs: Tensor) -> Any:
        """One solve after the other: a solver may branch on its data and leave PyTorch."""
        dims = in_dims[1:]
        found = []
        for k in range(info.batch_size):
            one = [t if d is None else t.select(d, k) for t, d in zip(inputs, dims, strict=True)]
            found.append(implicit(problem, *one))
        out = tuple(torch.stack(same) for same in zip(*found, strict=True))
        return out, (0,) * len(out)


def _continuous(problem: Problem, values: Sequence[Tensor]) -> list[int]:
    """The positions of the values that the root depends on differentiably."""
    smooth = (i for i, v in enumerate(values) if v.is_floating_point() or v.is_complex())
    return [i for i in smooth if i not in problem.constants]


def _merged(values: Sequence[Tensor], where: Sequence[int], some: Sequence[Tensor]) -> list[Tensor]:
    merged = list(values)
    for i, t in zip(where, some, strict=True):
        merged[i] = t
    return merged


# --- products with a derivative, in reverse mode only, differentiable again


def vjp(fun: Fun, x: Tensor, cotangent: Tensor) -> Tensor:
    """`J^T u` for the derivative `J` of `fun` at `x`."""
    return _vjps(fun, [x], cotangent)[0]


def _product(fun: Fun, x: Tensor, tangent: Tensor) -> Tensor:
    return jvp(fun, [x], [tangent], like=x)


def _vjps(fun: Fun, inputs: Sequence[Tensor], cotangent: Tensor) -> Sequence[Tensor]:
    if not inputs:
        return ()
    if _compat.functorch_active():
        # Not the pullback of `torch.func.vjp`: nothing of this level outlives the call.
        grads: Sequence[Tensor] = torch.func.grad(lambda xs: (fun(*xs) * cotangent).sum())(
            tuple(inputs)
        )
        return grads
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # A tensor of a transform that is over may say that it requires grad while its alias does
        # not.
        aliases = [t.view_as(t) for t in inputs]
        aliases = [t if t.requires_grad else t.detach().requires_grad_() for t in aliases]
        out = fun(*aliases)
        if not out.requires_grad:
            return [torch.zeros_like(t) for t in inputs]
        return torch.autograd.grad(
            out, aliases, cotangent, create_graph=again, materialize_grads=True
        )


def jvp(fun: Fun, inputs: Sequence[Tensor], tangents: Sequence[Tensor], *, like: Tensor) -> Tensor:
    """`J t`, as the derivative of `u -> J^T u`, which is linear; `like` has the shape of the
    result."""
    if not inputs:
        return torch.zeros_like(like)

    def paired(u: Tensor) -> Tensor:
        grads = _vjps(fun, inputs, u)
        pairs = (
            (g.conj() * t).real if g.is_complex() else g * t
            for g, t in zip(grads, tangents, strict=True)
        )
        return torch.stack([p.sum() for p in pairs]).sum()

    if _compat.functorch_active():
        out: Tensor = torch.func.grad(paired)(torch.zeros_like(like))
        return out
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        u = torch.zeros_like(like).detach().requires_grad_()
        return torch.autograd.grad(paired(u), u, create_graph=again, materialize_grads=True)[0]
