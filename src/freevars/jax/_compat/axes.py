"""Named axes and shardings, as far as types tell them."""

from __future__ import annotations

from typing import Any

import jax

from freevars.jax._compat.params import nested_programs
from freevars.jax._compat.private import config, core

__all__ = [
    "coupled_axes",
    "is_sharded",
    "like_sharding",
    "like_type",
    "manual_axes",
    "not_more_varying",
    "tracks_varying",
    "typed_sharding",
    "vary_over",
    "varying_axes",
]


def typed_sharding(x: Any) -> Any:
    """The sharding that is part of a traced value's type, or None where its type has none."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    return None if sharding is None or sharding.mesh.empty else sharding


def coupled_axes(jaxpr: Any) -> frozenset[str]:
    """The named axes along which a program sends what it computes from its inputs.

    That a program uses an axis is an effect of it, and the classes of effects are private. An
    equation without operands (`axis_index`) sends nothing.
    """
    names: set[str] = set()
    for eqn in jaxpr.eqns:
        own = {e.name for e in eqn.effects if isinstance(e, core.NamedAxisEffect)}
        nested = nested_programs(eqn)
        if own and nested:
            for program in nested:
                names |= coupled_axes(getattr(program, "jaxpr", program))
        elif eqn.invars:
            names |= own
    return frozenset(names)


def manual_axes() -> frozenset[str]:
    """The axes of the mesh over which the program under way is written device by device."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def tracks_varying(name: str) -> bool:
    """Whether the types of values say if they vary over a named axis: inside `shard_map` with
    `check_vma=True`. There is no public name for that setting."""
    return name in jax.sharding.get_abstract_mesh().manual_axes and config._check_vma.value  # noqa: SLF001


def varying_axes(x: Any) -> frozenset[str]:
    """The named axes over which the type of a value, or a type, says that it varies. JAX 0.10
    renamed it."""
    aval = x if isinstance(x, core.AbstractValue) else jax.typeof(x)
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
