"""The real coordinates of an unknown, and its inner product over all devices that it lies on.

The equations need not be holomorphic, so a complex number counts as two real ones: a complex array
becomes a pair of real arrays. Nothing else changes: no leaf is reshaped, joined with another or
gathered from devices. No linear algebra is done in half precision.

Inside `shard_map`, `vmap(axis_name=...)` and `pmap` each device holds a part of the unknown. Where
the system couples the parts, by a `psum` in the function, all of them are one unknown, and sums go
over the named axes as well. The program of the system shows which axes these are; the type of a
leaf says over which of them it varies (`check_vma=True`). Where JAX does not track that, a leaf may
be one part of many, or a copy that all devices share. The equations decide: those of a copy are the
same on every device for any unknown. A copy counts once. Not here: anything about solving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from freevars.jax import _compat

__all__ = [
    "Coordinates",
    "Space",
    "firm_probe",
    "known_size",
    "magnitude",
    "max_abs",
    "probe",
    "split_like",
]

Tree: TypeAlias = Any  # a pytree of real arrays of one dtype
_LARGE = 2**20


class Coordinates:
    """How one pytree of floating and complex arrays is written in real arrays of one dtype."""

    def __init__(self, x: Any) -> None:
        leaves, self._tree = jax.tree.flatten(x)
        self._dtypes = [jnp.dtype(leaf.dtype) for leaf in leaves]
        infos = [jnp.finfo(dtype) for dtype in self._dtypes]
        # The widest, and at least float32; by hand, since strict promotion never mixes dtypes.
        self.dtype = jnp.dtype("float64" if any(i.bits == 64 for i in infos) else "float32")  # noqa: PLR2004
        # An x in half precision is no closer to the solution than that.
        self.eps = max((float(i.eps) for i in infos), default=float(jnp.finfo(self.dtype).eps))

    def to_real(self, x: Any) -> Tree:
        """The real arrays of a pytree like x, which may be of other dtypes."""
        return self._tree.unflatten(
            [self._split(leaf, d) for leaf, d in zip(jax.tree.leaves(x), self._dtypes, strict=True)]
        )

    def _split(self, leaf: Any, dtype: Any) -> Any:
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return (jnp.real(leaf).astype(self.dtype), jnp.imag(leaf).astype(self.dtype))
        return leaf.astype(self.dtype)

    @property
    def has_pairs(self) -> bool:
        """Whether some of the arrays are complex."""
        return any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in self._dtypes)

    def magnitude(self, v: Tree) -> Tree:
        """How large each component is; the parts of a complex number are as large as it."""
        absolute = jax.tree.map(jnp.abs, v)
        if not self.has_pairs:
            return absolute
        parts = zip(self._tree.flatten_up_to(absolute), self._dtypes, strict=True)
        return self._tree.unflatten([_larger(part, dtype) for part, dtype in parts])

    def from_real(self, v: Tree) -> Any:
        """The pytree x of real arrays; linear."""
        parts = zip(self._tree.flatten_up_to(v), self._dtypes, strict=True)
        return self._tree.unflatten([_join(part, dtype) for part, dtype in parts])


def _join(part: Any, dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return part.astype(dtype)
    return jax.lax.complex(*part).astype(dtype)


def _larger(part: Any, dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return part
    return (jnp.maximum(*part),) * 2


class Space:
    """The space that a system acts on: its inner product, and sums and maxima over everything.

    Of one device, unless `axes` says for each leaf which named axes to sum over. `copies` says of
    each leaf and axis whether the parts along it are copies: a bool, or an array of one.
    """

    def __init__(
        self,
        axes: list[frozenset[str]] | None = None,
        copies: list[dict[str, Any]] | None = None,
    ) -> None:
        self._axes = axes
        self._copies = copies

    @staticmethod
    def of(matvec: Callable[[Tree], Tree], v: Tree, f: Tree) -> Space:
        """The space of a linear map of trees like `v`; there the equations have the value `f`.

        All leaves are parts along every axis that one of them varies over, or copies there.
        """
        coupled = _compat.coupled_axes(jax.make_jaxpr(matvec)(v).jaxpr)
        if not coupled:
            return Space()
        told = {name for name in coupled if _compat.tracks_varying(name)}
        varying = [_compat.varying_axes(leaf) for leaf in jax.tree.leaves(v)]
        equations = [_compat.varying_axes(leaf) for leaf in jax.tree.leaves(f)]
        spread = frozenset(told).intersection(frozenset[str]().union(*varying))
        axes = [spread | (coupled - told)] * len(varying)
        copies: list[dict[str, Any]] = [
            {name: True for name in spread if name not in mine & theirs}
            for mine, theirs in zip(varying, equations, strict=True)
        ]
        if coupled - told:
            fixed = jax.lax.stop_gradient(v)
            image = jax.lax.stop_gradient(matvec(_different_on_each(fixed, coupled - told)))
            for found, x, y in zip(
                copies, jax.tree.leaves(fixed), jax.tree.leaves(image), strict=True
            ):
                found |= {name: _same(x, name) & _same(y, name) for name in coupled - told}
        return Space(axes, copies)

    @property
    def is_local(self) -> bool:
        """Whether the whole of it is on one device."""
        return not any(self._axes or ())

    def size(self, v: Tree) -> int:
        """How many real unknowns there are on all devices, copies included (`known_size`)."""
        leaves = jax.tree.leaves(v)
        axes = self._axes or [frozenset()] * len(leaves)
        each = (leaf.size * _devices(names) for leaf, names in zip(leaves, axes, strict=True))
        return known_size(sum(each))

    def dot(self, u: Tree, v: Tree) -> Any:
        """The inner product, leaf by leaf: a product of whole vectors would gather them."""
        products = [
            jnp.sum(a * b) for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(v), strict=True)
        ]
        if self._axes is None:
            return sum(products[1:], products[0])
        by_axes: dict[frozenset[str], Any] = {}
        for product, names, copies in zip(
            products, self._axes, self._copies or [{}] * len(products), strict=True
        ):
            once = product
            for name, is_copy in copies.items():
                once = once * jnp.where(is_copy, 1 / _devices([name]), 1).astype(once.dtype)
            by_axes[names] = once + by_axes[names] if names in by_axes else once
        sums = [jax.lax.psum(s, tuple(sorted(n))) if n else s for n, s in by_axes.items()]
        return sum(sums[1:], sums[0])

    def norm(self, v: Tree) -> Any:
        """The norm of the inner product, also where squares are no numbers or 0."""
        most = self.max(v)
        scale = jnp.where((most > 0) & jnp.isfinite(most), most, 1)
        unit = jax.tree.map(lambda leaf: leaf / scale, v)
        return scale * jnp.sqrt(self.dot(unit, unit))

    def max(self, v: Tree) -> Any:
        """The largest absolute value of an entry, a constant; infinity where one is NaN."""
        leaves = jax.tree.leaves(jax.lax.stop_gradient(v))
        axes = self._axes or [frozenset[str]()] * len(leaves)
        found = [
            jax.lax.pmax(largest, tuple(sorted(names))) if names else largest
            for largest, names in zip([max_abs(leaf) for leaf in leaves], axes, strict=True)
        ]
        result = found[0]
        for other in found[1:]:
            result = jnp.maximum(result, other)
        return result

    def agree(self, v: Tree) -> Tree:
        """`v` with each copy replaced by the mean of all, so that a shared unknown counts once.
        Linear and symmetric; the identity where nothing is a copy."""
        if not any(self._copies or ()):
            return v
        leaves, tree = jax.tree.flatten(v)
        result = []
        for leaf, copies in zip(leaves, self._copies or (), strict=True):
            for name, is_copy in copies.items():
                mean = _compat.vary_over(jax.lax.pmean(leaf, name), _compat.varying_axes(leaf))
                leaf = mean if is_copy is True else jnp.where(is_copy, mean, leaf)  # noqa: PLW2901
            result.append(leaf)
        return tree.unflatten(result)


def magnitude(a: Any) -> Any:
    """|a|, and infinity for NaN, which no maximum over it may lose: on CPUs, XLA's does so where
    it is of a large batch."""
    return jnp.where(jnp.isnan(a), jnp.inf, jnp.abs(a))


def max_abs(a: Any, axis: int | None = None) -> Any:
    """The largest absolute value of an entry, 0 of none; infinity where one is NaN."""
    return jnp.max(magnitude(a), axis=axis, initial=0)


def split_like(vector: Any, like: Iterable[Any]) -> list[Any]:
    """A vector in parts of the shapes of some arrays; axes in front of its own stay in front."""
    lead, parts, start = vector.shape[:-1], [], 0
    for shape in (a.shape for a in like):
        end = start + math.prod(shape)
        parts.append(vector[..., start:end].reshape((*lead, *shape)))
        start = end
    return parts


def known_size(n: Any) -> int:
    """A size as a Python number. In a program that `jax.export` makes for any size it counts as
    large: what works for many unknowns works for few, at a higher cost."""
    return n if isinstance(n, int) else _LARGE


def _devices(names: Any) -> int:
    count = 1
    for name in names:
        count *= jax.lax.axis_size(name)
    return count


def _same(leaf: Any, name: str) -> Any:
    return jnp.all(jax.lax.pmax(leaf, name) == jax.lax.pmin(leaf, name))


def _different_on_each(v: Tree, names: Any) -> Tree:
    place = sum(jax.lax.axis_index(name) * 3**i for i, name in enumerate(sorted(names)))
    return jax.tree.map(lambda leaf: leaf * (1 + place).astype(leaf.dtype), probe(v, 7))


def probe(v: Tree, seed: Any) -> Tree:
    """Fixed entries between -1 and 1 without a pattern: a vector with a bit of every direction.

    A hash of the position of an entry, because random numbers would take longer to compile than
    everything else. It is the same on every device. The seed is an integer, traced or not.
    """

    def fill(number: int, leaf: Any) -> Any:
        place = jnp.zeros(leaf.shape, jnp.uint32)
        stride = 1
        for axis in reversed(range(leaf.ndim)):
            count = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            place = place + count * jnp.uint32(stride % 2**32)
            stride *= leaf.shape[axis]
        start = jnp.uint32(seed) * jnp.uint32(7919) + jnp.uint32((number * 104729 + 1) % 2**32)
        h = place + start * jnp.uint32(2654435761)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3
            h = (h ^ (h >> jnp.uint32(shift))) * jnp.uint32(factor)
        unit = (h ^ (h >> jnp.uint32(16))).astype(leaf.dtype) * (2.0**-31) - 1
        # This depends on the leaf, so that it is sharded alike: XLA would replicate it otherwise.
        return jnp.where(leaf == leaf, unit, jnp.nan)  # noqa: PLR0124

    leaves, tree = jax.tree.flatten(v)
    return tree.unflatten([fill(i, leaf) for i, leaf in enumerate(leaves)])


def firm_probe(v: Tree, seed: Any) -> Tree:
    """The same with no entry below 1/2 in size: for what is measured component by component, where
    a small entry would hide one."""
    return jax.tree.map(lambda p: (p + jnp.where(p < 0, -1, 1)) / 2, probe(v, seed))
