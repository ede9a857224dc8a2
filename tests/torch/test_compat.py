"""The private touch points of PyTorch: each works, and the self-test notices when one does not."""

import subprocess
import sys

import torch

from freevars.torch import _hooks
from freevars.torch._selftest import broken


def test_self_test() -> None:
    assert broken() == []


def test_self_test_says_what_broke(monkeypatch) -> None:
    _hooks.install_hooks()
    raw = torch._functorch.vmap._add_batch_dim
    monkeypatch.setattr(torch._functorch.vmap, "_add_batch_dim", raw.__wrapped__)
    (line,) = broken()
    assert line.startswith("the hooks where torch.func wraps tensors: gave a wrong result")


def test_hooks_do_nothing_without_a_watch() -> None:
    x = torch.ones(2, requires_grad=True)
    assert _hooks.active() == []
    out = torch.func.vmap(torch.func.grad(lambda z: z**2))(x)
    assert torch.equal(out, 2 * x)
    assert _hooks.resolve(x) is x


def test_hooks_are_installed_once() -> None:
    _hooks.install_hooks()
    raw = torch._functorch.vmap._add_batch_dim
    _hooks.install_hooks()
    assert torch._functorch.vmap._add_batch_dim is raw


def test_nothing_here_imports_the_compiler() -> None:
    code = (
        "import sys, torch, freevars.torch as fv\n"
        "w = torch.ones(2, requires_grad=True)\n"
        "c, h = fv.closure_convert(lambda x: x * w, w)\n"
        "c(w, *h).sum().backward()\n"
        "print('torch._dynamo' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
