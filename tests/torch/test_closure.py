"""A Closure is a value: callable, a pytree, an argument of every torch.func transform."""

import gc
import weakref
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn

from freevars.torch import CaptureError, Closure, StructureError
from tests.torch.explicit import fresh, same

f = torch.func
pytree = torch.utils._pytree


def make(x: Tensor) -> tuple[Closure, Tensor, Tensor]:
    w, v = fresh(3, grad=False), fresh(3, grad=False)
    k = torch.tensor([2, 0, 1])
    return Closure(lambda x: ((x * w)[k].sin() * v).sum(), x), w, v


def explicit(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return ((x * w)[torch.tensor([2, 0, 1])].sin() * v).sum()


def test_values_and_call() -> None:
    x = fresh(3, grad=False)
    c, w, v = make(x)
    same(c(x), explicit(x, w, v))
    same(c.values, [w, v])
    assert "2 captured values" in repr(c)
    assert c.in_struct[0].shape == (3,)
    assert c.out_struct.shape == ()
    assert c.out_struct.dtype is torch.float64


def test_is_a_pytree() -> None:
    x = fresh(3, grad=False)
    c, w, v = make(x)
    leaves, spec = pytree.tree_flatten(c)
    same(leaves, [w, v])
    doubled = pytree.tree_map(lambda t: 2 * t, c)
    assert isinstance(doubled, Closure)
    same(doubled(x), explicit(x, 2 * w, 2 * v))
    assert pytree.tree_structure(doubled) == spec
    assert pytree.tree_structure(make(x)[0]) != spec
    same(optree.tree_leaves(c), [w, v])
    same(optree.tree_map(lambda t: 2 * t, c)(x), explicit(x, 2 * w, 2 * v))
    shapes = pytree.tree_map(lambda t: t.shape, c)
    with pytest.raises(StructureError):
        shapes(x)


@pytest.mark.parametrize(
    "transform", ["grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "vmap", "vmap of grad"]
)
def test_is_an_argument_of_transforms(transform: str) -> None:
    x = fresh(3, grad=False)
    c, w, v = make(x)

    def ours(c: Closure, x: Tensor) -> Tensor:
        return c(x)

    def theirs(p: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return explicit(x, *p)

    p = (w, v)

    def stacked(p: Any) -> Any:
        return pytree.tree_map(lambda t: torch.stack([t, t.cos()]), p)

    apply: dict[str, Any] = {
        "grad": lambda g, p: f.grad(g)(p, x),
        "vjp": lambda g, p: f.vjp(g, p, x)[1](torch.ones((), dtype=torch.float64)),
        "jvp": lambda g, p: f.jvp(g, (p, x), (pytree.tree_map(torch.cos, p), x)),
        "jacrev": lambda g, p: f.jacrev(g)(p, x),
        "jacfwd": lambda g, p: f.jacfwd(g)(p, x),
        "hessian": lambda g, p: f.hessian(g)(p, x),
        "vmap": lambda g, p: f.vmap(g, in_dims=(0, None))(stacked(p), x),
        "vmap of grad": lambda g, p: f.vmap(f.grad(g), in_dims=(0, None))(stacked(p), x),
    }
    same(apply[transform](ours, c), apply[transform](theirs, p))


def test_a_closure_that_calls_closures() -> None:
    x, w, v = fresh(3, grad=False), fresh(3, grad=False), fresh(3, grad=False)

    def outer(x: Tensor) -> Tensor:
        inner = Closure(lambda y: (y * w).sin(), x)
        return f.grad(lambda inner: (inner(x) * v).sum())(inner).values[0].sum()

    def by_hand(w: Tensor, v: Tensor) -> Tensor:
        return f.grad(lambda u: ((x * u).sin() * v).sum())(w).sum()

    c = Closure(outer, x)
    same(c.values, [w, v])
    got = f.grad(lambda c: c(x))(c)
    same(got.values, f.grad(by_hand, (0, 1))(w, v))


def test_modules() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = fresh(5, 3, grad=False)
    expected = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    for c in (Closure(net, x), Closure.from_module(net)):
        same(c(x), net(x))
        same(torch.autograd.grad(c(x).sum(), list(net.parameters())), expected)
        same(f.grad(lambda c: c(x).sum())(c).values, expected)
    same(Closure.from_module(net)(x[:2]), net(x[:2]))
    with pytest.raises(StructureError, match=r"args\[0\] expected float64\[5, 3\]"):
        Closure(net, x)(x[:2])


def test_a_closure_without_buffers_has_derivatives_beside_a_batch_norm() -> None:
    net, x = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval(), torch.randn(4, 2)
    f = Closure(net, x, hoist="differentiable")
    found = torch.func.grad(lambda f: f(x).square().sum())(f).values
    right = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("wrapped", ["no", "yes"])
def test_what_is_unfrozen_later_gets_its_derivative(wrapped: str) -> None:
    net = nn.Linear(2, 1).requires_grad_(False)
    x = fresh(3, 2, grad=False).float()
    c = Closure(net if wrapped == "no" else lambda x: 2 * net(x), x)
    net.requires_grad_(True)
    c(x).sum().backward()
    scale = 1 if wrapped == "no" else 2
    same(net.weight.grad, scale * x.sum(0, keepdim=True))
    same(net.bias.grad, torch.tensor([scale * 3.0]))
    # And a frozen one as an argument of a function that reads it.
    w = fresh(3, grad=False)
    square = Closure(lambda x: x * w, w)
    same(square(w), w * w)
    w.requires_grad_(True)
    same(f.grad(lambda w: square(w).sum())(w), w)


@pytest.mark.parametrize("how", ["data", "set_", "to", "vector_to_parameters"])
def test_a_tensor_whose_memory_was_replaced_is_no_longer_the_one_of_the_conversion(how) -> None:
    net = nn.Linear(2, 1)
    x = torch.randn(3, 2)
    c = Closure(lambda x: 2 * net(x), x)
    at_rest = Closure(net, x)
    new = torch.arange(2.0)[None]
    if how == "data":
        net.weight.data = new
    elif how == "set_":
        with torch.no_grad():
            net.weight.set_(new)
    elif how == "to":
        net.double()
        x = x.double()
    else:
        nn.utils.vector_to_parameters(torch.arange(3.0), net.parameters())
    with pytest.raises(CaptureError, match=r"net.weight.*whose data was replaced"):
        c(torch.randn(3, 2))
    if how != "to":
        same(at_rest(x), net(x))  # which stand for themselves
        same(Closure(lambda x: 2 * net(x), x)(x), 2 * net(x))


def test_memory_that_moves_under_a_tensor_is_the_same() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    c = Closure(lambda x: w * x, w.detach())
    at = w.data_ptr()
    w.share_memory_()
    assert w.data_ptr() != at
    with torch.no_grad():
        w.mul_(2)
    same(c(torch.ones(2)), w)


def test_errors_are_those_of_the_conversion() -> None:
    w = fresh(3)
    with pytest.raises(CaptureError, match="in place"):
        Closure(lambda x: w.data.add_(x), fresh(3))


class Scaled(torch.autograd.Function):
    """A rule that takes the values of a Closure: halves the derivatives, to be told apart."""

    @staticmethod
    def forward(ctx: Any, c: Closure, x: Tensor, *values: Tensor) -> Tensor:
        ctx.c, ctx.x = c, x
        ctx.save_for_backward(*values)
        return pytree.tree_unflatten(list(values), pytree.tree_structure(c))(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        def call(*values: Tensor) -> Tensor:
            return pytree.tree_unflatten(list(values), pytree.tree_structure(ctx.c))(ctx.x)

        return (
            None,
            None,
            *(
                g * t / 2
                for t in f.grad(call, tuple(range(len(ctx.saved_tensors))))(*ctx.saved_tensors)
            ),
        )


def test_through_a_custom_function() -> None:
    x, w = fresh(3, grad=False), fresh(3)
    c = Closure(lambda x: (x * w).sin().sum(), x)
    (g,) = torch.autograd.grad(Scaled.apply(c, x, *c.values), w)
    same(g, (x * w).cos() * x / 2)


def test_nothing_is_retained() -> None:
    gc.disable()
    try:
        x = fresh(3, grad=False)
        c, w, v = make(x)
        c(x)
        refs = [weakref.ref(t) for t in (w, v, c)]
        del c, w, v
        assert [r() for r in refs] == [None, None, None]
    finally:
        gc.enable()
