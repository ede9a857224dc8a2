"""Random small programs with captured values against the same programs with explicit arguments."""

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor

from freevars.torch import closure_convert
from tests.torch.explicit import derivatives, same

F64 = torch.float64
N_CAPTURED = 3

UNARY = {
    "sin": torch.sin,
    "tanh": Tensor.tanh,
    "neg": lambda t: -t,
    "flip": lambda t: t.flip(0),
    "square": lambda t: t**2,
    "bounded": lambda t: 1 / (1 + t * t),
    "normed": lambda t: t / (1 + t.norm()),
    "detached": lambda t: t + t.detach(),
    "in place": lambda t: t.clone().mul_(0.5).add_(t),
    "indexed": lambda t: t[torch.tensor([2, 0, 1])],
    "branch": lambda t: t.exp() if t.sum() < 0 else t.cos(),
    "gradient": lambda t: torch.func.grad(lambda z: (z.sin() * t).sum())(t),
    "mapped": lambda t: torch.func.vmap(lambda z: z * t.sum())(t),
    "pushed": lambda t: torch.func.jvp(torch.sin, (t,), (t,))[1],
}
BINARY = {
    "add": lambda a, b: a + b,
    "mul": torch.mul,
    "sub": torch.sub,
    "outer": lambda a, b: torch.outer(a, b).sum(0),
    "where": lambda a, b: torch.where(a > b, a, b),
    "stack": lambda a, b: torch.stack([a, b]).mean(0),
    "loop": lambda a, b: [a := a * 0.5 + b for _ in range(2)][-1],
    "nested": lambda a, b: _nested(a, b),
}


def _nested(a: Tensor, b: Tensor) -> Tensor:
    converted, hoisted = closure_convert(lambda t: t * b.sin(), a)
    return converted(a, *hoisted)


# A program is a list of steps; a step makes a new value from earlier ones. Values 0 is the
# argument, 1..3 are captured.
step = st.one_of(
    st.tuples(st.sampled_from(sorted(UNARY)), st.integers(0, 30)),
    st.tuples(st.sampled_from(sorted(BINARY)), st.integers(0, 30), st.integers(0, 30)),
)


def run(program: list[Any], x: Tensor, captured: Any) -> Tensor:
    values = [x, *captured]
    for name, *places in program:
        inputs = [values[p % len(values)] for p in places]
        values.append((UNARY if len(inputs) == 1 else BINARY)[name](*inputs))
    return sum(values[1 + N_CAPTURED :], start=values[0] * 0)  # type: ignore[return-value]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(step, min_size=1, max_size=6), st.integers(0, 1000))
def test_programs(program: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def fresh() -> Tensor:
        return torch.randn(3, dtype=F64, generator=generator).requires_grad_()

    x, captured = fresh(), [fresh() for _ in range(N_CAPTURED)]
    captured[2] = captured[0] * 2  # derived from another
    converted, hoisted = closure_convert(lambda x: run(program, x, captured), x)
    places = [
        next(i for i, c in enumerate(captured) if c.data_ptr() == h.data_ptr()) for h in hoisted
    ]

    def ours(x: Tensor, *given: Tensor) -> Tensor:
        return converted(x, *(given[i] for i in places))

    def explicit(x: Tensor, *given: Tensor) -> Tensor:
        return run(program, x, given)

    same(ours(x, *captured), explicit(x, *captured))
    point = [fresh() for _ in range(1 + N_CAPTURED)]
    same(derivatives(ours, point, 2), derivatives(explicit, point, 2))
