"""The private modules of JAX, and what each of them is needed for.

Which of JAX's modules are meant for extensions is discussed in
https://github.com/jax-ml/jax/issues/11951.
"""

from __future__ import annotations

import jax

try:
    # Programs as data: their classes without Pallas, dead code, constants, weak types. Public
    # partial evaluation was declined, for interpreters on `jax.extend.core` (issue 3617), and
    # `jax.interpreters.partial_eval` is going (pull request 31143).
    from jax._src import core  # noqa: I001 (in groups, by what each buys)
    from jax._src import literals  # what JAX makes of a number or of a NumPy array
    from jax._src.interpreters import partial_eval
    from jax._src.lax.lax import (
        _convert_element_type as convert_element_type,
    )  # the public one makes strong types only

    # What a tracer is: which transformation made it, and around which value. Not offered even for
    # extensions (issue 31237).
    from jax._src.interpreters import ad
    from jax._src.interpreters import batching
    from jax._src.interpreters import mlir  # with these two, a primitive of our own

    # What JAX keeps around a custom rule or a callback, to compare functions that it makes afresh
    # in each trace (issue 11951).
    from jax._src import custom_derivatives
    from jax._src import hijax
    from jax._src import linear_util
    from jax._src import util

    # A callback of one's own, placed on one device or on each: JAX's own are bound to what they do
    # with operands and results (issue 11951).
    from jax._src import callback
    from jax._src import dispatch
    from jax._src import ffi

    # The settings on which a trace depends, on which JAX keys its own caches (issue 11951).
    from jax._src import config

    # Errors and reports: the lines that a user wrote, tracebacks as JAX shows them (issue 11951).
    from jax._src import source_info_util
    from jax._src import traceback_util
except ImportError as error:  # pragma: no cover (of a release that nobody has yet)
    message = (
        f"freevars does not know JAX {jax.__version__}: {error}. Use an older JAX, or a newer"
        " freevars."
    )
    raise ImportError(message) from error

__all__ = [
    "ad",
    "batching",
    "callback",
    "config",
    "convert_element_type",
    "core",
    "custom_derivatives",
    "dispatch",
    "ffi",
    "hijax",
    "linear_util",
    "literals",
    "mlir",
    "partial_eval",
    "source_info_util",
    "traceback_util",
    "util",
]
