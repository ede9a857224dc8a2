"""Which captured values become arguments: the policies of `hoist=`, for tracers and arrays.

Not here: what is done with hoisted values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from freevars._contract import Hoist, hoist_policy
from freevars.jax import _compat
from freevars.jax._describe import tracers

__all__ = ["policy_of"]


def policy_of(hoist: Hoist) -> Callable[[Any], bool]:
    """Whether a captured value becomes an argument."""
    return hoist_policy(hoist, _NAMED)


def _is_differentiable(x: Any) -> bool:
    # What `jax.closure_convert` hoists: perturbed, or under `jit` perhaps perturbed later.
    return tracers.can_flow(x, hoisted=False)


def _is_traced(x: Any) -> bool:
    return isinstance(x, _compat.Tracer)


def _is_floating(x: Any) -> bool:
    return _is_traced(x) or jnp.issubdtype(tracers.type_of(x)[1], jnp.inexact)


_NAMED: dict[str, Callable[[Any], bool]] = {
    "differentiable": _is_differentiable,
    "traced": _is_traced,
    "floating": _is_floating,
    "all": lambda _: True,
}
