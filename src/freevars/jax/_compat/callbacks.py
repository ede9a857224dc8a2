"""Functions that run on the host in the middle of a program."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

__all__ = ["CALLBACKS", "cells_that_count", "host_call"]

# Primitives that call a function of the user's on the host each time that they run.
CALLBACKS = {"pure_callback", "io_callback", "debug_callback", "buffer_callback"}


def cells_that_count(fun: FunctionType) -> list[Any]:
    """What a function closes over, without what only says where it was made.

    The callbacks with which equinox raises an error at run time hold the stack of calls that led to
    them, each `filter_jit` there under a fresh random mark, to show it below the message.
    """
    names = fun.__code__.co_freevars
    reports = {"stack"} if fun.__module__ == "equinox._errors" else set()
    pairs = zip(names, fun.__closure__ or (), strict=True)
    return [cell.cell_contents for name, cell in pairs if name not in reports]


def host_call(callback: Any, results: Sequence[Any], *args: Any) -> list[Any]:
    """Call `callback(*args) -> arrays` on NumPy arrays from inside a program.

    `jax.pure_callback` first makes JAX arrays of the operands, and waiting for these inside a
    callback is one of the ways to a deadlock. On a CPU the experimental `buffer_callback` hands the
    memory over as it is; elsewhere the operands have to be copied from the device anyway.
    """
    results = tuple(results)
    if jax.default_backend() != "cpu":
        return list(jax.pure_callback(lambda *a: _checked(callback(*a), results), results, *args))

    def on_buffers(_: Any, out: Any, *buffers: Any) -> None:
        values = callback(*[np.asarray(b) for b in buffers])
        for target, value in zip(out, values, strict=True):
            np.asarray(target)[...] = value

    return list(buffer_callback(on_buffers, results)(*args))


def _checked(values: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(np.asarray(v, r.dtype) for v, r in zip(values, results, strict=True))
