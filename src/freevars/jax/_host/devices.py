"""Which devices run a solver, and how the others get its result.

A program over several devices has one solver for each problem: it runs on one of them, all answer
its queries, and all get its result. Where JAX spreads a program over a mesh, the call itself says
so (`_compat.host_call`). Inside `shard_map` each device has its own program, and the axes of the
mesh are of three kinds:

- along axes over which the function joins the devices (by a `psum`, say) there is one problem,
  whose unknown they share;
- along axes over which the problem varies, each device has its own problem;
- along the rest, all are copies.

Only along axes of the second kind are there several solvers. With `check_vma=True` the types say
what varies. Without it, copies cannot be told from different problems, and are treated as
different; the program shows what the function joins, and whether the unknown is the same there is
checked when it runs. Not here: the loop between the solver and the program (`staged`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from freevars.jax import _compat

__all__ = ["Devices"]


class Devices(NamedTuple):
    """The axes of `shard_map` around a solve; none outside."""

    shared: tuple[str, ...] = ()  # one solver for all devices along these
    separate: frozenset[str] = frozenset()  # one for each along these, as far as types tell
    joined: tuple[str, ...] = ()  # those of `shared` that the function joins and no type tells

    @staticmethod
    def of(function: Callable[[Any, Any], Any], problem: Any, v0: Any, rest: Any) -> Devices:
        """The devices for `function(problem, v)` and the solver's other arguments.

        Raises:
            TypeError: the unknown lies in parts on devices that the function joins.
        """
        manual = _compat.manual_axes()
        if not manual:
            return Devices()
        joined = manual & _compat.coupled_axes(jax.make_jaxpr(function)(problem, v0).jaxpr)
        told = {name for name in manual if _compat.tracks_varying(name)}
        in_parts = joined & _compat.varying_axes(v0)
        if in_parts:
            raise TypeError(_in_parts(sorted(in_parts)))
        leaves = jax.tree.leaves((problem, v0, rest))
        varying = frozenset[str]().union(*map(_compat.varying_axes, leaves))
        several = (varying | (manual - told)) - joined
        return Devices(
            tuple(sorted(manual - several)), several & told, tuple(sorted(joined - told))
        )

    def call(self, callback: Any, results: Sequence[Any], *args: Any) -> list[Any]:
        """`_compat.host_call` on the devices that run a solver."""
        if not self.shared:
            return self.vary(_compat.host_call(callback, results, *args))
        axes = self.separate | {name for name in self.shared if _compat.tracks_varying(name)}
        is_first = jnp.bool_(True)
        for name in self.shared:
            is_first &= jax.lax.axis_index(name) == 0

        def here(*args: Any) -> list[Any]:
            return [_compat.vary_over(x, axes) for x in _compat.host_call(callback, results, *args)]

        def elsewhere(*_: Any) -> list[Any]:
            return [_compat.vary_over(jnp.zeros(r.shape, r.dtype), axes) for r in results]

        args = tuple(_compat.vary_over(jnp.asarray(x), axes) for x in args)
        found = jax.lax.cond(is_first, here, elsewhere, *args)
        return [self._from_first(x) for x in found]

    def _from_first(self, x: Any) -> Any:
        number = x.astype(jnp.int32) if x.dtype == bool else x
        return jax.lax.psum(number, self.shared).astype(x.dtype)

    def vary(self, values: Any) -> Any:
        """The values, typed as varying along the separate axes."""
        return jax.tree.map(lambda x: _compat.vary_over(x, self.separate), values)

    def answer(self, value: Any, *, slope: bool) -> Any:
        """This device's answer for all; `slope`: of an objective that is one number for all.

        Where types do not show what varies, JAX differentiates the sum over all devices.

        Raises:
            TypeError: devices along a shared axis say different things.
        """
        if slope and self.joined:
            value = jax.lax.pmean(value, self.joined)
        extra = _compat.varying_axes(value) - self.separate
        if extra:
            names = ", ".join(map(repr, sorted(extra)))
            message = (
                "a solver on the host: its function gives another value on each device along the"
                f" axis {names}, and the unknown is the same there. Join them, by a jax.lax.psum"
                " of the value, say; or start each device from an x0 that varies over the axis."
            )
            raise TypeError(message)
        return self.vary(value)

    def is_same(self, v: Any) -> Any:
        """Whether v is the same along the axes where it has to be and no type says so."""
        same = jnp.bool_(True)
        for name in self.joined:
            same &= jnp.all(jax.lax.pmax(v, name) == jax.lax.pmin(v, name))
        return same

    def check_is_same(self, same: Any) -> None:
        """On the host.

        Raises:
            TypeError: it is not.
        """
        if not same:
            raise TypeError(_in_parts(self.joined))


def _in_parts(names: Sequence[str]) -> str:
    axes = ", ".join(map(repr, names))
    return (
        f"a solver on the host: its unknown lies in parts on the devices along the axis {axes},"
        " which its function joins. It takes the whole unknown as one vector: give each device all"
        f" of it (jax.lax.all_gather of x0 over {axes}), or call the solver outside shard_map,"
        " under jit, where x0 may be sharded."
    )
