"""The function mode that watches a run of `fun`, and the modes that are active now.

The hooks report to it what no function mode sees (`_hooks.py`). Not here: what a mode does with
what it sees (`discovery.py`, `substitution.py`).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from freevars.errors import CaptureError
from freevars.torch._compat import (
    checkpointing,
    compiling,
    function_mode_count,
    function_modes,
    transform_level,
    without_checkpoints,
)

__all__ = [
    "CaptureMode",
    "active",
    "broken",
    "broken_message",
    "resolve",
    "solver_running",
]

# What a release of PyTorch has broken, and how it shows; filled by the self-test.
broken: dict[str, str] = {}


def broken_message(point: str) -> str:
    """The message where a function needs `point`."""
    return (
        f"expected a release of PyTorch in which freevars can see {point}, got "
        f"{torch.__version__}: {broken[point]}. Install a supported release (docs/pytorch.md "
        f"lists them), or leave {point} out of the function."
    )


# Without a hook, that something is used still shows, if later or less well.
_USED: dict[str, Callable[["CaptureMode"], bool]] = {
    "transforms of torch.func": lambda mode: transform_level() > mode.level,
    "checkpointing": lambda mode: checkpointing(),  # noqa: ARG005 (one signature)
    "compiled functions": lambda mode: compiling(),  # noqa: ARG005
}


class CaptureMode(TorchFunctionMode):
    """A function mode that the hooks talk to."""

    refused: CaptureError | None = None
    paused: int = 0  # how many functions run now that are PyTorch's own business
    level: int = 0  # open transforms of torch.func when it was made
    solvers: int = 0  # how many solvers of a rule run now: theirs may call `.backward()`

    def refuse_broken(self) -> None:
        """Refuses what `fun` uses and a broken hook does not see."""
        for point, used in _USED.items():
            if point in broken and used(self):
                self.refuse(broken_message(point))

    def refuse(self, message: str) -> NoReturn:
        """Raises `CaptureError`, and remembers it: Python's operators turn a `TypeError` into
        'unsupported operand', and `fun` may catch it."""
        self.refused = CaptureError(message)
        raise self.refused

    @contextmanager
    def reraising_refusals(self) -> Iterator[None]:
        """Watches, and re-raises refusals."""
        try:
            with self:
                yield
        except Exception:
            if self.refused is not None:
                raise self.refused from None
            raise
        if self.refused is not None:
            raise self.refused

    def replace(self, value: Any) -> Any:
        """What `fun` is to get where it reads `value` (any nest of containers)."""
        raise NotImplementedError

    def is_foreign(self, t: Tensor) -> bool:
        """Whether `fun` did not make `t`."""
        raise NotImplementedError

    def given(self, t: Tensor) -> Tensor:
        """The replacement for `t`; unlike `replace`, this is not a read."""
        return t

    def note(self, value: Any) -> None:
        """Note that `value` was made while `fun` ran, in a way that function modes do not see."""

    def custom_function(self, cls: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments for the custom `autograd.Function` `cls`, before its forward runs."""
        raise NotImplementedError

    def begin(self, args: Sequence[Any]) -> Any:
        """An operation on `args` starts that function modes do not see; returns a token."""

    def end(self, token: Any) -> None:
        """That operation is over."""

    def resume(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """`fun`, run under this watch whenever it is called, also after the watch was left."""

        @functools.wraps(fun, updated=())
        def resumed(*args: Any, **kwargs: Any) -> Any:
            if self in active():
                return fun(*args, **kwargs)
            with self:
                return fun(*args, **kwargs)

        return resumed


def active() -> list[CaptureMode]:
    """The watches on this thread, the innermost first."""
    modes = function_modes()
    return [mode for mode in modes if isinstance(mode, CaptureMode) and not mode.paused]


@contextmanager
def solver_running() -> Iterator[None]:
    """The solver of a rule is running, on tensors without history: its `.backward()` reaches only
    its own, in graphs that no checkpoint around it would have to make again. It may differentiate
    whatever the caller's modes are."""
    watches = active()
    for watch in watches:
        watch.solvers += 1
    try:
        with without_checkpoints(), torch.inference_mode(mode=False), torch.enable_grad():
            yield
    finally:
        for watch in watches:
            watch.solvers -= 1


def resolve(t: Tensor) -> Tensor:
    """The value of `t` in the converted calls that run on this thread."""
    if function_mode_count():
        for watch in active():
            t = watch.given(t)
    return t
