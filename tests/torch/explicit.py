"""The oracle: the same function with its captured values threaded by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from freevars.torch import closure_convert

Explicit = Callable[..., Any]


def fresh(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


def first(out: Any) -> Tensor:
    leaves = [
        t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad
    ]
    total = sum((t.abs() ** 2 if t.is_complex() else t * t.cos()).sum() for t in leaves)
    return total if isinstance(total, Tensor) else torch.zeros(())


def derivatives(fun: Explicit, inputs: Sequence[Tensor], order: int) -> list[Any]:
    """Value, gradient and, for order 2, the gradient of a function of the gradient."""
    out = fun(*inputs)
    scalar = first(out)
    results = [out]
    for k in range(order):
        if not scalar.requires_grad:
            break
        # Retained: what was computed before the call belongs to the caller.
        grads = torch.autograd.grad(
            scalar, inputs, create_graph=k + 1 < order, retain_graph=True, allow_unused=True
        )
        results.append(grads)
        scalar = first([g for g in grads if g is not None])
    return results


def same(got: Any, expected: Any) -> None:
    got, expected = (
        list(torch.utils._pytree.tree_leaves(got)),
        list(torch.utils._pytree.tree_leaves(expected)),
    )
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        else:
            assert (a is None) == (b is None) or not (a if a is not None else b).any()


def check(
    explicit: Explicit,
    args: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    order: int = 2,
    count: int | None = None,
) -> None:
    """`explicit(*args, *values)` against the conversion of a closure over `values`, at the
    captured values and at others."""
    converted, hoisted = closure_convert(lambda *xs: explicit(*xs, *values), *args)
    assert len(hoisted) == (len(values) if count is None else count)
    n = len(args)
    same(converted(*args, *hoisted), explicit(*args, *values))
    if len(hoisted) < len(values):
        return
    # In order of first use, which may differ from the order of `values`.
    order_of = [next(i for i, v in enumerate(values) if _aliases(h, v)) for h in hoisted]
    others = [_other(t) for t in (*args, *values)]
    position = [n + i for i in order_of]

    def reordered(*xs: Any) -> Any:
        return converted(*xs[:n], *(xs[p] for p in position))

    same(derivatives(reordered, others, order), derivatives(explicit, others, order))


def _aliases(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _other(t: Tensor) -> Tensor:
    return (t.detach() + 0.1 * torch.rand_like(t.detach())).requires_grad_()
