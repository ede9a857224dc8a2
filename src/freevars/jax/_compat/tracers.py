"""What a tracer is made of, and which transformation made it.

No public name tells one kind of tracer from another, or gives access to its parts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.interpreters.ad import Zero as _Zero

from freevars.jax._compat.params import JAXPR_TYPES
from freevars.jax._compat.private import ad, batching, core, partial_eval, source_info_util
from freevars.jax._compat.values import Tracer, is_symbolic_zero

__all__ = [
    "argument_in",
    "argument_of",
    "at_once",
    "computes_now",
    "is_live",
    "is_open",
    "layer",
    "literal",
    "made_by",
    "nothing_traced",
    "variable",
    "wait_for",
    "was_computed",
]


def is_live(tracer: Any) -> bool:
    """Whether the transformation that made a tracer is still under way."""
    return bool(tracer._trace.is_valid())  # noqa: SLF001


def is_open(tracer: Any) -> bool:
    """Whether a traced value can be read now: its transformation is one of those under way. JAX
    only says so of those that are not programs."""
    if not isinstance(tracer, partial_eval.DynamicJaxprTracer):
        return is_live(tracer)
    trace: Any = core.trace_ctx.trace
    while trace is not None and trace is not tracer._trace:  # noqa: SLF001
        trace = getattr(trace, "parent_trace", None)
    return trace is not None


def layer(tracer: Any) -> tuple[str, Any, bool | None]:
    """The transformation that made a tracer, the value that it wraps (None where that is not known
    yet, as under `jit`), and whether it is perturbed (None where it is as its value is)."""
    if isinstance(tracer, batching.BatchTracer):
        return ("vmap", tracer.val, None)
    if isinstance(tracer, ad.LinearizeTracer):
        is_vjp = getattr(tracer._trace, "is_vjp", True)  # noqa: SLF001
        return ("grad" if is_vjp else "jvp", tracer.primal, not _is_zero(tracer.tangent))
    if isinstance(tracer, ad.JVPTracer):
        return ("jvp", tracer.primal, not _is_zero(tracer.tangent))
    traced_for = getattr(getattr(tracer, "_debug_info", None), "traced_for", None)
    return (str(traced_for or type(tracer).__name__.removesuffix("Tracer")), None, True)


def wait_for(values: Any) -> None:
    """Wait until what is computed now is there, inside `vmap` and `grad` too; raises its error."""
    found = []
    for leaf in jax.tree.leaves(values):
        x = leaf
        while isinstance(x, Tracer):
            _, x, _ = layer(x)
        found.append(x)
    jax.block_until_ready(found)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, _Zero) or is_symbolic_zero(tangent)


def was_computed(tracer: Any) -> bool | None:
    """Whether an operation made a tracer, or None where nothing tells. The other ones are the
    inputs of their transformation."""
    if isinstance(tracer, partial_eval.DynamicJaxprTracer):
        return getattr(tracer, "parent", None) is not None
    if isinstance(tracer, batching.BatchTracer):
        traceback = getattr(tracer.source_info, "traceback", None)
        for code in traceback.raw_frames()[0] if traceback is not None else ():
            if source_info_util.is_user_filename(code.co_filename):
                return True  # an operation that the user wrote, with nothing of `vmap` in between
            if code.co_name == "_batch_inner":
                return False
        return None
    for part in (getattr(tracer, "tangent", None), getattr(tracer, "primal", None)):
        if isinstance(part, Tracer):
            return was_computed(part)
    return None


def made_by(tracer: Any) -> Any:
    """The source information of what made a tracer, or None."""
    if not was_computed(tracer):
        return None
    for part in (tracer, getattr(tracer, "tangent", None), getattr(tracer, "primal", None)):
        info = getattr(part, "_line_info", None) or getattr(part, "source_info", None)
        if info is not None:
            return info
    return None


def variable(tracer: Any) -> Any:
    """The variable that stands for a tracer in the program that is being traced, or None."""
    stands = tracer.val if isinstance(tracer, partial_eval.DynamicJaxprTracer) else None
    return None if isinstance(stands, core.Literal) else stands


def literal(tracer: Any) -> Any:
    """The number that stands for a tracer in the program that is being traced, or None."""
    stands = tracer.val if isinstance(tracer, partial_eval.DynamicJaxprTracer) else None
    return stands if isinstance(stands, core.Literal) else None


def argument_of(tracer: Any) -> tuple[str, str]:
    """The argument that a tracer is, and of which function, `("w", "loss at model.py:41")`; empty
    strings where it is none, or nobody knows."""
    x: Any = tracer
    while isinstance(x, Tracer):
        if isinstance(x, partial_eval.DynamicJaxprTracer):
            frame: Any = x._trace.frame  # noqa: SLF001
            return _argument(frame.invars, frame.debug_info, x.val)
        _, x, _ = layer(x)
    return "", ""


def argument_in(jaxpr: Any, variable: Any) -> tuple[str, str]:
    """As `argument_of`, for a variable of a program."""
    if not isinstance(jaxpr, JAXPR_TYPES):
        return "", ""
    opened: Any = getattr(jaxpr, "jaxpr", jaxpr)
    return _argument(opened.invars, opened.debug_info, variable)


def _argument(variables: Any, debug_info: Any, variable: Any) -> tuple[str, str]:
    names = getattr(debug_info, "arg_names", None) or ()
    for name, other in zip(names, variables, strict=False):
        if other is variable and name:
            fun, _, place = str(debug_info.func_src_info).partition(" at ")
            return str(name), f"{fun} at {Path(place).name}"
    return "", ""


def nothing_traced() -> bool:
    """Whether no transformation is under way, so that no traced value can be anywhere."""
    return bool(core.trace_state_clean())


def computes_now() -> bool:
    """Whether an operation on known values gives a value, and not a step of a program under way."""
    # Asking by an operation is the public way, and takes a hundred times as long.
    return nothing_traced() or not isinstance(jax.lax.neg(np.float32(0)), Tracer)


def at_once() -> AbstractContextManager[None]:
    """Where `computes_now`, functions of known values run as they do outside of transformations.

    JAX hands a compiled function to each transformation under way, which splits it into what is
    known and what is not, every time. The public way, `jax.ensure_compile_time_eval`, is a setting
    that functions are compiled for once more, and leaves that split. Collectives over named axes
    are known to their transformation alone.
    """
    return nullcontext() if core.get_axis_env().axis_sizes else core.eval_context()
