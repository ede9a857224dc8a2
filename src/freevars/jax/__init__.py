"""Closures as values in JAX: ``import freevars.jax as fv``."""

from freevars.jax import _compat  # noqa: F401, I001 (first: it says what to install without JAX)
from freevars.jax import testing
from freevars.jax._captures import captures
from freevars.jax._closure import Closure
from freevars.jax._convert.convert import closure_convert
from freevars.jax._report.leaks import explain_leaks
from freevars.jax._host.on_host import on_host, scipy_status
from freevars.jax._rules.rules import argmin, fixed_point, root

__all__ = [
    "Closure",
    "argmin",
    "captures",
    "closure_convert",
    "explain_leaks",
    "fixed_point",
    "on_host",
    "root",
    "scipy_status",
    "testing",
]
