"""Closures as values in JAX: ``import freevars.jax as fv``."""

from freevars.jax import _compat  # noqa: F401 (first: it says what to install where JAX is missing)
from freevars.jax._closure import Closure
from freevars.jax._convert import closure_convert

__all__ = ["Closure", "closure_convert"]
