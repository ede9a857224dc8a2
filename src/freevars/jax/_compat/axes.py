"""Named axes and shardings, as far as types show them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from freevars.jax._compat.params import nested_programs
from freevars.jax._compat.private import config, core

__all__ = [
    "coupled_axes",
    "is_sharded",
    "like_sharding",
    "like_type",
    "manual_axes",
    "not_more_varying",
    "on_mesh",
    "placed",
    "sum_over_more",
    "tied",
    "tracks_varying",
    "typed_sharding",
    "vary_over",
    "varying_axes",
    "while_loop",
    "whole",
]


def typed_sharding(x: Any) -> Any:
    """The sharding that is part of the type of a value, or of a type; None where that has none."""
    is_type = isinstance(x, (core.AbstractValue, jax.ShapeDtypeStruct))
    sharding = getattr(x if is_type else jax.typeof(x), "sharding", None)
    return None if sharding is None or sharding.mesh.empty else sharding


def coupled_axes(jaxpr: Any) -> frozenset[str]:
    """The named axes in use along which a program sends what it computes from its inputs; not those
    that it brings along, as a `shard_map` in it does.

    That an equation uses an axis is an effect of it, and the classes of effects are private;
    `ppermute` and `pbroadcast` have none in JAX 0.10, but a parameter `axis_name`, as all that
    send. An equation without operands (`axis_index`) sends nothing, and one that says only of a
    value that it varies has the names in `axes`.
    """
    in_use = core.get_axis_env().axis_sizes
    return frozenset(name for name in _sent_along(jaxpr) if name in in_use)


def _sent_along(jaxpr: Any) -> set[str]:
    names: set[str] = set()
    for eqn in jaxpr.eqns:
        nested = nested_programs(eqn)
        for program in nested:
            names |= _sent_along(getattr(program, "jaxpr", program))
        if eqn.invars and not nested:
            names |= {e.name for e in eqn.effects if isinstance(e, core.NamedAxisEffect)}
            told = eqn.params.get("axis_name", ())
            told = told if isinstance(told, (tuple, list)) else (told,)
            names |= {name for name in told if isinstance(name, str)}
    return names


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
    says so: the mean of equal values, or the largest of what has no mean."""
    extra = tuple(sorted(varying_axes(x) - varying_axes(like)))
    if not extra:
        return x
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jax.lax.pmean(x, extra)
    return jax.lax.pmax(x.astype(int), extra).astype(x.dtype)


def sum_over_more(x: Any, like: Any) -> Any:
    """The sum of `x` over the named axes that `like` does not vary over, as of a cotangent."""
    extra = tuple(sorted(varying_axes(x) - varying_axes(like)))
    return jax.lax.psum(x, extra) if extra else x


def is_sharded(x: Any) -> bool:
    """Whether the type of a value says that it is spread over devices (explicit meshes)."""
    sharding = typed_sharding(x)
    return sharding is not None and any(part is not None for part in sharding.spec)


def like_sharding(x: Any, like: Any) -> Any:
    """`x` with the sharding that is part of the type of `like`; whole where that has none."""
    wanted, has = typed_sharding(like), typed_sharding(x)
    if wanted is None:
        return whole(x)
    return x if wanted == has else _reshard(x, wanted.spec, wanted.mesh, like)


def placed(x: Any, sharding: Any, lead: int) -> Any:
    """`x` with this sharding of its type, whole along `lead` axes in front."""
    return _reshard(x, PartitionSpec(*[None] * lead, *sharding.spec), sharding.mesh)


def whole(x: Any) -> Any:
    """`x`, all of it on every device, where its type says that it is spread over them. Only then
    does JAX join it with others, or change its shape, without being told how the result lies."""
    if not is_sharded(x):
        return x
    return _reshard(x, PartitionSpec(), typed_sharding(x).mesh, x)


def _reshard(x: Any, spec: Any, mesh: Any, like: Any = None) -> Any:
    """`x` as `spec` says, on the devices of `like` where both are known: the mesh of a type has
    none, and only an enclosing `set_mesh` could say which."""
    if all(isinstance(a, jax.Array) and not isinstance(a, core.Tracer) for a in (x, like)):
        return jax.device_put(x, NamedSharding(like.sharding.mesh, spec))
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def on_mesh(x: Any) -> Any:
    """`x`; where a mesh with explicit axes is in use and the type of `x` has none, as that of a
    constant, with one that says that it is the same on all devices. What JAX 0.10 joins with an
    array, in a loop or `concatenate`, it maps over such an axis only then."""
    if typed_sharding(x) is not None or not jax.sharding.get_abstract_mesh().explicit_axes:
        return x
    return jax.sharding.reshard(x, PartitionSpec())


def tied(tree: Any) -> Any:
    """The same arrays, each of which depends on all of them: what a `vmap` maps, or a derivative is
    taken by, is all of them or none. By terms of 0, which XLA removes; none is of a leaf that
    varies over more named axes, over which the sum would.

    For the primal results of a `custom_jvp` as well: JAX 0.10 fails where one of them is the same
    for all members of a batch, its tangent is not, and the `vmap` lies in a `jit`, because the
    function and its rule then disagree about what is mapped.
    """
    leaves, structure = jax.tree.flatten(tree)
    if len(leaves) < 2 or not any(isinstance(leaf, core.Tracer) for leaf in leaves):  # noqa: PLR2004
        return tree
    axes = [varying_axes(leaf) for leaf in leaves]
    nothing = [jnp.sum(jnp.where(False, leaf, 0)).real for leaf in leaves]

    def tie(leaf: Any, mine: frozenset[str]) -> Any:
        of = [n.astype(leaf.real.dtype) for n, a in zip(nothing, axes, strict=True) if a <= mine]
        return leaf + sum(of[1:], of[0])

    return structure.unflatten(list(map(tie, leaves, axes)))


def while_loop(goes_on: Callable[[Any], Any], step: Callable[[Any], Any], start: Any) -> Any:
    """`jax.lax.while_loop`; its start may have numbers and other constants in it (`on_mesh`)."""
    return jax.lax.while_loop(goes_on, step, jax.tree.map(on_mesh, start))
