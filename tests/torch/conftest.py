"""What the PyTorch tests share: one thread, a fixed seed, and the comparison with explicit
arguments."""

import warnings
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

with (
    warnings.catch_warnings()
):  # PyTorch's own: its first forward-mode derivative compiles TorchScript
    warnings.filterwarnings("ignore", message=".*torch.jit")
    import torch._decomp.decompositions_for_jvp

# Up to 2.11, the first sparse tensor warns where nothing was chosen.
torch.sparse.check_sparse_tensor_invariants.disable()


@pytest.fixture(autouse=True)
def fixed() -> Iterator[None]:
    """The same random numbers in every test; nothing left on any mode stack after it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    assert torch._C._len_torch_function_stack() == 0
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch.is_grad_enabled()
