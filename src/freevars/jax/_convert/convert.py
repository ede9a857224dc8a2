"""Closure conversion: run a function once on types, and find every value that it reads from
outside.

JAX traces the function to a program; every value that did not come in through the arguments is a
constant of that program, however it was reached. Each of the following steps has its own file:
bring nested constants up (`lambda_lift`), drop what nothing needs, and give the rest a key
(`jaxpr_key`) under which the program is shared (`program`). What JAX has already traced is not
traced again (`from_jit`). Nothing else is remembered between conversions, so nothing goes stale and
nothing is kept alive.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
from jax import tree_util

from freevars._contract import check_callable
from freevars._names.callables import plain_name
from freevars.errors import CaptureError, LeakError
from freevars.jax import _compat
from freevars.jax._convert.arguments import ArgSpec, insert, partition
from freevars.jax._convert.from_jit import JittedCall
from freevars.jax._convert.jaxpr_key import JaxprKey, array_key, frozen
from freevars.jax._convert.lambda_lift import lambda_lift
from freevars.jax._convert.program import Program
from freevars.jax._convert.rule_call import with_rules
from freevars.jax._convert.static import Static, tree_key
from freevars.jax._describe.operands import captured_by_rules
from freevars.jax._describe.tracers import can_flow, identity
from freevars.jax._selftest import check_release

__all__ = ["convert", "described", "share", "trace"]


class Traced(NamedTuple):
    """A function run once: the open program, which reads the captured values and then the
    arguments, these values in order of first use, and the types of arguments and results."""

    jaxpr: Any
    values: list[Any]
    inputs: ArgSpec
    outputs: ArgSpec
    kept: list[Any]  # what cannot be replaced (`_keep_what_rules_hold`)
    keys: dict[int, Hashable]  # of what JAX keeps of its own rules


def trace(fun: Callable[..., Any], example_args: Sequence[Any]) -> Traced:
    """Trace `fun` on the types of the example arguments."""
    check_callable(fun)
    check_release()
    arrays, tree, others = partition(tuple(example_args))
    types = tuple([_compat.example_type(x) for x in arrays])
    result: list[Any] = []

    def on_leaves(*leaves: Any) -> list[Any]:
        outs, *rest = partition(fun(*tree_util.tree_unflatten(tree, insert(leaves, others))))
        result[:] = rest
        return outs

    # A new function for each conversion: JAX drops its trace when the function is gone.
    closed = jax.make_jaxpr(on_leaves)(*arrays)
    # Only now: `fun` may have filled a cache in a static leaf, which does not count as a change.
    inputs = ArgSpec(tree, types, _statics(others))
    outputs = ArgSpec(result[0], tuple(closed.out_avals), _statics(result[1]))
    lifted = lambda_lift(closed)
    jaxpr, values = _in_order_of_use(lifted.jaxpr, lifted.values, len(arrays))
    captured = captured_by_rules(jaxpr, len(values)) if lifted.captures else {}
    kept = [
        values[i]
        for i, stays in sorted(captured.items())
        if stays or (isinstance(values[i], _compat.Tracer) and can_flow(values[i], hoisted=False))
    ]
    known = {identity(x) for x in values}
    beside = [x for x in lifted.beside if identity(x) in known or _is_open_tracer(x)]
    return Traced(jaxpr, values, inputs, outputs, [*kept, *beside], lifted.keys)


def _is_open_tracer(x: Any) -> bool:
    return isinstance(x, _compat.Tracer) and _compat.is_open(x)


def _statics(leaves: Sequence[tuple[int, Any]]) -> tuple[tuple[int, Static], ...]:
    return tuple([(i, Static(leaf)) for i, leaf in leaves])


def convert(
    fun: Callable[..., Any], example_args: Sequence[Any]
) -> tuple[Program, tuple[Any, ...]]:
    """The program of `fun`, shared with every other function that computes the same, and its
    captured values in order of first use."""
    call = JittedCall.of(fun, example_args)
    known = None if call is None else call.known()
    if known is not None:
        return known
    traced = trace(fun, example_args)
    inputs, outputs, met = traced.inputs, traced.outputs, traced.values
    _refuse_refs(fun, traced.jaxpr, met)
    jaxpr_key = JaxprKey(traced.jaxpr, traced.keys)
    jaxpr, values, fixed = _keep_what_rules_hold(fun, traced)
    free = set(map(identity, values)) if fixed else set()
    places = [(i, array_key(v)) for i, v in enumerate(met) if fixed and identity(v) not in free]
    program = share(jaxpr, jaxpr_key, fixed, tuple(places), inputs, outputs, plain_name(fun))
    if call is not None:
        call.keep(program, values)
    return program, tuple(values)


def share(
    jaxpr: Any,
    jaxpr_key: JaxprKey,
    fixed: Sequence[Any],
    places: Hashable,
    inputs: ArgSpec,
    outputs: ArgSpec,
    name: str,
) -> Program:
    """The program of an open jaxpr that reads fixed constants, captured values and arguments.

    `places` says which values are constants, and where.
    """
    values = jaxpr.invars[len(fixed) : len(jaxpr.invars) - len(inputs.types)]
    value_types = tuple([v.aval for v in values])
    if not jaxpr_key.functions:  # which are given values as they are, weak or not
        inputs, value_types = _without_weak_types(jaxpr, inputs, value_types, outputs)
    key = (
        jaxpr_key.key,
        places,
        value_types,
        _compat.trace_context(),
        _arg_spec_key(inputs),
        _arg_spec_key(outputs),
    )

    def make() -> Program:
        runnable = with_rules(jaxpr) if jaxpr_key.has_rules else jaxpr
        return Program(runnable, fixed, value_types, inputs, outputs, name, jaxpr)

    return Program.intern(
        key,
        make,
        keep=not jaxpr_key.foreign and not fixed and inputs.is_plain and outputs.is_plain,
    )


def _without_weak_types(
    jaxpr: Any, inputs: ArgSpec, value_types: tuple[Any, ...], outputs: ArgSpec
) -> tuple[ArgSpec, tuple[Any, ...]]:
    """The types of arguments and captured values, made strong where weakness cannot matter: where
    it decides no dtype in the program and no result is weak. A scalar argument stays a number."""
    arrays = [t for t in inputs.types if getattr(t, "shape", ())]
    if not any(map(_compat.is_weak, (*arrays, *value_types))):
        return inputs, value_types
    if any(map(_compat.is_weak, outputs.types)) or _compat.converts_weak_values(jaxpr):
        return inputs, value_types
    types = [_compat.strong(t) if getattr(t, "shape", ()) else t for t in inputs.types]
    return inputs._replace(types=tuple(types)), tuple(map(_compat.strong, value_types))


def _in_order_of_use(jaxpr: Any, values: list[Any], n_args: int) -> tuple[Any, list[Any]]:
    """Remove dead code and the values that only it reads; order the others by first use."""
    keep = [False] * len(values) + [True] * n_args
    jaxpr, used = _compat.drop_dead_code(jaxpr, keep)
    values = [value for value, use in zip(values, used, strict=False) if use]
    variables, args = jaxpr.invars[: len(values)], jaxpr.invars[len(values) :]
    waiting = dict(zip(variables, values, strict=True))
    order: list[Any] = []
    ordered: list[Any] = []

    def read(atoms: Sequence[Any]) -> None:
        for atom in atoms:
            if type(atom) is not _compat.Literal and atom in waiting:
                order.append(atom)
                ordered.append(waiting.pop(atom))

    for eqn in jaxpr.eqns:
        if not waiting:
            break
        read(eqn.invars)
    read(jaxpr.outvars)
    if order != variables:
        jaxpr = _compat.replace(jaxpr, invars=[*order, *args])
    return jaxpr, ordered


def _keep_what_rules_hold(
    fun: Callable[..., Any], traced: Traced
) -> tuple[Any, list[Any], list[Any]]:
    """Split the captured values into those that can be replaced and those that cannot.

    A custom rule that stays a function reads its own captured values when JAX runs it. If one were
    replaced in the body and not in the rule, the derivative would be silently wrong. So a concrete
    array that either captures stays as it is, and a traced one is refused. So is a traced one that
    the function of a `custom_vjp` captures and that may be differentiated: the rule says that the
    derivative is not that of the body, and does not say what it is.
    """
    jaxpr, values, kept = traced.jaxpr, traced.values, traced.kept
    for x in [x for x in values if isinstance(x, _compat.Tracer) and not _compat.is_open(x)]:
        message = (
            f"{described(fun, x, jaxpr, values)}: {plain_name(fun)} uses this value outside the"
            " transformation that it belongs to. If it was stored by a side effect, return it from"
            " the transformed function instead; if it was in a cache, compute it again."
        )
        raise LeakError(message)
    for x in [x for x in kept if isinstance(x, _compat.Tracer)]:
        message = (
            f"{plain_name(fun)}: a function in it that has a rule of its own (a custom derivative,"
            " custom_vmap, linear_call), or the rule, captures the traced value"
            f" {described(fun, x, jaxpr, values)}, and does not give its derivative. Pass"
            " the value to the function that has the rule as an argument, and read it from there"
            " in the rule too."
        )
        raise CaptureError(message)
    if not kept:
        return jaxpr, values, []
    keys = {identity(x) for x in kept}
    pairs = list(zip(jaxpr.invars, values, strict=False))
    fixed = [(var, v) for var, v in pairs if identity(v) in keys]
    free = [(var, v) for var, v in pairs if identity(v) not in keys]
    invars = [var for var, _ in (*fixed, *free)] + jaxpr.invars[len(values) :]
    return (
        _compat.replace(jaxpr, invars=invars),
        [v for _, v in free],
        [frozen(v) for _, v in fixed],
    )


def _refuse_refs(fun: Callable[..., Any], jaxpr: Any, values: Sequence[Any]) -> None:
    for var, value in zip(jaxpr.invars, values, strict=False):
        if isinstance(var.aval, _compat.REF_TYPE):
            message = (
                f"{plain_name(fun)} captures the mutable reference"
                f" {described(fun, value, jaxpr, values)}."
                " Reading or writing it is an effect that an argument list cannot carry: pass the"
                " reference as an argument, or read it before and capture the array."
            )
            raise CaptureError(message)


def described(*told: Any) -> str:
    """See `describe_capture`."""
    # Names and reports take as long to import as the rest of a conversion, and only errors need it.
    from freevars.jax._describe.describe import describe_capture  # noqa: PLC0415

    return describe_capture(*told)


def _arg_spec_key(spec: ArgSpec) -> Any:
    return (tree_key(spec.tree), spec.types, spec.statics)
