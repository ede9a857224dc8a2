"""A linear map in a program whose transpose is given, and not derived from its own program.

JAX transposes what a program computes, and a solver's loop has no transpose. Its own two ways to
provide one do not fit: `jax.custom_derivatives.linear_call` has no derivative by the values that
the map depends on, and `jax.lax.custom_linear_solve` treats them as constants in the transpose.
Here the map and its transpose are both traceable functions, so derivatives of any order follow from
them. It is private because JAX has no public way to register rules for a primitive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from freevars._sequences import replaced
from freevars.jax._compat.axes import like_sharding, like_type
from freevars.jax._compat.private import ad, batching, core, mlir

__all__ = ["LinearMap", "linear_map", "with_transpose"]


class LinearMap(Protocol):
    """What is static of a linear map; it hashes, and equals another that computes the same."""

    def forward(self, given: Sequence[Any], x: Sequence[Any]) -> Sequence[Any]:
        """The map that depends on the arrays `given`, at x."""

    def transposed(self, given: Sequence[Any], g: Sequence[Any]) -> Sequence[Any]:
        """Its transpose."""


def linear_map(
    fun: LinearMap, given: Sequence[Any], x: Sequence[Any], types: Sequence[Any]
) -> list[Any]:
    """`fun.forward(given, x)`, arrays of `types`, with the transpose of `fun`."""
    out = tuple(t.strip_weak_type() for t in types)
    return list(_linear_p.bind(*given, *x, fun=fun, n=len(given), out=out))


_linear_p: Any = core.Primitive("freevars_linear_map")
_linear_p.multiple_results = True


@_linear_p.def_impl  # type: ignore[untyped-decorator]
def _run(*args: Any, fun: LinearMap, n: int, out: Any) -> list[Any]:
    values = fun.forward(args[:n], args[n:])
    return [_like(jnp.asarray(v, t.dtype), t) for v, t in zip(values, out, strict=True)]


def _like(value: Any, t: Any) -> Any:
    return like_sharding(like_type(value, t), t)


@_linear_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _types(*_: Any, out: Any, **__: Any) -> Any:
    return out


mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))


def _jvp(primals: Any, tangents: Any, *, fun: LinearMap, n: int, out: Any) -> Any:
    bind = functools.partial(_linear_p.bind, fun=fun, n=n, out=out)
    given, x = primals[:n], primals[n:]
    values = bind(*primals)
    parts = []
    if not all(map(_is_zero, tangents[n:])):
        dots = [ad.instantiate_zeros(t) for t in tangents[n:]]
        parts.append(bind(*given, *dots))
    moving = [i for i in range(n) if not _is_zero(tangents[i])]
    if moving:

        def at(*some: Any) -> list[Any]:
            return _run(*replaced(given, moving, some), *x, fun=fun, n=n, out=out)

        some, dots = [given[i] for i in moving], [tangents[i] for i in moving]
        parts.append(jax.jvp(at, some, dots)[1])
    if not parts:
        return values, [ad.Zero.from_primal_value(v) for v in values]
    return values, [functools.reduce(jnp.add, each) for each in zip(*parts, strict=True)]


def _is_zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero or getattr(tangent, "dtype", None) == jax.dtypes.float0


def _transpose(g: Any, *args: Any, fun: LinearMap, n: int, out: Any) -> Any:
    known, x = args[:n], args[n:]
    arrived = [
        _like(jnp.zeros(t.shape, t.dtype), t) if type(ct) is ad.Zero else ct
        for ct, t in zip(g, out, strict=True)
    ]
    found = fun.transposed(known, arrived)
    return [None] * n + [
        _like(ct, of.aval) if ad.is_undefined_primal(of) else None
        for ct, of in zip(found, x, strict=True)
    ]


def with_transpose(push: Callable[[Any], Any], x: list[Any], out: Any) -> Callable[[Any], Any]:
    """A linear map out of `jax.linearize`, at `x` and with results like `out`, whose transpose is
    taken before a `vmap` that is under way.

    Under `vmap` JAX makes a `cond` a choice between both branches, whose operands have no gradient
    where they are not chosen (https://github.com/jax-ml/jax/issues/1052): where these are the
    linear ones, what comes of it has no transpose.
    """
    given, tree = jax.tree.flatten(push)
    leaves, structure = jax.tree.flatten(out)
    types = list(map(jax.typeof, leaves))
    fun = _Linearised(tree, tuple(map(jax.typeof, x)))
    return lambda dots: structure.unflatten(linear_map(fun, given, dots, types))


@dataclass(frozen=True)
class _Linearised:
    tree: Any  # of the map, a pytree
    types: tuple[Any, ...]  # of its inputs

    def forward(self, given: Sequence[Any], x: Sequence[Any]) -> list[Any]:
        return jax.tree.leaves(self.tree.unflatten(given)(list(x)))

    def transposed(self, given: Sequence[Any], g: Sequence[Any]) -> Any:
        (found,) = jax.linear_transpose(lambda x: self.forward(given, x), [*self.types])(list(g))
        return found


@dataclass(frozen=True)
class _Batch:
    """Many of a map at once; what is given to it varies along the axes, or not at all."""

    fun: LinearMap
    axes: tuple[int | None, ...]
    size: int
    name: Any  # of the axis, along which the map may communicate

    def forward(self, given: Any, x: Any) -> Any:
        return self._every(lambda given, x: list(self.fun.forward(given, x)))(list(given), list(x))

    def transposed(self, given: Any, g: Any) -> Any:
        return self._every(lambda given, g: list(self.fun.transposed(given, g)))(
            list(given), list(g)
        )

    def _every(self, one: Callable[..., Any]) -> Callable[..., Any]:
        axes = (list(self.axes), 0)
        return jax.vmap(one, axes, axis_size=self.size, axis_name=self.name)


def _batch(axis: Any, args: Any, dims: Any, *, fun: LinearMap, n: int, out: Any) -> Any:
    size = axis.size
    if all(d is None for d in dims) and not isinstance(axis.name, str):
        values = _linear_p.bind(*args, fun=fun, n=n, out=out)
        return values, [None] * len(values)
    axes = tuple(None if d is None else 0 for d in dims[:n])
    given = [
        a if axis is None else jnp.moveaxis(a, d, 0)
        for a, d, axis in zip(args, dims, axes, strict=False)
    ]
    # Each member has an x of its own, whose cotangents are summed where it was one for all.
    x = [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args[n:], dims[n:], strict=True)
    ]
    types = [core.unmapped_aval(size, 0, t) for t in out]
    values = linear_map(_Batch(fun, axes, size, axis.name), given, x, types)
    return values, [0] * len(values)


ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.fancy_primitive_batchers[_linear_p] = _batch
