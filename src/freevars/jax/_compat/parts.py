"""The parts of programs, and programs of parts: what a pickled program is made of."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import numpy as np

from freevars.jax._compat.params import is_flatten
from freevars.jax._compat.private import core, source_info_util
from freevars.jax._compat.programs import Eqn, jaxpr_as_fun

__all__ = ["make_equation", "make_program", "parts_of", "remake", "with_derived", "without_derived"]


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
    if kind is core.JaxprEqnContext:
        # It is made of the settings in force, not of arguments.
        names = [name for name in kind.__slots__ if name not in ("__weakref__", "configs")]
        return {name: getattr(x, name) for name in names}
    if is_flatten(x):
        return {}  # it is written anew while the results are inferred
    names = _remade().get(kind, [])
    return {name: getattr(x, name) for name in names} or None


def remake(kind: Any, parts: dict[str, Any]) -> Any:
    """The object of these parts."""
    if kind is not core.JaxprEqnContext:
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
    kinds = [core.ShapedArray, jax.sharding.AbstractMesh, getattr(core, "ManualAxisType", None)]
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
            source_info=source_info_util.new_source_info(),
            ctx=context,
        )
    )


def make_program(
    inputs: list[Any], eqns: list[Eqn], outputs: list[Any], effects: frozenset[Any], name: str
) -> Any:
    """An open program from its parts."""
    sample = _sample()
    # JAX 0.9 adds to the names of the arguments in the jvp of a loop, so None will not do.
    unnamed = ("",) * len(inputs)
    info = sample.debug_info._replace(func_src_info=name, arg_names=unnamed, result_paths=None)
    return sample.replace(
        invars=inputs, eqns=eqns, outvars=outputs, effects=effects, debug_info=info
    )


@functools.cache
def _sample() -> Any:
    """A program of one equation, from which others are made: the constructors are private."""
    return jax.make_jaxpr(jax.lax.neg)(np.float32(0)).jaxpr
