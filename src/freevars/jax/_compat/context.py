"""The settings that tracing and compiling depend on."""

from __future__ import annotations

from collections.abc import Hashable

from freevars.jax._compat.private import config

__all__ = ["trace_context"]


def trace_context() -> Hashable:
    """The settings that tracing and compiling depend on: precision, PRNG, mesh and more.

    JAX keys its own caches on the same tuple and offers it nowhere in public. The named axes of an
    enclosing `vmap` or `shard_map` are left out: what depends on them stands in the program itself.
    """
    context: tuple[Hashable, ...] = config.trace_context()
    return context[:_AXIS_ENV] + context[_AXIS_ENV + 1 :]


# Its place, which older releases do not tell: there it is the first.
_AXIS_ENV = (
    config.trace_context_names().index("axis_env_state")
    if hasattr(config, "trace_context_names")
    else 0
)
