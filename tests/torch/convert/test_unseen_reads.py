"""Reads and results that come past the modes: seen some other way, or refused."""

import concurrent.futures
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freevars.torch import CaptureError, Closure, closure_convert
from tests.torch.explicit import fresh, same

f = torch.func


def scripted(shape: tuple[int, ...], *, parameter: bool) -> Any:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            w = torch.full(shape, 3.0, dtype=torch.float64)
            if parameter:
                self.w = nn.Parameter(w)
            else:
                self.register_buffer("w", w)

        def forward(self, x: Tensor) -> Tensor:
            return self.w * x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(Scale())


@pytest.mark.parametrize("shape", [(), (2,)])
@pytest.mark.parametrize("parameter", [False, True])
def test_torchscript(shape: tuple[int, ...], *, parameter: bool) -> None:
    net = scripted(shape, parameter=parameter)
    with pytest.raises(CaptureError, match=r"reading .* below it, where it cannot be replaced"):
        Closure(net, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("read_again", [False, True])
def test_a_worker_thread(*, grad: bool, read_again: bool) -> None:
    w = fresh(2, grad=grad)

    def threaded(x: Tensor) -> Tensor:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            y = pool.submit(lambda: w * x).result()
        return y.sum() if read_again else y

    with pytest.raises(CaptureError, match="in a worker thread"):
        Closure(threaded, fresh(2, grad=False))


def test_numbers_are_no_reads() -> None:
    w = fresh(2, grad=False)
    c = Closure(lambda x: torch.where(x > 0.0, 2.0 * w, 3) * x + torch.tensor(1.0), fresh(2))
    same(c.values, [w])


def test_the_old_jacobian_in_forward_mode() -> None:
    w, x = fresh(), fresh(2, grad=False)

    def jacobian(fun: Any, x: Tensor) -> Any:
        return torch.autograd.functional.jacobian(fun, x, strategy="forward-mode", vectorize=True)

    def outside(x: Tensor) -> Any:
        return w * jacobian(lambda x: x.sin().sum(), x)

    converted, hoisted = closure_convert(outside, x)
    v = fresh()
    same(converted(x, v), v * x.cos())
    same(torch.autograd.grad(converted(x, *hoisted).sum(), hoisted), [x.cos().sum()])

    def inside(x: Tensor) -> Any:
        return jacobian(lambda x: (w * x.sin()).sum(), x)

    converted, _ = closure_convert(inside, x)
    same(converted(x, v).detach(), (v * x.cos()).detach())


def test_a_pullback_of_an_outer_vjp() -> None:
    """Its graph holds tensors that no operation of `fun` reads."""
    w, x = fresh(2, grad=False), fresh(2, grad=False)
    _, pull = f.vjp(lambda w: (w * w * x).sum(), w)
    with pytest.raises(CaptureError, match=r"call torch\.func\.vjp inside too"):
        closure_convert(lambda g: pull(g)[0], torch.tensor(2.0, dtype=torch.float64))
