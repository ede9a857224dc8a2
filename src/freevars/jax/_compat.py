"""Everything here leans on a part of JAX that is private or differs between releases.

Each entry says why it is needed. `tests/jax/test_compat.py` checks each one alone, so that a new
release of JAX that changes something fails there first, with the name of what changed. Not here: any
idea of closure conversion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

try:
    import jax
except ImportError as error:  # pragma: no cover (tested in a process of its own)
    msg = "freevars.jax needs JAX: pip install 'freevars[jax]'"
    raise ImportError(msg) from error

import numpy as np
from jax._src import config as _config
from jax._src import core as _core
from jax._src import hijax as _hijax
from jax._src import linear_util as _linear_util
from jax._src import source_info_util as _source_info_util
from jax._src import util as _util
from jax._src.interpreters import partial_eval as _partial_eval
from jax._src.lax.lax import _convert_element_type
from jax._src.lax.lax import convert_element_type_p as _convert_p
from jax._src.sharding_impls import UNSPECIFIED
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

__all__ = [
    "Array",
    "ClosedJaxpr",
    "Eqn",
    "Jaxpr",
    "Literal",
    "Tracer",
    "Var",
    "close",
    "drop_dead_code",
    "example_type",
    "function_parts",
    "is_array",
    "is_ref",
    "prepend_operands",
    "replace",
    "scan_with_constants",
    "separate_constants",
    "trace_context",
]

Array = jax.Array
Tracer = jax.core.Tracer
Eqn: TypeAlias = Any  # jax.extend.core.JaxprEqn carries no types of its own

# Until JAX 0.11 a ClosedJaxpr paired a Jaxpr with its constants; since 0.12 a Jaxpr holds them itself
# and the two names are one class.
JAXPR_TYPES = tuple({Jaxpr, ClosedJaxpr})


def separate_constants(closed: Any) -> tuple[Any, list[Any]]:
    """The same program with its constants as leading inputs, and those constants.

    Private, because the two ways of holding constants (see above) share this one function only.
    """
    return _partial_eval.convert_constvars_jaxpr(closed.jaxpr), list(closed.consts)


def close(jaxpr: Any) -> Any:
    """A closed program without constants from an open one."""
    return ClosedJaxpr(jaxpr, [])


def nested_programs(eqn: Eqn) -> list[Any]:
    """The programs, open or closed, among the parameters of an equation."""
    found: list[Any] = []
    for value in eqn.params.values():
        if isinstance(value, JAXPR_TYPES):
            found.append(value)
        elif isinstance(value, tuple):
            found.extend([v for v in value if isinstance(v, JAXPR_TYPES)])
    return found


def drop_dead_code(jaxpr: Any, keep_inputs: Sequence[bool]) -> tuple[Any, list[bool]]:
    """The program without what its outputs and effects do not need, and which inputs it reads.

    JAX's own rules for nested programs are the only complete ones, and they have no public name.
    """
    if _SCAN3 is not None and _SCAN3.value:
        msg = (
            "jax_scan3 is on: it says nothing of what its loops write, so that JAX itself drops them"
            " as dead code and computes something else. Turn it off: jax.config.update('jax_scan3',"
            " False)."
        )
        raise NotImplementedError(msg)
    return _partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), list(keep_inputs))


_SCAN3: Any = getattr(_config, "scan3", None)


def replace(jaxpr: Any, **changes: Any) -> Any:
    """The same program with other `invars`, `eqns` or `outvars`."""
    return jaxpr.replace(**changes, debug_info=jaxpr.debug_info._replace(arg_names=None))


def evaluate(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of an open program, computed or traced with whatever transformation is under way."""
    return jaxpr_as_fun(close(jaxpr))(*operands)


def cast(x: Any, expected: Any) -> Any:
    """`x` with the dtype and the weakness of `expected`. The public conversion only gives strong types."""
    return _convert_element_type(x, expected.dtype, weak_type=expected.weak_type)


def converts_weak_values(jaxpr: Any) -> bool:
    """Whether a program, or one nested in it, turns a weakly typed value into a dtype that a value of
    strong type would not have led to: `1.0 * bfloat16` is computed in bfloat16, and
    `float32(1) * bfloat16` in float32."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is _convert_p:
            source, to = eqn.invars[0].aval, eqn.params["new_dtype"]
            # Promotion never turns a float into an integer: that is a cast, the same for both.
            promoted = kind(source.dtype) <= kind(to)
            if source.weak_type and promoted and jax.numpy.promote_types(source.dtype, to) != to:
                return True
        for nested in nested_programs(eqn):
            if converts_weak_values(getattr(nested, "jaxpr", nested)):
                return True
    return False


def kind(dtype: Any) -> int:
    """The place of a dtype among bool, integer, floating, complex and other. NumPy's own `kind` does
    not know the dtypes that JAX adds."""
    kinds = (np.bool_, np.integer, np.floating, np.complexfloating)
    return next((i for i, k in enumerate(kinds) if jax.dtypes.issubdtype(dtype, k)), len(kinds))


def is_live(tracer: Tracer) -> bool:
    """Whether the transformation that made a tracer is still under way."""
    return bool(tracer._trace.is_valid())  # noqa: SLF001


def where_read(eqn: Eqn) -> str:
    """The user's line that an equation was traced from, as `file:line (function)`."""
    return str(_source_info_util.summarize(eqn.source_info))


def example_type(x: Any) -> Any:
    """The abstract value that stands for an example argument while a function is traced."""
    return jax.typeof(x)


def is_array(x: Any) -> bool:
    """Whether JAX takes `x` as an array argument: arrays, tracers, NumPy values, Python numbers."""
    if isinstance(x, (Array, np.ndarray, np.generic, bool, int, float, complex)):
        return not (isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "OSUVmM")
    return isinstance(x, Tracer) or is_ref(x)


def is_ref(x: Any) -> bool:
    """Whether `x` is a mutable reference (`jax.new_ref`), concrete or traced.

    References have moved between modules; their abstract value has not.
    """
    if isinstance(x, (int, float, complex, np.ndarray, np.generic, str)):
        return False
    aval = getattr(x, "aval", None) if isinstance(x, Tracer) else _ref_aval(x)
    return isinstance(aval, _AbstractRef)


def _ref_aval(x: Any) -> Any:
    return x._aval if isinstance(x, _Ref) else None  # noqa: SLF001 (the public class hides it)


_Ref: Any = jax.Ref if hasattr(jax, "Ref") else _core.Ref
_AbstractRef: Any = jax.typeof(jax.new_ref(np.zeros(()))).__class__


def trace_context() -> Hashable:
    """The settings that tracing and compiling depend on: precision, PRNG, mesh, 64-bit types, …

    JAX keys its own caches on the same tuple and offers it nowhere in public. The named axes of an
    enclosing `vmap` or `shard_map` are left out: what depends on them stands in the program itself.
    """
    context: tuple[Hashable, ...] = _config.trace_context()
    return context[:_AXIS_ENV] + context[_AXIS_ENV + 1 :]


# Its place, which older releases do not tell: there it is the first.
_AXIS_ENV = (
    _config.trace_context_names().index("axis_env_state")
    if hasattr(_config, "trace_context_names")
    else 0
)


def prepend_operands(eqn: Eqn, operands: Sequence[Any], params: dict[str, Any]) -> Eqn:
    """`eqn` with `operands` before its own, `params` replaced, and whatever else says one thing for
    each operand extended to match (only `jit` has such parameters)."""
    fill = {"in_shardings": UNSPECIFIED, "in_layouts": None, "donated_invars": False}
    for name, value in fill.items():
        if name in eqn.params:
            params[name] = (value,) * len(operands) + tuple(eqn.params[name])
    return eqn.replace(invars=[*operands, *eqn.invars], params={**eqn.params, **params})


def scan_with_constants(params: dict[str, Any], count: int) -> dict[str, Any]:
    """The parameters of a `scan` with `count` more constants at the front.

    Until JAX 0.11 it counts them; since 0.12 a tree of operands (`ft_in`) says how many there are.
    """
    if "num_consts" in params:
        return {"num_consts": params["num_consts"] + count}
    constants, carry, xs = params["ft_in"].unpack()
    from jax._src import flattree  # noqa: PLC0415 (exists since 0.12)

    return {"ft_in": flattree.pack((flattree.nones(len(constants) + count), carry, xs))}


# What a walk through JAX's own wrappers around a user's function meets, and which of it decides what
# the function computes. JAX makes these wrappers afresh each time it traces, so that their identity
# says nothing; they have no public face.
_IGNORED = (
    _partial_eval.DynamicJaxprTrace,
    _linear_util.Store,
    _linear_util.EqualStore,
    _core.DebugInfo,
    _core.TraceTag,
)


# Some of JAX's own rules are objects made for each use (`jax_custom_vjp3` and its like).
_HIGH_PRIMITIVES = tuple(
    getattr(_hijax, name) for name in ("HiPrim", "VJPHiPrimitive") if hasattr(_hijax, name)
)
_WRAPPED = tuple(
    getattr(_util, name)
    for name in ("Hashable", "Unhashable", "HashableWrapper")
    if hasattr(_util, name)
)
EQUATION: type = _core.JaxprEqn


def function_parts(x: Any) -> tuple[Any, ...] | None:
    """What decides the meaning of one of JAX's wrappers, or None when `x` is not such a wrapper."""
    if isinstance(x, _linear_util.WrappedFun):
        # Lists among the arguments of a transformation are JAX's own and never change.
        transforms = tuple(
            (made_by, *(tuple(a) if type(a) is list else a for a in args))
            for made_by, args in x.transforms
        )
        return (x.f, transforms, x.params)
    if isinstance(x, _IGNORED):
        return ()
    if isinstance(x, _WRAPPED):
        return (x.val,) if hasattr(x, "val") else (x.x,)
    if isinstance(x, _util.HashableFunction):
        return (x.f, x.closure)
    if isinstance(x, _util.HashablePartial):
        return (x.f, x.args, tuple(x.kwargs.items()))
    if isinstance(x, _HIGH_PRIMITIVES) and type(x).__module__.startswith("jax."):
        types = tuple(x.in_avals_flat), tuple(x.out_avals_flat)
        return (*types, x.in_tree, x.out_tree, x.effects, tuple(x.params.items()))
    if isinstance(x, jax.stages.Traced):
        params = tuple((k, v) for k, v in x._params.items() if k != "name")  # noqa: SLF001
        return (params, x._in_tree, x.out_tree, tuple(x._consts))  # noqa: SLF001
    if isinstance(x, (jax.custom_jvp, jax.custom_vjp)):
        # Its attributes without those that it copied from the function.
        copied = getattr(x.fun, "__dict__", {})
        own = [k for k in vars(x) if not k.startswith("__") and k not in copied]
        return tuple((k, vars(x)[k]) for k in sorted(own))
    name = getattr(x, "__qualname__", "")
    if name == "_memoize.<locals>.memoized" and x.__module__ == _partial_eval.__name__:
        # Its other cell remembers what was traced so far: a cache, not a meaning.
        return (x.__closure__[x.__code__.co_freevars.index("fn")].cell_contents,)
    return None


# Compared by value: two that are equal mean the same.
VALUES: tuple[type, ...] = (
    _core.AbstractValue,
    jax.tree_util.PyTreeDef,
    jax.sharding.Mesh,
    jax.sharding.AbstractMesh,
    jax.sharding.Sharding,
)

# What `jax.jit` returns; the type has no public name.
JITTED: type = type(jax.jit(lambda: None))
