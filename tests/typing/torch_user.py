"""User code of the PyTorch host, for type checkers; see `jax_user.py`."""

from collections.abc import Callable
from typing import assert_type

import torch
from torch import Tensor

import freevars.torch as fv
from freevars.report import CaptureReport

Function = Callable[[Tensor], Tensor]


@fv.root
def newton(fun: Function, x0: Tensor, steps: int = 20) -> Tensor:
    for _ in range(steps):
        x0 = x0 - fun(x0)
    return x0


@fv.argmin(has_aux=True, on_failure="nan")
def minimize(objective: Function, start: Tensor, *, rate: float) -> tuple[Tensor, int]:
    return start - rate * objective(start), 1


one = torch.ones(())
assert_type(newton(lambda x: x**2, one), Tensor)
assert_type(newton(fun=lambda x: x**2, x0=one, steps=3), Tensor)
assert_type(minimize(lambda x: x**2, start=one, rate=0.1), tuple[Tensor, int])
assert_type(newton.__wrapped__(lambda x: x**2, one), Tensor)
solver: fv.ImplicitSolver[..., Tensor] = newton

newton(lambda x: x**2, one, steps="many")  # type: ignore[arg-type]
newton(lambda x: x**2, one, nonsense=3)  # type: ignore[call-arg]
newton(lambda x: x**2)  # type: ignore[call-arg]
text: str = newton(lambda x: x**2, one)  # type: ignore[assignment]
minimize(lambda x: x**2, one)  # type: ignore[call-arg]
fv.root(newton.__wrapped__, linear_slve=None)  # type: ignore[call-overload]
fv.fixed_point(on_failure="ignore")  # type: ignore[call-overload]


class Layer(torch.nn.Module):
    """Methods are bound, in a class body and once they are bound."""

    def __init__(self) -> None:
        super().__init__()
        self.held = fv.root(self.run)

    def run(self, fun: Function, x0: Tensor) -> Tensor:
        return x0 - fun(x0)

    @fv.root
    def solve(self, fun: Function, x0: Tensor, steps: int = 3) -> Tensor:
        return x0 - fun(x0)


layer = Layer()
assert_type(layer.solve(lambda x: x, one, steps=2), Tensor)
assert_type(Layer.solve(layer, lambda x: x, one), Tensor)
layer.solve(lambda x: x, one, steps="2")  # type: ignore[arg-type]
layer.solve(layer, lambda x: x, one)  # type: ignore[arg-type]


def model(x: Tensor, n: int) -> tuple[Tensor, int]:
    return x, n


closure = fv.Closure(model, one, 2)
assert_type(closure(one, 3), tuple[Tensor, int])
closure("not a tensor", 2)  # type: ignore[arg-type]
closure(one)  # type: ignore[call-arg]
closure(one, 2, 3)  # type: ignore[call-arg]

converted, hoisted = fv.closure_convert(model, one, 2, hoist="floating", rng="replay")
assert_type(converted(one, 2, *hoisted), tuple[Tensor, int])
assert_type(converted.__wrapped__(one, 2), tuple[Tensor, int])
assert_type(hoisted, list[Tensor])
pair: fv.Converted[[Tensor, int], tuple[Tensor, int]] = converted
fv.closure_convert(model, one, 2, hoist=lambda value: value is one)
fv.closure_convert(model, one, 2, hoist="some")  # type: ignore[arg-type]
assert_type(fv.captures(model, one, 2), CaptureReport)
assert_type(closure.captures, CaptureReport)
