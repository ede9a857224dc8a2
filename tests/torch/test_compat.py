"""The private touch points of PyTorch: each works, and the self-test notices when one does not."""

import torch

from freevars.torch import _compat


def test_self_test() -> None:
    assert _compat.self_test() == []


def test_self_test_says_what_broke(monkeypatch) -> None:
    raw = torch._functorch.vmap._add_batch_dim
    monkeypatch.setattr(torch._functorch.vmap, "_add_batch_dim", raw.__wrapped__)
    (line,) = _compat.self_test()
    assert line.startswith("the hooks where torch.func wraps tensors: gave a wrong result")


def test_hooks_do_nothing_without_a_watch() -> None:
    x = torch.ones(2, requires_grad=True)
    assert _compat.active() == []
    out = torch.func.vmap(torch.func.grad(lambda z: z**2))(x)
    assert torch.equal(out, 2 * x)
    assert _compat.resolve(x) is x


def test_hooks_are_installed_once() -> None:
    raw = torch._functorch.vmap._add_batch_dim
    _compat.install_hooks()
    assert torch._functorch.vmap._add_batch_dim is raw
