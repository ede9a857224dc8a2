# ruff: noqa: SLF001 (with `_hooks.py`, `_compat` is all that reaches for private names)
"""Recognise operators, custom Functions and checkpoints, by what PyTorch calls or by a graph
node."""

from typing import Any

import torch
import torch._functorch.autograd_function
import torch.utils.checkpoint as _checkpoint
from torch import Tensor

__all__ = [
    "CheckpointFunction",
    "has_hooks",
    "is_custom_function_call",
    "is_custom_function_node",
    "is_higher_order",
    "is_operator",
    "is_reentrant_checkpoint_node",
    "operator_body",
    "overloads",
    "schema",
]

# Reentrant checkpointing, a custom Function whose backward runs `fun` again.
CheckpointFunction = _checkpoint.CheckpointFunction

_custom_function_call = torch._functorch.autograd_function.custom_function_call

_HigherOrder = torch._ops.HigherOrderOperator


def is_operator(func: object) -> bool:
    """Whether `func`, as a dispatch mode sees it, is an operator with a schema."""
    return isinstance(func, torch._ops.OpOverload)


def overloads(func: Any) -> list[Any]:
    """The operators that calling `func` of `torch.ops` may mean; none for any other function."""
    if isinstance(func, torch._ops.OpOverloadPacket):
        names: list[str] = func.overloads()  # type: ignore[no-untyped-call]
        return [getattr(func, name) for name in names]
    return [func] if is_operator(func) else []


def operator_body(func: Any) -> Any:
    """The Python function that a custom operator (`torch.library.custom_op`) runs, or None: it runs
    below every mode. The registry of these operators is private."""
    defined = torch._library.custom_ops.OPDEFS
    found = (defined.get(schema(overload).name) for overload in overloads(func))
    return next((op._init_fn for op in found if op is not None), None)


def schema(func: Any) -> Any:
    """An operator's name and arguments, each with what it may write to."""
    return func._schema


def is_higher_order(func: object) -> bool:
    """Whether `func` is a higher-order operator (`torch.cond`), custom Functions excepted."""
    return isinstance(func, _HigherOrder) and func is not _custom_function_call


def is_custom_function_call(func: object) -> bool:
    """Whether `func` is how a custom Function arrives while a torch.func transform is open."""
    return func is _custom_function_call


def is_custom_function_node(node: object) -> bool:
    """Whether `node` of an autograd graph is that of a custom Function."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def is_reentrant_checkpoint_node(node: Any) -> bool:
    """Whether `node` is that of a reentrant checkpoint. The type of a custom Function's node knows
    its class; the node itself may name another (`_hooks.py`)."""
    kind: Any = type(node)
    return is_custom_function_node(node) and kind._forward_cls is CheckpointFunction


def has_hooks(t: Tensor) -> bool:
    """Whether a backward pass that reaches `t` runs hooks of the user's. They have no public
    reader."""
    return bool(t._backward_hooks)
