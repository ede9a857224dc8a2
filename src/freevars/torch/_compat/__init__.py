"""Private and version-dependent names of PyTorch, each with its reason.

Not here: what has to be wrapped to be seen at all (`_hooks.py`).
"""

import torch

from freevars.torch._compat.checkpoints import (
    Saved,
    checkpointing,
    without_checkpoints,
)
from freevars.torch._compat.memory import (
    addresses,
    not_inference,
    owns_memory,
    parts,
    sharded_parameters,
    storage_key,
    versions,
)
from freevars.torch._compat.operators import (
    CheckpointFunction,
    has_hooks,
    is_custom_function_call,
    is_custom_function_node,
    is_higher_order,
    is_operator,
    is_reentrant_checkpoint_node,
    operator_body,
    overloads,
    schema,
)
from freevars.torch._compat.running import (
    DispatchMode,
    compiling,
    eagerly,
    forward_mode,
    function_mode_count,
    function_modes,
    functorch_active,
    in_backward,
    is_recorded,
    recording,
    transform_level,
    transforms_active,
    uncompiled,
    unseen,
)
from freevars.torch._compat.wrappers import (
    is_grad_tracking,
    is_grads_batch,
    is_legacy_batched,
    is_plain,
    is_wrapped,
    layers,
    primal_and_tangent,
    tangents,
    unwrap,
    without_ended,
)

__all__ = [
    "CheckpointFunction",
    "DispatchMode",
    "Saved",
    "addresses",
    "checkpointing",
    "compiling",
    "eagerly",
    "forward_mode",
    "function_mode_count",
    "function_modes",
    "functorch_active",
    "has_hooks",
    "in_backward",
    "is_custom_function_call",
    "is_custom_function_node",
    "is_grad_tracking",
    "is_grads_batch",
    "is_higher_order",
    "is_legacy_batched",
    "is_operator",
    "is_plain",
    "is_recorded",
    "is_reentrant_checkpoint_node",
    "is_wrapped",
    "layers",
    "not_inference",
    "operator_body",
    "overloads",
    "owns_memory",
    "parts",
    "primal_and_tangent",
    "pytree",
    "recording",
    "schema",
    "sharded_parameters",
    "storage_key",
    "tangents",
    "transform_level",
    "transforms_active",
    "uncompiled",
    "unseen",
    "unwrap",
    "versions",
    "without_checkpoints",
    "without_ended",
]

# The pytree module that torch.func itself uses. Its name is private; its functions are the
# documented way to make torch.func accept a class (`register_pytree_node`).
pytree = torch.utils._pytree  # noqa: SLF001
