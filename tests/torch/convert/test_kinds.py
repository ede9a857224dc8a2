"""What a captured tensor may be, and what may be around it: subclasses, named tuples, retention."""

import gc
import subprocess
import sys
import weakref
from collections import namedtuple
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from freevars.torch import argmin, closure_convert
from tests.torch.convert.test_convert import CASES
from tests.torch.explicit import check, first, fresh, same

f = torch.func
F64 = torch.float64


# --- subclasses


class Scaled(Tensor):
    """A subclass with its own `__torch_function__`: each addition counts twice."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out * 2 if func is Tensor.add else out


def test_a_subclass_with_a_behaviour_of_its_own() -> None:
    w, x = fresh(3, grad=False).as_subclass(Scaled).requires_grad_(), fresh(3)
    fun = lambda x: w.add(x) * x
    converted, hoisted = closure_convert(fun, x)
    assert len(hoisted) == 1
    other = fresh(3, grad=False).as_subclass(Scaled).requires_grad_()
    same(converted(x, other), 2 * (other.as_subclass(Tensor) + x) * x)
    same(
        torch.autograd.grad(converted(x, *hoisted).sum(), [x, w]),
        torch.autograd.grad(fun(x).sum(), [x, w]),
    )


def test_a_subclass_of_two_tensors() -> None:
    """Its operations run in `__torch_dispatch__`, on tensors inside of it."""
    a, b, x = fresh(3, grad=False), fresh(3, grad=False), fresh(3)
    w = TwoTensor(a, b).requires_grad_()
    converted, hoisted = closure_convert(lambda x: (x * w).sin(), x)
    got = torch.autograd.grad(converted(x, *hoisted).sum(), [x, *hoisted])
    expected = torch.autograd.grad((x * w).sin().sum(), [x, w])
    for g, e in zip(got, expected, strict=True):
        same([g.a, g.b], [e.a, e.b])
    other = converted(x, TwoTensor(b, a).requires_grad_())
    same([other.a, other.b], [(x * b).sin(), (x * a).sin()])


# --- named tuples


class Point(NamedTuple):
    a: Tensor
    b: Tensor


Pair = namedtuple("Pair", "a b")  # noqa: PYI024 (the plain named tuple is the case)


@pytest.mark.parametrize("kind", [Point, Pair, lambda a, b: torch.stack([a, b]).max(0)])
def test_named_tuples(kind: Any) -> None:
    """Made inside, of PyTorch's own kind too: an argument of an operation, and returned."""

    def explicit(x: Tensor, w: Tensor, v: Tensor) -> Any:
        pair = kind(w * 2, v)
        assert hasattr(pair, "_fields") == (kind in {Point, Pair})
        return {"whole": torch.cat([*pair]), "stacked": torch.cat(pair)[:3] * x, "as it is": pair}

    check(explicit, [fresh(3)], [fresh(3), fresh(3)])


def test_a_named_tuple_of_captured_tensors() -> None:
    w, v, x = fresh(3), fresh(3), fresh(3)
    for make in (Point, Pair):
        held = make(w, v)

        def fun(p: Any, held: Any = held) -> Any:
            return type(p)(torch.stack(held).prod(0) * p.a, held.b * p.b)

        converted, hoisted = closure_convert(fun, make(x, x))
        assert [h.data_ptr() for h in hoisted] == [w.data_ptr(), v.data_ptr()]
        out = converted(make(x, w), x, w)
        assert type(out) is make
        same([*out], [x * w * x, w * w])
    found = torch.stack([w, v]).max(0)  # of PyTorch's own kind
    converted, hoisted = closure_convert(lambda x: torch.cat(found)[:3] * x, x)
    assert [h.data_ptr() for h in hoisted] == [found.values.data_ptr()]
    same(converted(x, v), v * x)


# --- nothing is retained


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_retained(name: str) -> None:
    """Not until the next collection either, whatever runs inside."""
    explicit, n, _ = CASES[name]

    def run() -> list[weakref.ref[Any]]:
        values, x = [fresh(3) for _ in range(n)], fresh(3)
        fun = lambda x: explicit(x, *values)
        converted, hoisted = closure_convert(fun, x)
        first(converted(x, *hoisted)).backward()
        return [weakref.ref(t) for t in (*values, fun, converted)]

    run()  # PyTorch keeps what the first run in a process meets, while it loads more of itself
    gc.disable()
    try:
        assert [ref() for ref in run()] == [None] * (n + 2)
    finally:
        gc.enable()


# --- optree


@pytest.mark.slow
def test_without_optree() -> None:
    code = """
import sys; sys.modules["optree"] = None
import torch, freevars.torch as fv
w = torch.ones(2)
c = fv.Closure(lambda x: x * w, w)
print(torch.utils._pytree.tree_map(lambda t: 2 * t, c)(w))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "tensor([2., 2.])\n"


# --- bilevel in bilevel


@argmin
def least(fun: Any, x0: Tensor) -> Tensor:
    """One step of Newton's method, which solves a quadratic problem."""
    return x0 - torch.linalg.solve(f.hessian(fun)(x0), f.grad(fun)(x0))


@pytest.mark.slow
def test_three_levels() -> None:
    """x(y) = a y, y(z) = a z / (1 + a^2), z = argmin (y - 1)^2 + z^2."""
    zero = torch.zeros(2, dtype=F64)

    def solve(a: Tensor) -> Tensor:
        def follow(y: Tensor) -> Tensor:
            return least(lambda x: ((x - a * y) ** 2).sum(), zero)

        def middle(z: Tensor) -> Tensor:
            return least(lambda y: ((follow(y) - z) ** 2).sum() + (y**2).sum(), zero)

        return least(lambda z: ((middle(z) - 1) ** 2).sum() + (z**2).sum(), zero)

    def exact(a: Tensor) -> Tensor:
        k = a / (1 + a**2)
        return k / (1 + k**2)

    a = torch.tensor([0.7, 1.3], dtype=F64, requires_grad=True)
    same(solve(a), exact(a))
    same(torch.autograd.grad(solve(a).sum(), a), torch.autograd.grad(exact(a).sum(), a))
    same(f.jvp(solve, (a.detach(),), (zero + 1,)), f.jvp(exact, (a.detach(),), (zero + 1,)))
