"""Compositions and messages of `closure_convert` that have no test elsewhere."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from freevars.torch import CaptureError, captures, closure_convert
from tests.torch.explicit import check, fresh, same


@pytest.mark.parametrize("in_place", [False, True])
def test_foreach(*, in_place: bool) -> None:
    def explicit(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        own = [x * w, x.sin()]
        if in_place:
            torch._foreach_mul_(own, [v, w])
        else:
            own = torch._foreach_mul(own, [v, w])
        return own[0] * own[1]

    check(explicit, [fresh(3)], [fresh(3), fresh(3)])


# PyTorch warns that it is a beta.
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_captured_sparse_constant_is_read(layout: Any) -> None:
    m = fresh(3, 3, grad=False).to_sparse(layout=layout)

    def explicit(x: Tensor, w: Tensor) -> Tensor:
        return m @ (x * w)

    check(explicit, [fresh(3)], [fresh(3)])


def test_a_sparse_gradient_of_a_hoisted_value() -> None:
    table, rows = torch.nn.Embedding(5, 3, sparse=True), torch.tensor([1, 3])
    converted, hoisted = closure_convert(lambda rows: 2 * table(rows), rows)
    converted(rows, *hoisted).sum().backward()
    grad = table.weight.grad
    assert grad is not None
    assert grad.is_sparse
    right = torch.zeros(5, 3).index_fill(0, rows, 2.0)
    torch.testing.assert_close(grad.to_dense(), right)


def test_a_branch_of_a_loop_and_a_container_in_an_attribute() -> None:
    def explicit(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        for k in range(5):
            if (x * w).sum() > k:
                return x.cos() * v * w
            x = x * w + v
        return x * v

    check(explicit, [fresh(3)], [fresh(3), fresh(3)])


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda x, w: w.data.add_(x), "Write to a clone"),
        (lambda x, w: (x * w).sum().backward(), "Use torch.autograd.grad"),
        (lambda x, w: torch.cond(x.sum() > 0, lambda: x * w, lambda: x - w), "Use Python's own if"),
    ],
)
def test_a_refusal_says_what_to_do(write: Any, text: str) -> None:
    w, x = fresh(3), fresh(3, grad=False)
    with pytest.raises(CaptureError, match=text) as caught:
        closure_convert(lambda x: write(x, w), x)
    assert isinstance(caught.value, TypeError)
    assert str(caught.value).startswith("expected ")
    assert "test_composition.py:" in str(caught.value)


def test_not_hoisted_says_what_to_do() -> None:
    hidden, take = fresh(3), False
    converted, hoisted = closure_convert(lambda x: x * hidden if take else x, fresh(3))
    take = True
    with pytest.raises(CaptureError, match=r"hidden .*convert again.*or detach") as caught:
        converted(fresh(3), *hoisted)
    assert "got a tensor that could carry a derivative" in str(caught.value)


def test_tangents_at_every_level_are_no_foreign_reads() -> None:
    """What is derived inside a transform has a tangent that may itself require a gradient."""
    w, x = fresh(3), fresh(3)

    def solve(w: Tensor, hoist: Any) -> Tensor:
        derived = w.exp()
        converted, hoisted = closure_convert(lambda x: (x * derived).sin().sum(), x, hoist=hoist)
        return converted(x, *hoisted)

    f = torch.func
    for hoist in ("differentiable", "floating", "all"):
        got = f.jacfwd(f.jacfwd(lambda w: solve(w, hoist)))(w)
        same(got, f.hessian(lambda w: (x * w.exp()).sin().sum())(w))


NUMBERS = np.array([1.0, -2.0, 3.0])
MAKES: dict[str, Any] = {
    "asarray": lambda: torch.asarray(NUMBERS),
    "asarray of a list": lambda: torch.asarray([1.0, -2.0, 3.0], dtype=torch.float64),
    "as_tensor": lambda: torch.as_tensor(NUMBERS),
    "as_tensor of a list": lambda: torch.as_tensor([1.0, -2.0, 3.0], dtype=torch.float64),
    "tensor": lambda: torch.tensor(NUMBERS),
    "from_numpy": lambda: torch.from_numpy(NUMBERS),
    "frombuffer": lambda: torch.frombuffer(NUMBERS, dtype=torch.float64),
    "from_dlpack": lambda: torch.from_dlpack(NUMBERS),
}


@pytest.mark.parametrize("hoist", ["differentiable", "floating", "all"])
@pytest.mark.parametrize("name", MAKES)
def test_a_tensor_made_of_numpy_memory_is_no_capture(name: str, hoist: Any) -> None:
    make, w, x = MAKES[name], fresh(3), fresh(3)
    converted, hoisted = closure_convert(lambda x: (make() * w * x).sin(), x, hoist=hoist)
    assert [h.data_ptr() for h in hoisted] == [w.data_ptr()]
    same(converted(x, x), (torch.tensor(NUMBERS) * x * x).sin())
    assert [c.name for c in captures(lambda x: make() * w * x, x, hoist=hoist).values] == ["w"]
    held = make()
    _, hoisted = closure_convert(lambda x: held * w * x, x, hoist="all")
    assert [h.data_ptr() for h in hoisted] == [held.data_ptr(), w.data_ptr()]


def test_a_leaf_that_hooks_for_saved_tensors_give_back() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, converted: Any, *given: Tensor) -> Any:
            ctx.converted = converted
            ctx.save_for_backward(*given)
            return converted(*given)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            given = ctx.saved_tensors  # the leaves as other objects
            with torch.enable_grad():
                value = ctx.converted(*given)
            return None, *torch.autograd.grad(value, given, g)

    w = fresh(3)
    converted, hoisted = closure_convert(lambda x: x * x * w, fresh(3))
    for given in ([fresh(3), *hoisted], [fresh(3), fresh(3)]):
        with torch.autograd.graph.save_on_cpu():
            y = Product.apply(converted, *given)
        x, v = given
        same(torch.autograd.grad(y.sum(), given), (2 * x * v, x * x))


def test_a_conversion_in_a_checkpoint_in_another() -> None:
    w, x = fresh(3), fresh(3)

    def layer(x: Tensor) -> Tensor:
        converted, hoisted = closure_convert(lambda y: y * x * w, x)
        return converted(x, *hoisted)

    def outer(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    y = checkpoint(outer, x, use_reentrant=False)
    same(torch.autograd.grad(y.sum(), (x, w)), (2 * x * w, x * x))
