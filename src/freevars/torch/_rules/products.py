"""Products with a derivative J, in reverse mode only; differentiable where a graph is wanted.

Not here: products with what was recorded (`derivative.py`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from freevars.torch import _compat

__all__ = ["jvp", "linearised", "paired", "value_and_jacobian", "value_and_vjps", "vjp", "vjps"]

Fun = Callable[..., Tensor]
Pull = Callable[[Tensor], Sequence[Tensor]]


def vjp(fun: Fun, x: Tensor, cotangent: Tensor) -> Tensor:
    """`J^T u` for the derivative `J` of `fun` at `x`."""
    return vjps(fun, [x], cotangent)[0]


def vjps(fun: Fun, inputs: Sequence[Tensor], cotangent: Tensor) -> Sequence[Tensor]:
    """The same for each of the inputs."""
    return value_and_vjps(fun, inputs, cotangent)[1]


def value_and_vjps(
    fun: Fun, inputs: Sequence[Tensor], cotangent: Tensor
) -> tuple[Tensor, Sequence[Tensor]]:
    """The value, and the same."""
    if _compat.functorch_active():
        return _under_transforms(fun, inputs, cotangent)
    out, pull = _pullback(fun, inputs)
    return out, pull(cotangent)


def value_and_jacobian(fun: Fun, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A real vector, and J: a matrix for each input, with a leading axis over the vector."""
    out, pull = _pullback(fun, inputs)
    units = torch.eye(out.numel(), dtype=out.dtype, device=out.device)
    rows = [pull(unit) for unit in units] or [[t.new_zeros((0, *t.shape)) for t in inputs]]
    join = torch.stack if len(units) else torch.cat
    return out, [join(each) for each in zip(*rows, strict=True)]


def linearised(fun: Fun, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`fun(x)`, and `u -> J^T u` there, for any number of `u`: constants."""
    with torch.no_grad():
        out, pull = _pullback(fun, [x])
    return out.detach(), lambda u: pull(u)[0].detach()


def jvp(fun: Fun, inputs: Sequence[Tensor], tangents: Sequence[Tensor], *, like: Tensor) -> Tensor:
    """`J t`, as the derivative of `u -> J^T u`, which is linear; `like` has the shape of the
    result."""
    u = torch.zeros_like(like)
    if not inputs:
        return u
    return vjp(lambda u: paired(vjps(fun, inputs, u), tangents), u, u.new_ones(()))


def paired(cotangents: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """The sum of their products, a real number."""
    products = [(g.conj() * t).real.sum() for g, t in zip(cotangents, tangents, strict=True)]
    return sum(products[1:], products[0])


def _pullback(fun: Fun, inputs: Sequence[Tensor]) -> tuple[Tensor, Pull]:
    """The value, and `u -> J^T u`, which evaluates `fun` again under a torch.func transform."""
    if _compat.functorch_active():
        return fun(*inputs), lambda u: _under_transforms(fun, inputs, u)[1]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Where no graph is wanted, that behind the inputs plays no part. And a tensor of a
        # transform that is over may say that it requires grad while its alias does not.
        aliases = [t.view_as(t) if again and t.requires_grad else t for t in inputs]
        aliases = [t if again and t.requires_grad else t.detach().requires_grad_() for t in aliases]
        out = fun(*aliases)

    def pull(u: Tensor) -> Sequence[Tensor]:
        if not out.requires_grad:
            return [torch.zeros_like(t) for t in inputs]
        return torch.autograd.grad(
            out, aliases, u, create_graph=again, retain_graph=True, materialize_grads=True
        )

    return (out if again else out.detach()), pull


def _under_transforms(
    fun: Fun, inputs: Sequence[Tensor], cotangent: Tensor
) -> tuple[Tensor, Sequence[Tensor]]:
    """By `torch.func.grad`, not the pullback of `torch.func.vjp`: nothing of this level outlives
    the call."""

    def pairing(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out = fun(*inputs)
        return (out * cotangent).sum(), out

    grads, out = torch.func.grad(pairing, tuple(range(len(inputs))), has_aux=True)(*inputs)
    return out, grads
