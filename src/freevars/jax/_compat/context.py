"""The settings that tracing and compiling depend on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import ParamSpec, TypeVar

import jax

from freevars.jax._compat.private import config

__all__ = ["any_rank", "trace_context"]

P = ParamSpec("P")
R = TypeVar("R")


def any_rank(fun: Callable[P, R]) -> Callable[P, R]:
    """`fun`, which multiplies a matrix by a vector's entries whatever `jax_numpy_rank_promotion`
    says: that is for the code of those who set it."""

    @functools.wraps(fun)
    def allowed(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_rank_promotion("allow"):
            return fun(*args, **kwargs)

    return allowed


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
