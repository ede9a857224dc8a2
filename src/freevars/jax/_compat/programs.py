"""Programs as data: their classes, taking them apart, changing them, and running them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from freevars.jax._compat.params import nested_programs
from freevars.jax._compat.private import config, core, partial_eval
from freevars.jax._compat.values import Tracer

__all__ = [
    "EQUATION",
    "JITTED",
    "PROGRAMS_HOLD_CONSTANTS",
    "ClosedJaxpr",
    "Eqn",
    "Jaxpr",
    "Literal",
    "Primitive",
    "Var",
    "as_function",
    "captured_tracers",
    "close",
    "drop_dead_code",
    "evaluate",
    "input_of",
    "jaxpr_as_fun",
    "prepend_operands",
    "program_name",
    "replace",
    "scan_counts",
    "scan_with_constants",
    "separate_constants",
    "traced_program",
]

# What `jax.extend.core` offers in public. To import that imports Pallas and MLIR with it, which
# takes twice as long as all of this library; `tests/jax/test_compat.py` holds the two together.
Jaxpr: Any = core.Jaxpr

# Until JAX 0.11 it paired a Jaxpr with its constants; since 0.12 a Jaxpr holds them itself and the
# two names, in public, are one class.
ClosedJaxpr: Any = getattr(core, "ClosedJaxpr", Jaxpr)

# Whether a program that somebody keeps as an open one has its constants in it all the same.
PROGRAMS_HOLD_CONSTANTS = ClosedJaxpr is Jaxpr

Literal: Any = core.Literal

Primitive: Any = core.Primitive

Var: Any = core.Var

jaxpr_as_fun: Any = core.jaxpr_as_fun

Eqn: TypeAlias = Any  # jax.extend.core.JaxprEqn carries no types of its own


def separate_constants(closed: Any) -> tuple[Any, list[Any]]:
    """The same program with its constants as leading inputs, and those constants.

    Private, because the two ways of holding constants (see above) share this one function only.
    """
    return partial_eval.convert_constvars_jaxpr(closed.jaxpr), list(closed.consts)


def close(jaxpr: Any, consts: Sequence[Any] = ()) -> Any:
    """A closed program from an open one that reads constants first, and these."""
    if not consts:
        return ClosedJaxpr(jaxpr, [])
    count = len(consts)
    opened = jaxpr.replace(
        constvars=jaxpr.invars[:count],
        invars=jaxpr.invars[count:],
        debug_info=jaxpr.debug_info._replace(arg_names=None),
    )
    return ClosedJaxpr(opened, list(consts))


def program_name(jaxpr: Any) -> str:
    """The name of the function that a program was traced from."""
    return str(getattr(jaxpr, "jaxpr", jaxpr).debug_info.func_name)


def drop_dead_code(jaxpr: Any, keep_inputs: Sequence[bool]) -> tuple[Any, list[bool]]:
    """The program without what its outputs and effects do not need, and which inputs it reads.

    JAX's own rules for nested programs are the only complete ones, and they have no public name.
    """
    if _SCAN3 is not None and _SCAN3.value:
        message = (
            "jax_scan3 is on: it says nothing of what its loops write, so that JAX itself drops"
            " them"
            " as dead code and computes something else. Turn it off: jax.config.update('jax_scan3',"
            " False)."
        )
        raise NotImplementedError(message)
    if _all_live(jaxpr, keep_inputs):
        return jaxpr, [True] * len(keep_inputs)
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), list(keep_inputs))


def _all_live(jaxpr: Any, keep_inputs: Sequence[bool]) -> bool:
    """Whether a program needs all that it computes, as most do. What it does not need inside a
    nested program is found by JAX alone, and matters where that reads what is not to be kept."""
    live = {v for v in jaxpr.outvars if type(v) is Var}
    droppable = {v for v, keep in zip(jaxpr.invars, keep_inputs, strict=True) if not keep}
    for eqn in reversed(jaxpr.eqns):
        if live.isdisjoint(eqn.outvars):
            return False
        reads = [v for v in eqn.invars if type(v) is Var]
        if eqn.params and not droppable.isdisjoint(reads) and nested_programs(eqn):
            return False
        live.update(reads)
    return droppable <= live


_SCAN3: Any = getattr(config, "scan3", None)


def replace(jaxpr: Any, **changes: Any) -> Any:
    """The same program with other `invars`, `eqns` or `outvars`."""
    return jaxpr.replace(**changes, debug_info=jaxpr.debug_info._replace(arg_names=None))


def evaluate(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of an open program, computed or traced with whatever transformation is under
    way."""
    return jaxpr_as_fun(close(jaxpr))(*operands)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants a `scan` has, and how many values it carries; see
    `scan_with_constants`."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()
    return len(constants), len(carry)


def prepend_operands(eqn: Eqn, operands: Sequence[Any], params: dict[str, Any]) -> Eqn:
    """`eqn` with `operands` before its own, `params` replaced, and whatever else says one thing for
    each operand extended to match (only `jit` has such parameters)."""
    fill = {"in_shardings": _unspecified(), "in_layouts": None, "donated_invars": False}
    for name, value in fill.items():
        if name in eqn.params:
            params[name] = (value,) * len(operands) + tuple(eqn.params[name])
    return eqn.replace(invars=[*operands, *eqn.invars], params={**eqn.params, **params})


@functools.cache
def _unspecified() -> Any:
    """What says that `jit` was told no sharding. It has no public name, but every program shows
    it."""
    (eqn,) = jax.make_jaxpr(jax.jit(jax.lax.neg))(np.float32(0)).eqns
    return eqn.params["in_shardings"][0]


def scan_with_constants(params: dict[str, Any], count: int) -> dict[str, Any]:
    """The parameters of a `scan` with `count` more constants at the front.

    Until JAX 0.11 it counts them; since 0.12 a tree of operands (`ft_in`) says how many there are.
    Until 0.9 it also said of each operand whether the body is linear in it.
    """
    if "num_consts" in params:
        changed: dict[str, Any] = {"num_consts": params["num_consts"] + count}
        if "linear" in params:
            changed["linear"] = (False,) * count + tuple(params["linear"])
        return changed
    constants, carry, xs = params["ft_in"].unpack()
    from jax._src import flattree  # noqa: PLC0415 (exists since 0.12)

    return {"ft_in": flattree.pack((flattree.nones(len(constants) + count), carry, xs))}


def input_of(effect: Any) -> Any:
    """The variable that an effect of a program is of: reads and writes of a reference that is an
    input. None for any other effect. JAX renamed it, and older releases have its number."""
    found = getattr(effect, "input", getattr(effect, "input_index", None))
    return found if type(found) is Var else None


EQUATION: Any = core.JaxprEqn


def as_function(eqn: Eqn) -> Any:
    """An equation as a function of its operands, whatever they are in its program."""
    invars, outvars = ([Var(v.aval) for v in vs] for vs in (eqn.invars, eqn.outvars))
    whole = eqn.replace(invars=invars, outvars=outvars)
    return jaxpr_as_fun(
        close(_empty().replace(invars=invars, outvars=outvars, eqns=[whole], effects=eqn.effects))
    )


@functools.cache
def _empty() -> Any:
    made: Any = jax.make_jaxpr(lambda: ())()
    opened = getattr(made, "jaxpr", made)
    return opened.replace(debug_info=opened.debug_info._replace(arg_names=None, result_paths=None))


# What `jax.jit` returns; the type has no public name.
JITTED: Any = type(jax.jit(lambda: None))


def captured_tracers(jitted: Any, *args: Any) -> list[Any]:
    """The traced values that a jitted function captures. JAX makes them operands of the call, and
    tells so nowhere in public."""
    return [x for x in jitted.trace(*args)._consts if isinstance(x, Tracer)]  # noqa: SLF001


def traced_program(traced: Any) -> Any:
    """The program of `jax.jit(f).trace(...)`, or None where it captures traced values: JAX makes
    these operands of the call (see `captured_tracers`), and traces `f` again in the next trace."""
    if any(isinstance(x, Tracer) for x in traced._consts):  # noqa: SLF001
        return None
    return traced.jaxpr
