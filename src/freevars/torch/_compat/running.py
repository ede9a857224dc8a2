# ruff: noqa: SLF001 (with `_hooks.py`, `_compat` is all that reaches for private names)
"""What PyTorch is doing on this thread: compiling, dispatching to modes, transforming, backward."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C import _functorch
from torch.utils._python_dispatch import TorchDispatchMode

from freevars.torch._compat.wrappers import unwrap

__all__ = [
    "DispatchMode",
    "compiling",
    "forward_mode",
    "function_mode_count",
    "function_modes",
    "functorch_active",
    "in_backward",
    "is_recorded",
    "recording",
    "transform_level",
    "transforms_active",
    "uncompiled",
    "unseen",
]

F = TypeVar("F", bound=Callable[..., Any])


def _eagerly(run: F) -> F:
    """`run`, for calls while `torch.compile` is active: it then does not compile what `run` calls,
    nor from now on the frames around it. After a graph break it would compile the rest of these
    too, and cannot where a transform is open."""

    def left_alone(*args: Any, **kwargs: Any) -> Any:
        rules: Any = sys.modules.get("torch._dynamo.trace_rules")
        if not _left_alone and hasattr(rules, "add"):
            _left_alone.extend(_OURS)
            for name in _OURS:
                rules.add(name)
        return run(*args, **kwargs)

    return cast("F", _disable(functools.wraps(run)(left_alone)))


def uncompiled(run: F) -> F:
    """`run`, never compiled, even if it is called while `torch.compile` is active (by PyTorch, in
    the backward pass of a compiled function)."""
    eager = _eagerly(run)

    @functools.wraps(run)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return eager(*args, **kwargs) if compiling() else run(*args, **kwargs)

    return cast("F", chosen)


# `torch.compiler.disable` without the import of the compiler, which takes seconds.
_disable: Any = getattr(torch, "_disable_dynamo")  # noqa: B009 (not exported, says the type checker)

# The modules on a call's way in and out, by name, as the compiler's own rules take them, which are
# private (https://github.com/pytorch/pytorch/issues/150435). `torch.compiler.disable` is for one
# function, not for the rest of a frame that has called it.
_OURS = tuple(
    f"freevars.torch.{name}" for name in ("_compat", "_convert", "_hooks", "_rules", "scipy")
)
_left_alone: list[str] = []


def compiling() -> bool:
    """Whether `torch.compile` traces now, or would compile each function that is called next, as it
    does after a graph break inside a torch.func transform: our own modes must not be compiled."""
    return torch.compiler.is_compiling() or _compiler_callback() is not None


_compiler_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback


def function_mode_count() -> int:
    """How many function modes are active on this thread."""
    return torch._C._len_torch_function_stack()


def function_modes() -> list[Any]:
    """The function modes that are active on this thread, the innermost first. The stack has no
    public reader."""
    n = function_mode_count()
    return [torch._C._get_function_stack_at(i) for i in range(n - 1, -1, -1)]


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that does not wrap its handler for the compiler, which would import it: under
    a watch nothing is compiled."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


# Inside, no function mode is active: our own inspection is not a read.
unseen: Any = torch._C.DisableTorchFunction


def transforms_active() -> bool:
    """Whether a torch.func transform or a forward-mode level is open on this thread."""
    return functorch_active() or torch.autograd.forward_ad._current_level >= 0


def recording() -> bool:
    """Whether `make_fx` records what runs on this thread, as `torch.func.linearize` does."""
    proxies: Any = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is not None and proxies.get_proxy_mode() is not None


def is_recorded(t: Tensor) -> bool:
    """Whether the program that `make_fx` records here computes `t`, or is given it."""
    proxies: Any = sys.modules.get("torch.fx.experimental.proxy_tensor")
    mode = proxies and proxies.get_proxy_mode()
    return mode is not None and any(u in mode.tracer.tensor_tracker for u in unwrap(t))


def functorch_active() -> bool:
    """Whether a torch.func transform is open on this thread."""
    return _functorch.maybe_current_level() is not None


def transform_level() -> int:
    """How many torch.func transforms are open on this thread."""
    return _functorch.maybe_current_level() or 0


def in_backward() -> bool:
    """Whether the autograd engine runs on this thread now."""
    return torch._C._current_autograd_node() is not None


# Forward mode is off while PyTorch calls a custom Function's `jvp`; this turns it on again.
forward_mode: Any = torch.autograd.forward_ad._set_fwd_grad_enabled
