"""Functions that run on the host in the middle of a program."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import numpy as np

from freevars.jax._compat.private import callback as callbacks
from freevars.jax._compat.private import core, dispatch, ffi, mlir

__all__ = ["CALLBACKS", "cells_that_count", "host_call"]

# Primitives that call a function of the user's on the host each time that they run.
CALLBACKS = {
    "buffer_callback",
    "debug_callback",
    "freevars_host_call",
    "io_callback",
    "pure_callback",
}


def cells_that_count(fun: FunctionType) -> list[Any]:
    """What a function closes over, without what only says where it was made.

    The callbacks with which equinox raises an error at run time hold the stack of calls that led to
    them, each `filter_jit` there under a fresh random mark, to show it below the message.
    """
    names = fun.__code__.co_freevars
    reports = {"stack"} if fun.__module__ == "equinox._errors" else set()
    pairs = zip(names, fun.__closure__ or (), strict=True)
    return [cell.cell_contents for name, cell in pairs if name not in reports]


def host_call(
    callback: Any, results: Sequence[Any], *args: Any, everywhere: bool = False
) -> list[Any]:
    """Call `callback(*args) -> arrays` on NumPy arrays from inside a program.

    In a program that JAX spreads over devices itself it runs once, on the first of them, and all
    have the results; `everywhere`: on each. Inside `shard_map` it runs on each device.

    `jax.pure_callback` first makes JAX arrays of the operands, and waiting for these inside a
    callback is one of the ways to a deadlock; what it does with the results depends on a setting
    (64 bits) of a thread that is not the caller's. `buffer_callback` does neither, and runs on each
    device. So this is a primitive of its own, lowered as `pure_callback` is.
    """
    out: list[Any] = _host_call_p.bind(
        *args, callback=callback, results=tuple(results), everywhere=everywhere
    )
    return out


_host_call_p = core.Primitive("freevars_host_call")
_host_call_p.multiple_results = True
dispatch.prim_requires_devices_during_lowering.add(_host_call_p)


def _run(*args: Any, **params: Any) -> Any:
    return dispatch.apply_primitive(_host_call_p, *args, **params)


def _types(*_: Any, results: Sequence[Any], **__: Any) -> Any:
    return [core.ShapedArray(r.shape, r.dtype) for r in results]


def _lower(ctx: Any, *args: Any, callback: Any, results: Sequence[Any], everywhere: bool) -> Any:
    module = ctx.module_context

    def call(*arrays: Any) -> tuple[Any, ...]:
        values = zip(callback(*arrays), results, strict=True)
        return tuple(np.asarray(value, r.dtype) for value, r in values)

    if everywhere:
        sharding = callbacks._get_sdy_array_list_for_callbacks(ctx.avals_out)  # noqa: SLF001
    else:
        sharding = callbacks._callback_op_sharding(module.axis_context, None, ctx.avals_out)  # noqa: SLF001
    module.add_host_callback(call)
    platform = "cpu" if module.platforms[0] == "cpu" else "gpu"
    lower = ffi.build_ffi_lowering_function(f"xla_ffi_python_{platform}_callback")
    op = lower(ctx, *args, index=np.uint64(len(module.host_callbacks) - 1))
    if sharding is not None:
        _set_sharding(module, op, sharding)
    return op.results


def _set_sharding(module: Any, op: Any, sharding: Any) -> None:
    given = (module, op, sharding)  # JAX 0.9 takes no module
    mlir.set_sharding(*given[-len(inspect.signature(mlir.set_sharding).parameters) :])


_host_call_p.def_impl(_run)
_host_call_p.def_abstract_eval(_types)
mlir.register_lowering(_host_call_p, _lower, cacheable=False)
