"""The cost of a converted function in PyTorch, against the same function with explicit arguments.

    python -m benchmarks.torch_convert

One thread. Both sides run in turn within one loop; each figure is the ratio of their medians. The
figures that must be reached stand beside them.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from freevars.torch import closure_convert

Timed = Callable[[], Any]


def medians(sides: dict[str, Timed], rounds: int) -> dict[str, float]:
    """Seconds of each side, alternated, the median over `rounds`."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(3):
        for run in sides.values():
            run()
    for k in range(rounds):
        order = list(sides.items())
        for name, run in order if k % 2 else order[::-1]:
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


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

    return {"explicit": run(explicit, values), "converted": run(converted, list(hoisted))}


def of_module(net: nn.Module, x: Tensor) -> dict[str, Timed]:
    """A module as it is, and its conversion at its own parameters."""
    converted, hoisted = closure_convert(net, x)
    given = list(hoisted)
    return {
        "module": lambda: torch.autograd.grad(net(x).sum(), given),
        "converted": lambda: torch.autograd.grad(converted(x, *given).sum(), given),
    }


def by_call(net: nn.Module, x: Tensor) -> dict[str, Timed]:
    """`torch.func.functional_call` with other values, and the conversion with the same."""
    explicit, x, own = module(net, x)
    given = [t.detach().clone().requires_grad_() for t in own]
    converted, _ = closure_convert(net, x)
    return {
        "functional_call": lambda: torch.autograd.grad(explicit(x, *given).sum(), given),
        "converted": lambda: torch.autograd.grad(converted(x, *given).sum(), given),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[tuple[str, float, str, str]] = []

    def ratio(name: str, limit: float, sides: dict[str, Timed], rounds: int) -> None:
        m = medians(sides, rounds)
        a, b = m.values()
        rows.append((name, b / a, f"<= {limit}", f"{a * 1e6:,.0f} us -> {b * 1e6:,.0f} us"))

    ratio(
        "120 elementwise operations, 100,000 elements", 1.05, both(*elementwise(100_000, 120)), 41
    )
    d = Block(512)
    values = [p for m in d.children() for p in m.parameters()]
    x = torch.randn(2, 64, 512)
    ratio("transformer block, d = 512", 1.05, both(block, x, values), 41)
    ratio(
        "MLP, 3 layers of 512, batch 32", 1.05, both(mlp, torch.randn(32, 512), layers(512, 3)), 201
    )
    ratio("MLP, 3 layers of 64, batch 32", 1.2, both(mlp, torch.randn(32, 64), layers(64, 3)), 1001)
    net = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(64, 64), nn.Tanh())))
    ratio(
        "the same as a module, at its own parameters", 1.2, of_module(net, torch.randn(32, 64)), 501
    )
    ratio("the same, against functional_call", 1.0, by_call(net, torch.randn(32, 64)), 501)
    m = medians(both(*elementwise(8, 200), backward=False), 501)
    added = (m["converted"] - m["explicit"]) / 200 * 1e6
    rows.append(("added time per tiny operation, us", added, "<= 2", ""))
    m = medians({"forward": lambda: d(x), "conversion": lambda: closure_convert(d, x)}, 41)
    shown = f"{m['forward'] * 1e6:,.0f} us, {m['conversion'] * 1e6:,.0f} us"
    rows.append(
        ("conversion of the block, in forwards", m["conversion"] / m["forward"], "<= 1.1", shown)
    )
    print(f"PyTorch {torch.__version__}, one thread; forward and backward unless said otherwise")
    for name, value, limit, detail in rows:
        print(f"{name:<48} {value:6.2f}  {limit:<8} {detail}")


if __name__ == "__main__":
    main()
