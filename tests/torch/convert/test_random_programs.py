"""Random small programs with captured values against the same programs with explicit arguments."""

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from freevars.torch import closure_convert
from tests.torch.convert.test_convert import Cube, Pair
from tests.torch.explicit import derivatives, same

F64 = torch.float64
N_CAPTURED = 5


def _written(t: Tensor) -> Tensor:
    """In-place writes to an intermediate of its own, through a view of it."""
    out = t.clone()
    out[1:].mul_(t[0])
    out[0] = t[2] * 2
    return out.tanh_()


def _complex(t: Tensor) -> Tensor:
    z = torch.complex(t.cos(), t)
    return (z * z.conj() + torch.exp(1j * z)).imag


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
    "written": _written,
    "view": lambda t: t[1:].sum() * t.view(3, 1).T[0],
    "complex": _complex,
    "indexed": lambda t: t[torch.tensor([2, 0, 1])],
    "branch": lambda t: t.exp() if t.sum() < 0 else t.cos(),
    "gradient": lambda t: torch.func.grad(lambda z: (z.sin() * t).sum())(t),
    "mapped": lambda t: torch.func.vmap(lambda z: z * t.sum())(t),
    "pushed": lambda t: torch.func.jvp(torch.sin, (t,), (t,))[1],
    "custom": lambda t: Cube.apply(t).sin(),
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
    "function_name": lambda a, b: (lambda inner: inner(a.cos()))(lambda t: t * b + a),
    "containers": lambda a, b: Pair({"b": [b]}, (a, a)).a["b"][0].sin() * Pair(a, b)[0],
    "checkpoint": lambda a, b: checkpoint(
        lambda t: (t * b.tanh()).sin() + b, a, use_reentrant=False
    ),
    "accumulated": lambda a, b: a.clone().add_(b).mul_(b),
}


def _nested(a: Tensor, b: Tensor) -> Tensor:
    converted, hoisted = closure_convert(lambda t: t * b.sin(), a)
    return converted(a, *hoisted)


# A program is a list of steps; a step makes a new value from earlier ones. Value 0 is the
# argument, the next are captured.
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


def leaves_and_relatives(fresh: Any) -> list[Tensor]:
    """Two leaves; twice the first; a view of the second; and the first again, tied."""
    a, b = fresh(), fresh()
    return [a, b, a * 2, b.flip(0)[:3].view(3), a]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(step, min_size=1, max_size=6), st.integers(0, 1000))
def test_programs(program: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def fresh() -> Tensor:
        return torch.randn(3, dtype=F64, generator=generator).requires_grad_()

    x, captured = fresh(), leaves_and_relatives(fresh)
    # The function has its values in a container, as a user's may.
    held = {"captured": tuple(captured)}
    converted, hoisted = closure_convert(lambda x: run(program, x, held["captured"]), x)
    places = [
        next(i for i, c in enumerate(captured) if c.data_ptr() == h.data_ptr()) for h in hoisted
    ]
    assert len(set(places)) == len(places)  # each once, the tied one too

    def ours(x: Tensor, *given: Tensor) -> Tensor:
        return converted(x, *(given[i] for i in places))

    def explicit(x: Tensor, *given: Tensor) -> Tensor:
        return run(program, x, given)

    same(ours(x, *captured), explicit(x, *captured))
    # Derivatives at other values, each independent of the others, but for the tied ones.
    point = [fresh() for _ in range(N_CAPTURED)]
    tied = lambda fun: lambda *values: fun(*values, values[1])
    same(derivatives(tied(ours), point, 2), derivatives(tied(explicit), point, 2))
    # And at the captured values, to where they come from.
    leaves = [x, *captured[:2]]

    def again(fun: Any) -> Any:
        (first, second) = captured[:2]
        given = (first, second, captured[2], captured[3], first)
        return derivatives(lambda x, *_: fun(x, *given), leaves, 2)

    same(again(lambda x, *_: converted(x, *hoisted)), again(explicit))
