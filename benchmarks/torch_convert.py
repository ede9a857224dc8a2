"""The cost of a converted function in PyTorch, against the same function with explicit arguments.

One thread; forward and backward, unless a row says otherwise. Beside it stands what a mode costs
that sees every operation and does nothing: no conversion by modes costs less. Where there is a GPU,
the same functions run there too: it computes faster than one thread launches small operations, so
that what is added to each launch shows.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._table import Row, seconds
from benchmarks._timing import alternate
from freevars.torch import closure_convert

TITLE = "PyTorch: a converted function, forward and backward, one thread"
OPERATIONS = 200
TARGET_ON_GPU = 1.1

EMPTY = "an empty mode"

Timed = Callable[[], Any]


class EmptyMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class EmptyDispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_an_empty_mode(fun: Any) -> Any:
    def inside(*args: Any) -> Any:
        with EmptyMode():
            return fun(*args)

    return inside


def elementwise(n: int, ops: int) -> tuple[Any, Tensor, list[Tensor]]:
    def explicit(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        for k in range(ops):
            x = x * w if k % 2 else x + v
        return x

    values = [torch.rand(n).requires_grad_() for _ in range(2)]
    return explicit, torch.rand(n), values


def module(net: nn.Module, x: Tensor) -> tuple[Any, Tensor, list[Tensor]]:
    names = [name for name, _ in net.named_parameters()]

    def explicit(x: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), x)

    return explicit, x, list(net.parameters())


class Block(nn.Module):
    """A transformer block, written with explicit parameters in `explicit_block`."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return block(x, *(p for m in self.children() for p in m.parameters()))


def block(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, *rest: Tensor) -> Tensor:
    qkv_w, qkv_b, out_w, out_b, up_w, up_b, down_w, down_b = rest
    f = nn.functional
    n, t, width = x.shape
    y = f.layer_norm(x, (width,), a, b)
    q, k, v = f.linear(y, qkv_w, qkv_b).view(n, t, 3, 8, width // 8).permute(2, 0, 3, 1, 4)
    y = f.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width)
    x = x + f.linear(y, out_w, out_b)
    y = f.layer_norm(x, (width,), c, d)
    return x + f.linear(f.gelu(f.linear(y, up_w, up_b)), down_w, down_b)


def mlp(x: Tensor, *values: Tensor) -> Tensor:
    for k in range(0, len(values), 2):
        x = nn.functional.linear(x, values[k], values[k + 1]).tanh()
    return x


def layers(width: int, n: int) -> list[Tensor]:
    return [t for _ in range(n) for t in nn.Linear(width, width).parameters()]


def both(
    explicit: Any, x: Tensor, values: list[Tensor], *, backward: bool = True
) -> dict[str, Timed]:
    """The explicit function, and the conversion of the closure over the same values."""
    converted, hoisted = closure_convert(lambda x: explicit(x, *values), x)
    if len(hoisted) != len(values):
        message = "the conversion did not find every captured value"
        raise RuntimeError(message)

    def run(fun: Any, given: Any) -> Timed:
        def timed() -> Any:
            out = fun(x, *given)
            return torch.autograd.grad(out.sum(), given) if backward else out

        return timed

    return {
        "explicit": run(explicit, values),
        "converted": run(converted, list(hoisted)),
        EMPTY: run(in_an_empty_mode(explicit), values),
    }


def of_module(net: nn.Module, x: Tensor) -> dict[str, Timed]:
    """A module as it is, and its conversion at its own parameters."""
    converted, hoisted = closure_convert(net, x)
    given = list(hoisted)
    return {
        "module": lambda: torch.autograd.grad(net(x).sum(), given),
        "converted": lambda: torch.autograd.grad(converted(x, *given).sum(), given),
        EMPTY: lambda: torch.autograd.grad(in_an_empty_mode(net)(x).sum(), given),
    }


def by_call(net: nn.Module, x: Tensor) -> dict[str, Timed]:
    """`torch.func.functional_call` with other values, and the conversion with the same."""
    explicit, x, own = module(net, x)
    given = [t.detach().clone().requires_grad_() for t in own]
    converted, _ = closure_convert(net, x)
    return {
        "functional_call": lambda: torch.autograd.grad(explicit(x, *given).sum(), given),
        "converted": lambda: torch.autograd.grad(converted(x, *given).sum(), given),
        EMPTY: lambda: torch.autograd.grad(in_an_empty_mode(net)(x).sum(), own),
    }


def cases() -> Iterator[tuple[str, float, dict[str, Timed]]]:
    """(case, the ratio to reach, the sides): the baseline first, then ours."""
    block_ = Block(512)
    values = [p for m in block_.children() for p in m.parameters()]
    net = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(64, 64), nn.Tanh())))
    batch, small = torch.randn(32, 512), torch.randn(32, 64)
    many = both(*elementwise(100_000, 120))
    yield "120 elementwise operations, 100,000 elements", 1.05, many
    yield "transformer block, d = 512", 1.05, both(block, torch.randn(2, 64, 512), values)
    yield "MLP, 3 layers of 512, batch 32", 1.05, both(mlp, batch, layers(512, 3))
    yield "MLP, 3 layers of 64, batch 32", 1.2, both(mlp, small, layers(64, 3))
    yield "the same as a module, at its own parameters", 1.2, of_module(net, small)
    yield "the same with other values, over functional_call", 1.0, by_call(net, small)


def row(case: str, target: float, sides: Iterable[Timed]) -> Row:
    timing = alternate(*sides)
    base, ours, _ = timing.seconds
    peers = ((EMPTY, timing.ratios[2]),)
    return Row(case, timing.ratios[1], target, seconds(base), seconds(ours), peers)


def finished(timed: Timed, device: torch.device) -> Timed:
    """With the work that is still under way on the device."""

    def waiting() -> None:
        timed()
        torch.accelerator.synchronize(device)

    return waiting


def on(device: torch.device) -> Iterator[Row]:
    """The same functions on an accelerator."""
    with device:  # where the tensors are made; not a mode that is on while something is timed
        found = list(cases())
    for case, _, sides in found:
        waiting = [finished(side, device) for side in sides.values()]
        yield row(f"{device.type}: {case}", TARGET_ON_GPU, waiting)


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case, target, sides in cases():
            yield row(case, target, sides.values())
        if torch.cuda.is_available():
            yield from on(torch.device("cuda"))
        timing = alternate(*both(*elementwise(8, OPERATIONS), backward=False).values())
        base, ours, empty = timing.seconds
        added, least = ((side - base) / OPERATIONS * 1e6 for side in (ours, empty))
        yield Row(
            "added time per tiny operation",
            added,
            2.0,
            seconds(base),
            seconds(ours),
            ((EMPTY, least),),
            unit=" us",
        )
        net, x = Block(512), torch.randn(2, 64, 512)

        def in_both_modes() -> None:
            with EmptyDispatchMode(), EmptyMode():
                net(x)

        in_both_modes()  # which imports the compiler, before anything is timed
        timing = alternate(lambda: net(x), lambda: closure_convert(net, x), in_both_modes)
        base, ours, _ = timing.seconds
        yield Row(
            "conversion of the block, over its forward",
            timing.ratios[1],
            1.1,
            seconds(base),
            seconds(ours),
            (("two empty modes", timing.ratios[2]),),
        )
    finally:
        torch.set_num_threads(threads)
