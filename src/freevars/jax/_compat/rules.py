"""What JAX keeps of a custom derivative rule, and wraps around functions that it calls later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import jax

from freevars.jax._compat.params import nested_programs
from freevars.jax._compat.private import (
    core,
    custom_derivatives,
    hijax,
    linear_util,
    partial_eval,
    util,
)
from freevars.jax._compat.programs import Eqn, Var, close, replace
from freevars.jax._compat.values import ARRAY_TYPES, is_smooth

__all__ = [
    "RULED",
    "RULED_FUNCTIONS",
    "captured_by_rule",
    "declared_parts",
    "function_beside",
    "function_parts",
    "has_cond",
    "has_custom_vjp",
    "has_custom_vmap",
    "held_by_operation",
    "is_beside",
    "jvp_program",
    "rule_objects",
    "trace_beside",
    "unwrapped",
    "vmap_rule",
]

# What a walk through JAX's own wrappers around a user's function meets, and which of it decides
# what the function computes. JAX makes these wrappers afresh each time it traces, so that their
# identity says nothing; they have no public face.
_IGNORED = (
    partial_eval.DynamicJaxprTrace,
    linear_util.Store,
    linear_util.EqualStore,
    core.DebugInfo,
    core.TraceTag,
)

# Operations whose meaning a class gives, and a few parameters: some of JAX's own rules are such
# objects, made for each use (`jax_custom_vjp3` and its like), and `jax.experimental.hijax`, which
# takes long to import, offers the class to users.
_HIGH_PRIMITIVES = tuple(
    getattr(hijax, name) for name in ("HiPrim", "VJPHiPrimitive") if hasattr(hijax, name)
)

_WRAPPED = tuple(
    getattr(util, name)
    for name in ("Hashable", "Unhashable", "HashableWrapper")
    if hasattr(util, name)
)


def function_parts(x: Any) -> tuple[Any, ...] | None:
    """What decides the meaning of one of JAX's wrappers, or None when `x` is not such a wrapper."""
    if isinstance(x, linear_util.WrappedFun):
        transforms = [(made_by, *args) for made_by, args in _transforms(x)]
        return (x.f, tuple(transforms), x.params)
    if isinstance(x, _IGNORED):
        return ()
    if isinstance(x, _WRAPPED):
        return (x.val,) if hasattr(x, "val") else (x.x,)
    if isinstance(x, util.HashableFunction):
        return (x.f, x.closure)
    if isinstance(x, util.HashablePartial):
        return (x.f, x.args, tuple(x.kwargs.items()))
    if _is_jax_operation(x):
        declared = declared_parts(x)
        if declared is not None:
            return declared
    if isinstance(x, jax.stages.Traced):
        params = tuple((k, v) for k, v in x._params.items() if k != "name")  # noqa: SLF001
        return (params, x._in_tree, x.out_tree, tuple(x._consts))  # noqa: SLF001
    cells = _cells(x)
    if "used_outs" in cells:
        return (tuple(cells["used_outs"]), *[cells[k] for k in _RULE_CELLS if k in cells])
    return None


def declared_parts(x: Any) -> tuple[Any, ...] | None:
    """What an operation that is an object of a class (`hijax`) holds, beside that class, and its
    types. None for any other object, and for one of a class with an equality of its own.

    JAX compares class and parameters alone, and the operations that it makes have nothing else.
    """
    if not isinstance(x, _HIGH_PRIMITIVES) or type(x).__eq__ not in _DECLARED:
        return None
    types = tuple(x.in_avals_flat), tuple(x.out_avals_flat)
    effects: Any = getattr(x, "effects", frozenset())  # since JAX 0.10
    own = () if _is_jax_operation(x) else tuple(vars(x).items())
    return (*types, x.in_tree, x.out_tree, effects, tuple(x.params.items()), own)


def _is_jax_operation(x: Any) -> bool:
    return type(x).__module__.startswith("jax.")


def held_by_operation(eqn: Eqn) -> list[Any]:
    """The arrays and traced values that an operation of a class of the user's holds."""
    # The name of the parameter is private.
    operations = [p for p in eqn.params.values() if isinstance(p, _HIGH_PRIMITIVES)]
    if not operations:
        return []
    held = [vars(operation) for operation in operations if not _is_jax_operation(operation)]
    return [x for x in jax.tree.leaves(held) if isinstance(x, ARRAY_TYPES)]


_DECLARED = [cls.__eq__ for cls in _HIGH_PRIMITIVES]


def _transforms(fun: Any) -> list[Any]:
    return [t for t in fun.transforms if getattr(t[0], "__name__", "") != "_handle_consts_in_bwd"]


def unwrapped(x: Any) -> Any:
    """What a wrapper stands for that adds nothing but a place: JAX puts a few of them around a rule
    whenever it evaluates an equation that has one into another program. None for anything else."""
    if isinstance(x, linear_util.WrappedFun):
        return None if _transforms(x) or x.params else x.f
    cells = _cells(x)
    if not all(cells.get("used_outs", ())):
        return None  # a rule whose results are used in part
    return next((cells[name] for name in ("fn", *_RULE_CELLS) if name in cells), None)


# The memoised function that traces a rule, and what hands a traced rule on.
_RULE_CELLS = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "jvp", "fwd", "bwd")


def _cells(x: Any) -> dict[str, Any]:
    """What a function of the modules that keep rules closes over, by name."""
    if not isinstance(x, FunctionType) or x.__module__ not in _RULE_MODULES:
        return {}
    try:
        contents = [cell.cell_contents for cell in x.__closure__ or ()]
    except ValueError:  # one is still empty
        return {}
    return dict(zip(x.__code__.co_freevars, contents, strict=True))


_RULE_MODULES = (partial_eval.__name__, custom_derivatives.__name__)

RULED_FUNCTIONS: Any = (jax.custom_jvp, jax.custom_vjp)

# The equations of functions with a custom rule, and the parameters that hold the rule.
RULED = {"custom_jvp_call": "jvp", "custom_vjp_call": "vjp"}

_RULE_PARAMS = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd")


def rule_objects(eqn: Eqn) -> list[Any]:
    """What JAX keeps of the custom rule of an equation."""
    return [eqn.params[name] for name in _RULE_PARAMS if name in eqn.params]


# Equations with a function beside their program that stays one, and may read on its own what the
# program captures: how many leading operands that is. What such a function computes depends on what
# is batched, or on what is linear, and JAX traces it each time.
_BESIDE = {
    "custom_vmap_call": lambda params: params["in_tree"].children()[0].num_leaves,
    "linear_call": lambda params: params["num_callee_consts"],
}


def is_beside(eqn: Eqn) -> bool:
    """Whether an equation has a function beside its program that is never traced here."""
    return eqn.primitive.name in _BESIDE


def function_beside(eqn: Eqn) -> Any:
    """That function, or None."""
    if not is_beside(eqn):
        return None
    return vmap_rule(eqn.params.get("rule", eqn.params.get("transpose_thunk")))


def trace_beside(eqn: Eqn) -> tuple[Any, Sequence[Any]]:
    """A program of that function, as a transformation would run it: the transpose, or the rule for
    a batch of every argument; and what stands before its arguments as constants."""
    if "rule" not in eqn.params:
        program, constants = eqn.params["transpose_thunk"]()
        return program, constants
    rule, tree = function_beside(eqn), eqn.params["in_tree"].children()[1]
    args = [v.aval for v in eqn.invars[captured_by_rule(eqn) :]]
    batched = [jax.ShapeDtypeStruct((2, *aval.shape), aval.dtype) for aval in args]
    all_batched = list(tree.unflatten([True] * len(args)))
    made = jax.make_jaxpr(lambda *args: rule(2, all_batched, *args)[0])(*tree.unflatten(batched))
    return made, ()


def vmap_rule(x: Any) -> Any:
    """The user's function in the object, fresh in each trace, that JAX puts around the rule of a
    `custom_vmap`; anything else as it is."""
    wrapped = type(x).__name__ == "ClosedRule" and type(x).__module__ == "jax._src.custom_batching"
    return x.rule if wrapped else x


def captured_by_rule(eqn: Eqn) -> int:
    """How many leading operands the body of a function with a custom rule captures, 0 for any other
    equation. JAX gives none of them to the rule."""
    params = eqn.params
    if eqn.primitive.name in _BESIDE:
        return _BESIDE[eqn.primitive.name](params)
    if eqn.primitive.name not in RULED:
        # One that was traced already: along what a `custom_vjp` captures there is no derivative.
        traced = params.get("rule")
        return params["captured"] if getattr(traced, "kind", "") == "vjp" else 0
    count: int = params["num_consts"]
    # An equation that was evaluated into another program has what it captured among its operands
    # there, before those that it captures anew.
    x = next(params[name] for name in _RULE_PARAMS if name in params)
    while x is not None:
        if {"num_consts"} < _cells(x).keys():
            count += _cells(x)["num_consts"]
        x = x.f if isinstance(x, linear_util.WrappedFun) else unwrapped(x)
    return count


def jvp_program(eqn: Eqn, smooth: Sequence[bool]) -> tuple[Any, list[bool]] | None:
    """The rule of a `custom_jvp` as JAX traces it when a derivative is taken along all arguments
    that have one: a program of the arguments and these tangents, to the results and the tangents
    that are not known to be zero; and which these are.

    The public way, `jax.make_jaxpr` of `jax.jvp`, traces the rule and then its trace once more.
    None where only that way will do.
    """
    symbolic = eqn.params["symbolic_zeros"]
    # What the body captures stands before the arguments, as far as it was captured earlier.
    earlier = len(eqn.invars) - len(smooth) - eqn.params["num_consts"]
    zeros = [True] * earlier + [symbolic and not s for s in smooth]
    jaxpr, consts, out_zeros = eqn.params["jvp_jaxpr_fun"].call_wrapped(*zeros)
    # By hand: JAX's own way remembers the result, and with it what the rule holds.
    opened = replace(jaxpr, constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    held, args = opened.invars[: len(consts)], opened.invars[len(consts) + earlier :]
    args, dots = args[: len(smooth)], args[len(smooth) :]
    if not symbolic:
        read = {v for e in opened.eqns for v in e.invars if type(v) is Var} | set(opened.outvars)
        if any(v in read for v, s in zip(dots, smooth, strict=True) if not s):
            return None
        dots = [v for v, s in zip(dots, smooth, strict=True) if s]
    results = opened.outvars[: len(out_zeros)]
    waiting = iter(opened.outvars[len(out_zeros) :])
    made = [None if zero else next(waiting) for zero in out_zeros]
    moved = [
        dot is not None and is_smooth(v.aval) for dot, v in zip(made, eqn.outvars, strict=True)
    ]
    outvars = [*results, *[dot for dot, m in zip(made, moved, strict=True) if m]]
    opened = replace(opened, invars=[*held, *args, *dots], outvars=outvars)
    return close(opened, consts), moved


def has_custom_vjp(jaxpr: Any) -> bool:
    """Whether a program, or one nested in it, has a rule for reverse mode only."""
    return _holds(
        jaxpr,
        lambda eqn: (
            eqn.primitive.name == "custom_vjp_call"
            or "CustomVJP" in type(eqn.params.get("_prim")).__name__
        ),
    )


def has_custom_vmap(jaxpr: Any) -> bool:
    """Whether a program, or one nested in it, has a rule for batches."""
    return _holds(jaxpr, lambda eqn: eqn.primitive.name == "custom_vmap_call")


def has_cond(jaxpr: Any) -> bool:
    """Whether a program, or one nested in it, chooses between programs."""
    return _holds(jaxpr, lambda eqn: eqn.primitive.name == "cond")


def _holds(jaxpr: Any, wanted: Callable[[Any], bool]) -> bool:
    return any(
        wanted(eqn) or any(_holds(getattr(j, "jaxpr", j), wanted) for j in nested_programs(eqn))
        for eqn in jaxpr.eqns
    )
