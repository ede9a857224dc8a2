"""Closures as values in JAX: ``import freevars.jax as fv``."""

from freevars.jax._closure import Closure
from freevars.jax._convert import closure_convert

__all__ = ["Closure", "closure_convert"]
