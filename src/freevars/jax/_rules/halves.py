"""How well a solver integrates a derivative: its integral against the sum over both halves.

`freevars._solvers.integration` explains the comparison. Not here: the derivative (`integral`), and
what is done about one that is not good (`integrator`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from freevars._solvers.integration import SAMPLES
from freevars.jax._rules.coordinates import firm_probe, max_abs

__all__ = ["difference", "direction"]


def direction(v: Any) -> Any:
    """A direction for a vector: entries of both signs, relative to its own."""
    return jax.lax.stop_gradient(firm_probe(v, 21) * jnp.where(v != 0, jnp.abs(v), 1))


def difference(
    integrate: Callable[[Any, Any], Sequence[Any]],
    integrand: Callable[[Any], Sequence[Any]],
    ends: tuple[Any, Any],
    whole: Sequence[Any],
) -> Any:
    """How far the sum over both halves is from the integral over the whole; relative, a constant.

    Args:
        integrate: from limits to the integral, as a list of arrays.
        integrand: of a point, as such a list.
        ends: the limits, floating arrays. Where one is infinite there is no half, and nothing is
            compared.
        whole: the integral between them.
    """
    a, b = jax.lax.stop_gradient(ends)
    finite = jnp.isfinite(a) & jnp.isfinite(b)
    low, high = jnp.where(finite, a, 0), jnp.where(finite, b, 0)
    middle = low + (high - low) / 2
    lows, highs = jnp.stack([low, middle]), jnp.stack([middle, high])
    # One after the other: what is integrated need not know `vmap`.
    halves = jax.lax.map(lambda ends: list(integrate(*ends)), (lows, highs))
    points = low + (high - low) * (jnp.arange(SAMPLES, dtype=low.dtype) + 0.3) / SAMPLES
    samples = jax.lax.map(lambda t: list(integrand(t)), points)
    fixed = jax.lax.stop_gradient((list(whole), list(halves), list(samples)))
    largest = jnp.zeros(())
    for one, two, between in zip(*fixed, strict=True):
        parts = jnp.abs(two)
        size = jnp.maximum(jnp.abs(one), jnp.sum(parts, axis=0))
        average = jnp.mean(jnp.abs(between), axis=0) * jnp.abs(high - low).astype(size.dtype)
        size = jnp.maximum(size, average)
        size = jnp.maximum(size, jnp.finfo(size.dtype).eps ** 0.5 * jnp.max(size, initial=0))
        gap = jnp.abs(one - jnp.sum(two, axis=0)) / jnp.where(size > 0, size, 1)
        largest = jnp.maximum(largest, max_abs(gap).astype(largest.dtype))
    return jnp.where(finite, largest, 0)
