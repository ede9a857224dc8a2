"""What no function may do under a watch, and what the error says.

Not here: where it is asked (`discovery.py`, `substitution.py`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from freevars.torch import _compat, _modes
from freevars.torch._compat import overloads
from freevars.torch._describe import caller, describe, function_name, line_of_caller, reachable
from freevars.torch._modes import CaptureMode

__all__ = [
    "backward_message",
    "change_message",
    "higher_order_message",
    "kept_message",
    "operator_body",
    "refuse_reads_of_operator",
    "refuse_running_statistics",
    "write_message",
    "written_message",
]

Func = Callable[..., Any]

# What to do with a module that writes to its buffers.
_STATISTICS = (
    "Put a module that updates its buffers in train mode (running statistics, a spectral norm) "
    "into eval mode (module.eval()); a batch norm may also take the statistics of the batch and "
    "keep none (module.track_running_stats = False)."
)

# The same where a function is given the statistics: a module of torch.nn, or the user's own.
_GIVEN = {
    "batch_norm": (
        "Put the module into eval mode (module.eval()), or let it take the statistics of the batch "
        "and keep none (module.track_running_stats = False). A call of batch_norm takes "
        "training=False, or running_mean=None, running_var=None."
    ),
    "instance_norm": (
        "Put the module into eval mode (module.eval()), or make it with "
        "track_running_stats=False. A call of instance_norm takes use_input_stats=False, "
        "or running_mean=None, running_var=None."
    ),
}


def kept_message(t: Tensor, fun: Any) -> str:
    return (
        "expected a function that computes anew what it reads, got a tensor that its first run "
        f"has made and keeps: {describe(t, fun, line_of_caller())}, in a cache (functools.lru_cache"
        ") or a variable. No derivative leads from it to the values given now. Compute "
        "what is kept before, so that it is captured itself."
    )


def refuse_running_statistics(
    watch: CaptureMode, func: Func, args: Any, kwargs: Any, named: Callable[[Tensor], str]
) -> None:
    """Refuses a train-mode normalisation over foreign running statistics, which `named` tells by
    their names: it writes to them, and PyTorch declares no mutation."""
    names = ("input", "weight", "bias", "running_mean", "running_var", "training")
    if getattr(func, "__module__", "") == "torch.nn.functional":
        names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    given = dict(zip(names, args, strict=False)) | kwargs
    default = func is torch.nn.functional.instance_norm
    mean = given.get("running_mean")
    training = given.get("training", given.get("use_input_stats", default))
    if not (training and isinstance(mean, Tensor) and watch.is_foreign(mean)):
        return
    name = getattr(func, "__name__", str(func))
    advice = _GIVEN["instance_norm" if name == "instance_norm" else "batch_norm"]
    message = (
        "expected a function that leaves its captured values as they are, got a train-mode "
        f"{name} that updates captured running statistics in place: {named(mean)}. {advice}"
    )
    watch.refuse(message)


def write_message(func: Any, whose: str, named: str) -> str:
    """For a write in place to the tensor `named`."""
    return (
        f"expected a function that writes to its own intermediates only, got {func} writing in "
        f"place to {whose}: {named}. Nothing was written. Write to a clone. {_STATISTICS}"
    )


def written_message(named: str) -> str:
    """For a write in place to the tensor `named` that nothing has seen before it was done."""
    return (
        "expected a function that writes to its own intermediates only, got one that has written "
        f"in place to {named}. A module that is run at its own parameters is looked at afterwards. "
        f"Write to a clone. {_STATISTICS}"
    )


def change_message(func: Func, t: Tensor, fun: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__set__":  # of `t.grad`, say
        name = f"setting .{getattr(getattr(func, '__self__', None), '__name__', 'an attribute')}"
    return (
        f"expected a function that leaves its captured values as they are, got {name} on "
        f"{describe(t, fun, line_of_caller())}. Nothing was written. Use t.detach(), which is "
        "another tensor."
    )


def backward_message(fun: Any) -> str:
    return (
        f"expected a function that returns its result, got {function_name(fun)!r} "
        f"calling .backward() at {caller()}, which adds to the .grad of captured tensors. "
        "Use torch.autograd.grad."
    )


def higher_order_message(func: Any, fun: Any) -> str:
    return (
        f"expected operations of PyTorch's Python API, got the higher-order operator {func} at "
        f"{caller()} in {function_name(fun)!r}: what its branches read cannot be replaced. "
        "Use Python's own if, for, while."
    )


def operator_body(watch: CaptureMode, func: Any) -> Any:
    """The Python function of a custom operator, or None."""
    point = "custom operators"
    if point not in _modes.broken:
        return _compat.operator_body(func)
    names = (_compat.schema(overload).name for overload in overloads(func))
    if any(not name.startswith(("aten::", "prims::")) for name in names):
        watch.refuse(_modes.broken_message(point))
    return None


def refuse_reads_of_operator(
    watch: CaptureMode, func: Any, body: Any, matters: Callable[[Tensor], bool], fun: Any
) -> None:
    """Refuses a custom operator whose own function can reach a tensor that matters."""
    for t, _ in reachable(body).values():
        if matters(t):
            message = (
                "expected every read of a captured tensor to go through PyTorch's Python API, got "
                f"the custom operator {func} at {caller()} in {function_name(fun)!r}, whose "
                f"function can read {describe(t, body)}. "
                "Pass that tensor to the operator as an argument."
            )
            watch.refuse(message)
