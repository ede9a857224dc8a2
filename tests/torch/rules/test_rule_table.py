"""The problems of the rules, the same as for JAX, under the transformations of PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor

import freevars.torch as fv
from tests.rule_problems import (
    FAILURES,
    MISTAKES,
    PROBLEMS,
    A,
    B,
    Failure,
    Problem,
    RuleHost,
    check_failure,
)

f = torch.func
F64 = torch.float64


def _loop(n: int, step: Any, x: Any) -> Any:
    for _ in range(n):
        x = step(x)
    return x


HOST = RuleHost(
    xp=torch,
    fv=fv,
    array=lambda values: torch.tensor(values, dtype=F64),
    grad=f.grad,
    jacobian=f.jacrev,
    loop=_loop,
    tree_map=torch.utils._pytree.tree_map,
)


def _pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.stack([a, a / 2]), torch.stack([b, b / 2 + 0.1])


def _backward(n: int) -> Any:
    def derivative(g: Any, a: Tensor, b: Tensor) -> Any:
        inputs = (a.clone().requires_grad_(), b.clone().requires_grad_())
        out = g(*inputs)
        for k in range(n):
            grads = torch.autograd.grad(out, inputs, create_graph=k + 1 < n)
            out = sum((x * x.cos()).sum() for x in grads)
        return grads

    return derivative


TRANSFORMATIONS: dict[str, Any] = {
    "value": lambda g, a, b: g(a, b),
    "backward": _backward(1),
    "double backward": _backward(2),
    "triple backward": _backward(3),
    "grad": lambda g, a, b: f.grad(g, (0, 1))(a, b),
    "jvp": lambda g, a, b: f.jvp(g, (a, b), (b, a)),
    "hessian": lambda g, a, b: f.hessian(g, (0, 1))(a, b),
    "hessian_reversed": lambda g, a, b: f.jacrev(f.jacfwd(g, (0, 1)), (0, 1))(a, b),
    "third": lambda g, a, b: f.jacfwd(f.hessian(g, (0, 1)), (0, 1))(a, b),
    "vmap": lambda g, a, b: f.vmap(g)(*_pairs(a, b)),
    "vmap_some": lambda g, a, b: f.vmap(g, (None, 0))(a, _pairs(a, b)[1]),
    "vmap_grad": lambda g, a, b: f.vmap(f.grad(g, (0, 1)))(*_pairs(a, b)),
}


def _loss(fun: Any) -> Any:
    return lambda a, b: (fun(HOST, a, b) * torch.tensor([1.0, 2.0], dtype=F64)).sin().sum()


# A solver in a solver takes its time: it meets what differs most.
DEAR = {"triple backward", "third", "hessian_reversed", "vmap", "vmap_some"}
TABLE = [(p, t) for t in TRANSFORMATIONS for p in PROBLEMS if t not in DEAR or p.name != "bilevel"]
QUICK = {"value", "backward", "jvp"}  # of a solver in a solver


def _cell(problem: Problem, transformation: str) -> Any:
    marks = pytest.mark.slow if problem.name == "bilevel" and transformation not in QUICK else ()
    return pytest.param(problem, transformation, id=f"{problem.name}-{transformation}", marks=marks)


@pytest.mark.parametrize(("problem", "transformation"), [_cell(*row) for row in TABLE])
def test_equals_the_closed_form(problem: Problem, transformation: str) -> None:
    transform = TRANSFORMATIONS[transformation]
    a, b = torch.tensor(A), torch.tensor(B)
    got = transform(_loss(problem.solve), a, b)
    torch.testing.assert_close(got, transform(_loss(problem.exact), a, b), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda x: x.name)
def test_failures(failure: Failure) -> None:
    t = torch.tensor(1.0, dtype=F64)

    def by_reverse(**options: Any) -> float:
        return float(f.grad(lambda t: failure.program(HOST, options, t))(t))

    def by_forward(**options: Any) -> float:
        return float(f.jvp(lambda t: failure.program(HOST, options, t), (t,), (t,))[1])

    for derivative in (by_reverse, by_forward):
        check_failure(failure, derivative)


@pytest.mark.parametrize(("wrong", "error", "text"), MISTAKES)
def test_mistakes(wrong: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        wrong(HOST)
