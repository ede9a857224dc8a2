"""Everything here leans on a part of JAX that is private or differs between releases.

Each entry says why it is needed. `tests/jax/test_compat.py` checks each one alone, so that a new
release of JAX that changes something fails there first, with the name of what changed. Not here:
any idea of closure conversion.
"""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias

try:
    import jax
except ImportError as error:  # pragma: no cover (tested in a process of its own)
    message = "freevars.jax needs JAX: pip install 'freevars[jax]'"
    raise ImportError(message) from error

import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.experimental.buffer_callback import buffer_callback
from jax.interpreters.ad import Zero as _Zero
from jax.lax import convert_element_type_p as _convert_p
from jax.ref import AbstractRef

# What is private, by what it buys. That JAX has no public place for most of it, and which of its
# modules are meant for extensions, is https://github.com/jax-ml/jax/issues/11951.
try:
    # Programs as data: their classes without Pallas, dead code, constants, weak types. Public
    # partial evaluation was declined, for interpreters on `jax.extend.core` (issue 3617), and
    # `jax.interpreters.partial_eval` is going (pull request 31143).
    from jax._src import core as _core  # noqa: I001 (in groups, by what each buys)
    from jax._src import literals as _literals  # what JAX makes of a number or of a NumPy array
    from jax._src.interpreters import partial_eval as _partial_eval
    from jax._src.lax.lax import _convert_element_type  # the public one makes strong types only

    # What a tracer is: which transformation made it, and around which value. Not offered even for
    # extensions (issue 31237).
    from jax._src.interpreters import ad as _ad
    from jax._src.interpreters import batching as _batching

    # What JAX keeps around a custom rule or a callback, to compare functions that it makes afresh
    # in each trace (issue 11951).
    from jax._src import custom_derivatives as _custom_derivatives
    from jax._src import hijax as _hijax
    from jax._src import linear_util as _linear_util
    from jax._src import util as _util

    # The settings on which a trace depends, on which JAX keys its own caches (issue 11951).
    from jax._src import config as _config

    # Errors and reports: the lines that a user wrote, tracebacks as JAX shows them (issue 11951).
    from jax._src import source_info_util as _source_info_util
    from jax._src import traceback_util as _traceback_util
except ImportError as error:  # pragma: no cover (of a release that nobody has yet)
    message = (
        f"freevars does not know JAX {jax.__version__}: {error}. Use an older JAX, or a newer"
        " freevars."
    )
    raise ImportError(message) from error

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

# What `jax.extend.core` offers in public. To import that imports Pallas and MLIR with it, which
# takes twice as long as all of this library; `tests/jax/test_compat.py` holds the two together.
Jaxpr: Any = _core.Jaxpr
# Until JAX 0.11 it paired a Jaxpr with its constants; since 0.12 a Jaxpr holds them itself and the
# two names, in public, are one class.
ClosedJaxpr: Any = getattr(_core, "ClosedJaxpr", Jaxpr)
Literal: Any = _core.Literal
Primitive: Any = _core.Primitive
Var: Any = _core.Var
jaxpr_as_fun: Any = _core.jaxpr_as_fun

Array = jax.Array
Tracer = jax.core.Tracer
Eqn: TypeAlias = Any  # jax.extend.core.JaxprEqn carries no types of its own

JAXPR_TYPES = tuple({Jaxpr, ClosedJaxpr})


def separate_constants(closed: Any) -> tuple[Any, list[Any]]:
    """The same program with its constants as leading inputs, and those constants.

    Private, because the two ways of holding constants (see above) share this one function only.
    """
    return _partial_eval.convert_constvars_jaxpr(closed.jaxpr), list(closed.consts)


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


def without_derived(eqn: Eqn) -> dict[str, Any]:
    """The parameters of an equation without what others of them say as well: beside the program of
    a reduction JAX keeps the Python function that it was traced from."""
    return {k: v for k, v in eqn.params.items() if (eqn.primitive.name, k) != _REDUCTION}


def with_derived(primitive: Any, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with that again."""
    if primitive.name != _REDUCTION[0]:
        return params
    jaxpr = params["jaxpr"]
    return {**params, _REDUCTION[1]: lambda *args: jaxpr_as_fun(jaxpr)(*args)[0]}


_REDUCTION = ("reduce", "computation")


def parts_of(x: Any) -> dict[str, Any] | None:
    """The arguments that make one of JAX's immutable objects, which remember a hash or, since 0.10,
    equal themselves alone: one that was pickled equals no other. None for any other object."""
    kind = type(x)
    if kind is _core.JaxprEqnContext:
        # It is made of the settings in force, not of arguments.
        names = [name for name in kind.__slots__ if name not in ("__weakref__", "configs")]
        return {name: getattr(x, name) for name in names}
    names = _remade().get(kind, [])
    return {name: getattr(x, name) for name in names} or None


def remake(kind: Any, parts: dict[str, Any]) -> Any:
    """The object of these parts."""
    if kind is not _core.JaxprEqnContext:
        return kind(**parts)
    if hasattr(kind, "_create"):
        frozen = [tuple(sorted(v.items())) if isinstance(v, dict) else v for v in parts.values()]
        return kind._create(*frozen)  # noqa: SLF001
    made = object.__new__(kind)
    for name, value in parts.items():
        setattr(made, name, value)
    return made


@functools.cache
def _remade() -> dict[Any, list[str]]:
    kinds = [_core.ShapedArray, jax.sharding.AbstractMesh, getattr(_core, "ManualAxisType", None)]
    return {kind: list(inspect.signature(kind).parameters) for kind in kinds if kind is not None}


def make_equation(
    primitive: Any,
    reads: list[Any],
    results: list[Any],
    params: dict[str, Any],
    effects: frozenset[Any],
    context: Any,
) -> Eqn:
    """An equation from its parts. It has no source line."""
    return (
        _sample()
        .eqns[0]
        .replace(
            primitive=primitive,
            invars=reads,
            outvars=results,
            params=params,
            effects=effects,
            source_info=_source_info_util.new_source_info(),
            ctx=context,
        )
    )


def make_program(
    inputs: list[Any], eqns: list[Eqn], outputs: list[Any], effects: frozenset[Any], name: str
) -> Any:
    """An open program from its parts."""
    sample = _sample()
    info = sample.debug_info._replace(func_src_info=name, arg_names=None, result_paths=None)
    return sample.replace(
        invars=inputs, eqns=eqns, outvars=outputs, effects=effects, debug_info=info
    )


@functools.cache
def _sample() -> Any:
    """A program of one equation, from which others are made: the constructors are private."""
    return jax.make_jaxpr(jax.lax.neg)(np.float32(0)).jaxpr


def program_name(jaxpr: Any) -> str:
    """The name of the function that a program was traced from."""
    return str(getattr(jaxpr, "jaxpr", jaxpr).debug_info.func_name)


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
        message = (
            "jax_scan3 is on: it says nothing of what its loops write, so that JAX itself drops"
            " them"
            " as dead code and computes something else. Turn it off: jax.config.update('jax_scan3',"
            " False)."
        )
        raise NotImplementedError(message)
    if _all_live(jaxpr, keep_inputs):
        return jaxpr, [True] * len(keep_inputs)
    return _partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), list(keep_inputs))


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


_SCAN3: Any = getattr(_config, "scan3", None)


def replace(jaxpr: Any, **changes: Any) -> Any:
    """The same program with other `invars`, `eqns` or `outvars`."""
    return jaxpr.replace(**changes, debug_info=jaxpr.debug_info._replace(arg_names=None))


def evaluate(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of an open program, computed or traced with whatever transformation is under
    way."""
    return jaxpr_as_fun(close(jaxpr))(*operands)


def cast(x: Any, expected: Any) -> Any:
    """`x` with the dtype and the weakness of `expected`. The public conversion only gives strong
    types."""
    return _convert_element_type(x, expected.dtype, weak_type=expected.weak_type)


def converts_weak_values(jaxpr: Any) -> bool:
    """Whether a program, or one nested in it, turns a weakly typed value into a dtype that a value
    of strong type would not have led to: `1.0 * bfloat16` is computed in bfloat16, and
    `float32(1) * bfloat16` in float32."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is _convert_p:
            source, to = eqn.invars[0].aval, eqn.params["new_dtype"]
            # Promotion never turns a float into an integer: that is a cast, the same for both.
            promoted = kind(source.dtype) <= kind(to)
            if source.weak_type and promoted and _promoted(source.dtype, to) != to:
                return True
        for nested in nested_programs(eqn):
            if converts_weak_values(getattr(nested, "jaxpr", nested)):
                return True
    return False


def _promoted(a: Any, b: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # the question has no answer in strict mode
        return jax.numpy.promote_types(a, b)


def kind(dtype: Any) -> int:
    """The place of a dtype among bool, integer, floating, complex and other. NumPy's own `kind`
    does not know the dtypes that JAX adds."""
    kinds = (np.bool_, np.integer, np.floating, np.complexfloating)
    return next((i for i, k in enumerate(kinds) if jax.dtypes.issubdtype(dtype, k)), len(kinds))


def is_live(tracer: Any) -> bool:
    """Whether the transformation that made a tracer is still under way."""
    return bool(tracer._trace.is_valid())  # noqa: SLF001


def is_open(tracer: Any) -> bool:
    """Whether a traced value can be read now: its transformation is one of those under way. JAX
    only says so of those that are not programs."""
    if not isinstance(tracer, _partial_eval.DynamicJaxprTracer):
        return is_live(tracer)
    trace: Any = _core.trace_ctx.trace
    while trace is not None and trace is not tracer._trace:  # noqa: SLF001
        trace = getattr(trace, "parent_trace", None)
    return trace is not None


def user_line(source_info: Any) -> tuple[str, int] | None:
    """The innermost line outside JAX and this library that `source_info` was recorded on."""
    for frame in _source_info_util.user_frames(source_info.traceback):
        if not frame.file_name.startswith(_OWN_FILES):
            return (frame.file_name, frame.start_line)
    return None


_OWN_FILES = str(Path(__file__).parent.parent) + os.sep


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
    return isinstance(aval, REF_TYPE)


def _ref_aval(x: Any) -> Any:
    return x._aval if isinstance(x, _Ref) else None  # noqa: SLF001 (the public class hides it)


_Ref: Any = jax.Ref if hasattr(jax, "Ref") else _core.Ref
REF_TYPE: Any = AbstractRef


def trace_context() -> Hashable:
    """The settings that tracing and compiling depend on: precision, PRNG, mesh and more.

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


# What a tracer is made of: nothing public tells one kind from another, or looks inside.


def layer(tracer: Any) -> tuple[str, Any, bool | None]:
    """The transformation that made a tracer, the value that it wraps (None where that is not known
    yet, as under `jit`), and whether it is perturbed (None where it is as its value is)."""
    if isinstance(tracer, _batching.BatchTracer):
        return ("vmap", tracer.val, None)
    if isinstance(tracer, _ad.LinearizeTracer):
        is_vjp = getattr(tracer._trace, "is_vjp", True)  # noqa: SLF001
        return ("grad" if is_vjp else "jvp", tracer.primal, not _is_zero(tracer.tangent))
    if isinstance(tracer, _ad.JVPTracer):
        return ("jvp", tracer.primal, not _is_zero(tracer.tangent))
    traced_for = getattr(getattr(tracer, "_debug_info", None), "traced_for", None)
    return (str(traced_for or type(tracer).__name__.removesuffix("Tracer")), None, True)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, _Zero) or is_symbolic_zero(tangent)


def lowered(x: Any) -> Any:
    """The value behind `x`: without tracers that add nothing, and without the object that JAX put
    around a NumPy array until 0.10."""
    if type(x) in _NUMPY_WRAPPERS:
        return x.val
    lower: Any = getattr(x, "full_lower", None) if isinstance(x, Tracer) else None
    return x if lower is None else lower()


# A NumPy array with a type of JAX; its pickled form does not come back as it was. Until 0.10 it is
# no NumPy array itself.
TYPED_NUMPY = tuple(cls for cls in (getattr(_literals, "TypedNdArray", None),) if cls is not None)
_NUMPY_WRAPPERS = tuple(cls for cls in TYPED_NUMPY if not issubclass(cls, np.ndarray))


def typed_numpy(numbers: Any, *, weak: bool) -> Any:
    """A NumPy array with a type of JAX."""
    (cls,) = TYPED_NUMPY
    if _NUMPY_WRAPPERS:
        return cls(numbers, weak)
    return cls(numbers, _core.ShapedArray(numbers.shape, numbers.dtype, weak_type=weak))


def was_computed(tracer: Any) -> bool | None:
    """Whether an operation made a tracer, or None where nothing tells. The other ones are the
    inputs of their transformation."""
    if isinstance(tracer, _partial_eval.DynamicJaxprTracer):
        return getattr(tracer, "parent", None) is not None
    if isinstance(tracer, _batching.BatchTracer):
        traceback = getattr(tracer.source_info, "traceback", None)
        for code in traceback.raw_frames()[0] if traceback is not None else ():
            if _source_info_util.is_user_filename(code.co_filename):
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
    return tracer.val if isinstance(tracer, _partial_eval.DynamicJaxprTracer) else None


def argument_of(tracer: Any) -> tuple[str, str]:
    """The argument that a tracer is, and of which function, `("w", "loss at model.py:41")`; empty
    strings where it is none, or nobody knows."""
    x: Any = tracer
    while isinstance(x, Tracer):
        if isinstance(x, _partial_eval.DynamicJaxprTracer):
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


def programs_in(frame: dict[str, Any]) -> list[tuple[Any, list[Any]]]:
    """The programs among the local variables of one of JAX's frames, open, each with the values of
    its leading inputs."""
    found = [
        separate_constants(x)
        for x in frame.values()
        if isinstance(x, ClosedJaxpr) and getattr(x, "consts", None)
    ]
    params = getattr(frame.get("p"), "params", None)  # of a call of `jit` that is being made
    if isinstance(params, dict) and isinstance(frame.get("args_flat"), (list, tuple)):
        jaxpr = params.get("jaxpr")
        if isinstance(jaxpr, JAXPR_TYPES):
            found.append((getattr(jaxpr, "jaxpr", jaxpr), list(frame["args_flat"])))
    return found


def unfiltered_tracebacks() -> Any:
    """A context, of this thread, in which JAX leaves its own frames in tracebacks."""
    return _config.traceback_filtering("off")


def filter_traceback(error: BaseException) -> None:
    """Take JAX's frames out of an error's traceback, as it does itself unless told otherwise."""
    if _config.traceback_filtering.value != "off" and error.__traceback__ is not None:
        error.__traceback__ = _traceback_util.filter_traceback(error.__traceback__)


def is_users(file: str) -> bool:
    """Whether a file is neither JAX's nor Python's nor this library's own."""
    return _source_info_util.is_user_filename(file) and not file.startswith(_OWN_FILES)


def is_rule_machinery(file: str) -> bool:
    """Whether a file of JAX's is one of those that call custom derivative rules."""
    return not is_users(file) and Path(file).name in ("custom_derivatives.py", "hijax.py")


def typed_sharding(x: Any) -> Any:
    """The sharding that is part of a traced value's type, or None where its type has none."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    return None if sharding is None or sharding.mesh.empty else sharding


def is_opaque(x: Any) -> bool:
    """Whether the elements of an array are of one of JAX's own types, such as PRNG keys."""
    return bool(jax.numpy.issubdtype(x.dtype, jax.dtypes.extended))


# For `issubclass(type(x), ...)`: `isinstance` would ask `x` itself, which may be anybody's object.
ARRAY_TYPES: tuple[type, ...] = (Tracer, np.ndarray, Array, _Ref)


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


# What a walk through JAX's own wrappers around a user's function meets, and which of it decides
# what the function computes. JAX makes these wrappers afresh each time it traces, so that their
# identity says nothing; they have no public face.
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


def function_parts(x: Any) -> tuple[Any, ...] | None:
    """What decides the meaning of one of JAX's wrappers, or None when `x` is not such a wrapper."""
    if isinstance(x, _linear_util.WrappedFun):
        transforms = [(made_by, *args) for made_by, args in _transforms(x)]
        return (x.f, tuple(transforms), x.params)
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
    cells = _cells(x)
    if "used_outs" in cells:
        return (tuple(cells["used_outs"]), *[cells[k] for k in _RULE_CELLS if k in cells])
    return None


def _transforms(fun: Any) -> list[Any]:
    return [t for t in fun.transforms if getattr(t[0], "__name__", "") != "_handle_consts_in_bwd"]


def unwrapped(x: Any) -> Any:
    """What a wrapper stands for that adds nothing but a place: JAX puts a few of them around a rule
    whenever it evaluates an equation that has one into another program. None for anything else."""
    if isinstance(x, _linear_util.WrappedFun):
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


_RULE_MODULES = (_partial_eval.__name__, _custom_derivatives.__name__)


EQUATION: Any = _core.JaxprEqn
RULED_FUNCTIONS: Any = (jax.custom_jvp, jax.custom_vjp)

# The equations of functions with a custom rule, and the parameters that hold the rule.
RULED = {"custom_jvp_call": "jvp", "custom_vjp_call": "vjp"}
_RULE_PARAMS = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd")


def rule_objects(eqn: Eqn) -> list[Any]:
    """What JAX keeps of the custom rule of an equation."""
    return [eqn.params[name] for name in _RULE_PARAMS if name in eqn.params]


def captured_by_rule(eqn: Eqn) -> int:
    """How many leading operands the body of a function with a custom rule captures, 0 for any other
    equation. JAX gives none of them to the rule."""
    params = eqn.params
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
        x = x.f if isinstance(x, _linear_util.WrappedFun) else unwrapped(x)
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
    opened = _partial_eval.convert_constvars_jaxpr(jaxpr)
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


# Primitives that call a function of the user's on the host each time that they run.
CALLBACKS = {"pure_callback", "io_callback", "debug_callback", "buffer_callback"}


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


def is_smooth(aval: Any) -> bool:
    """Whether values of this type have a derivative."""
    return bool(jax.dtypes.issubdtype(aval.dtype, np.inexact))


def is_array_literal(v: Any) -> bool:
    """Whether a literal is a captured value. A Python number or a NumPy scalar is part of the
    program."""
    return isinstance(v.val, Array) or np.ndim(v.val) > 0


# Compared by value: two that are equal mean the same.
VALUES: Any = (
    _core.AbstractValue,
    jax.sharding.Mesh,
    jax.sharding.AbstractMesh,
    jax.sharding.Sharding,
)

# What `jax.jit` returns; the type has no public name.
JITTED: Any = type(jax.jit(lambda: None))


def nothing_traced() -> bool:
    """Whether no transformation is under way, so that no traced value can be anywhere."""
    return bool(_core.trace_state_clean())


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


def is_symbolic_zero(x: Any) -> bool:
    """Whether a tangent is known to be zero without looking at numbers."""
    return isinstance(x, SymbolicZero) or getattr(x, "dtype", None) == jax.dtypes.float0


def symbolic_zero(x: Any) -> Any:
    """The tangent of `x` that is known to be zero."""
    return SymbolicZero.from_primal_value(x)


def has_custom_vjp(jaxpr: Any) -> bool:
    """Whether a program, or one nested in it, has a rule for reverse mode only."""
    return any(
        eqn.primitive.name == "custom_vjp_call"
        or "CustomVJP" in type(eqn.params.get("_prim")).__name__
        or any(has_custom_vjp(getattr(j, "jaxpr", j)) for j in nested_programs(eqn))
        for eqn in jaxpr.eqns
    )


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


def computes_now() -> bool:
    """Whether an operation on known values gives a value, and not a step of a program under way."""
    # Asking by an operation is the public way, and takes a hundred times as long.
    return nothing_traced() or not isinstance(jax.lax.neg(np.float32(0)), Tracer)


# Named axes and shardings, as far as types tell them.


def coupled_axes(jaxpr: Any) -> frozenset[str]:
    """The named axes along which a program sends what it computes from its inputs.

    That a program uses an axis is an effect of it, and the classes of effects are private. An
    equation without operands (`axis_index`) sends nothing.
    """
    names: set[str] = set()
    for eqn in jaxpr.eqns:
        own = {e.name for e in eqn.effects if isinstance(e, _core.NamedAxisEffect)}
        nested = nested_programs(eqn)
        if own and nested:
            for program in nested:
                names |= coupled_axes(getattr(program, "jaxpr", program))
        elif eqn.invars:
            names |= own
    return frozenset(names)


def tracks_varying(name: str) -> bool:
    """Whether the types of values say if they vary over a named axis: inside `shard_map` with
    `check_vma=True`. There is no public name for that setting."""
    return name in jax.sharding.get_abstract_mesh().manual_axes and _config._check_vma.value  # noqa: SLF001


def varying_axes(x: Any) -> frozenset[str]:
    """The named axes over which the type of a value says that it varies. JAX 0.10 renamed it."""
    aval = jax.typeof(x)
    if hasattr(aval, "manual_axis_type"):
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(getattr(aval, "vma", ()))


def vary_over(x: Any, axes: frozenset[str]) -> Any:
    """`x` with a type that says that it varies over these named axes at least."""
    missing = axes - varying_axes(x)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def like_type(x: Any, like: Any) -> Any:
    """`x`, varying over the named axes that `like` varies over."""
    return vary_over(x, varying_axes(like))


def not_more_varying(x: Any, like: Any) -> Any:
    """`x`, which is the same along the named axes that `like` does not vary over, with a type that
    says so: the mean of equal values."""
    extra = varying_axes(x) - varying_axes(like)
    return jax.lax.pmean(x, tuple(sorted(extra))) if extra else x


def is_sharded(x: Any) -> bool:
    """Whether the type of a value says that it is spread over devices (explicit meshes)."""
    sharding = typed_sharding(x)
    return sharding is not None and any(part is not None for part in sharding.spec)


def like_sharding(x: Any, like: Any) -> Any:
    """`x` with the sharding that is part of the type of `like`, if one is."""
    wanted, has = typed_sharding(like), typed_sharding(x)
    if wanted is None or wanted == has:
        return x
    return jax.sharding.reshard(x, wanted)
