"""The linear map of a differential equation's solution to first order, and its transpose.

`freevars._solvers.integration` has the equations. Not here: JAX's rule (`odeint`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from freevars._sequences import replaced
from freevars._solvers.integration import OdeRule, not_solved
from freevars.jax import _compat
from freevars.jax._rules.coordinates import max_abs
from freevars.jax._rules.forms import Flat
from freevars.jax._rules.integrator import Told, accepted

__all__ = ["BySolver", "OdeSolver"]

Arrays = list[Any]
Field = Callable[[Any, Arrays], Arrays]  # of t and the leaves of a state


class OdeSolver(Protocol):
    """What the map needs of the decorated solver."""

    @property
    def rule(self) -> OdeRule: ...

    def integrate(
        self, field: Field, state: Arrays, ts: Any, options: Any, takes: Any, *, leg: bool
    ) -> Arrays:
        """The states at the times, with a leading axis over these."""

    def takes(self, y0: Any) -> Any: ...

    def tell(self, error: Any, eps: float, told: Told) -> None: ...


class Recorded(NamedTuple):
    """One solution, from what is given."""

    f: Callable[[Any, Arrays, Arrays], Arrays]  # of t, the part of p that moves, leaves of y
    p: Arrays  # that part
    y0: Arrays
    ts: Any
    ys: Arrays
    options: Any
    takes: Any
    coupled: frozenset[str]  # the named axes along which the field communicates


@dataclass(frozen=True)
class BySolver:
    """(dp, dy_0) -> d_i; static: the leaves of `tree` are given separately."""

    solver: OdeSolver
    tree: Any  # of the problem, (y0, ts), the options, the recorded states
    moving: tuple[int, ...]  # the leaves of the problem that move
    leg: bool  # whether the times are two that may be equal

    def forward(self, given: Sequence[Any], x: Sequence[Any]) -> Sequence[Any]:
        out, error = _forward(self, list(given), list(x))
        self._tell(given, error, backwards=False)
        return out

    def transposed(self, given: Sequence[Any], g: Sequence[Any]) -> Sequence[Any]:
        backwards = self.solver.rule.reverse == "adjoint"
        transposed = _adjoint if backwards else _by_sensitivities
        out, error = transposed(self, list(given), list(g))
        self._tell(given, error, backwards=backwards)
        return out

    def _tell(self, given: Sequence[Any], error: Any, *, backwards: bool) -> None:
        eps = Flat(self.recorded(given).y0).eps
        self.solver.tell(error, eps, functools.partial(not_solved, backwards=backwards))

    def recorded(self, given: Sequence[Any]) -> Recorded:
        problem, (y0, ts), options, ys = self.tree.unflatten(given)
        leaves, tree = jax.tree.flatten(problem)
        of_y = jax.tree.structure(y0)

        def f(t: Any, p: Arrays, y: Arrays) -> Arrays:
            at = tree.unflatten(replaced(leaves, self.moving, p))
            return jax.tree.leaves(at.value((t, of_y.unflatten(y)), has_aux=False))

        p = [leaves[i] for i in self.moving]
        parts = (jax.tree.leaves(y0), ts, jax.tree.leaves(ys))
        return Recorded(f, p, *parts, options, self.solver.takes(y0), problem.coupled)

    def accepted(self, of: Recorded, error: Any, out: Arrays, asked: Arrays) -> Arrays:
        """Replace what is not good by NaN."""
        rule = self.solver.rule
        return accepted(out, asked, error <= rule.limit(Flat(of.y0).eps)) if rule.check else out


@functools.partial(jax.jit, static_argnums=0)
@_compat.any_rank
def _forward(by: BySolver, given: Arrays, x: Arrays) -> tuple[Arrays, Any]:
    of = by.recorded(given)
    out, error = _sensitivities(by, of, [dot[None] for dot in x])
    return by.accepted(of, error, [leaf[:, 0] for leaf in out], x), error


def _sensitivities(by: BySolver, of: Recorded, columns: Arrays) -> tuple[Arrays, Any]:
    """The d_i for several changes of p and y_0 at once, which lie along a leading axis."""
    n, m = len(of.p), len(of.y0)
    dp = columns[:n]

    def field(t: Any, state: Arrays) -> Arrays:
        y, d = state[:m], state[m:]

        def push(dp: Arrays, d: Arrays) -> Arrays:
            return jax.jvp(functools.partial(of.f, t), (of.p, y), (dp, d))[1]

        return [*of.f(t, of.p, y), *jax.vmap(push)(dp, d)]

    # Each changes as y does, which may vary over more named axes.
    dy = [_compat.like_type(d, y) for d, y in zip(columns[n:], of.y0, strict=True)]
    start = [*of.y0, *dy]
    out = by.solver.integrate(field, start, of.ts, of.options, of.takes, leg=by.leg)
    return out[m:], _difference(of, out[:m], of.ys)


@functools.partial(jax.jit, static_argnums=0)
@_compat.any_rank
def _by_sensitivities(by: BySolver, given: Arrays, g: Arrays) -> tuple[Arrays, Any]:
    of = by.recorded(given)
    if of.coupled:
        names = ", ".join(map(repr, sorted(of.coupled)))
        message = (
            'reverse="sensitivities": expected a field of one device, got one that sends values'
            f" along the named axis {names} (psum, say): a sensitivity there is one of all devices."
            ' Take reverse="adjoint", the default.'
        )
        raise NotImplementedError(message)
    inputs = [*of.p, *of.y0]
    flat = Flat(inputs)
    columns = flat.unravel(jnp.eye(flat.size, dtype=flat.dtype))
    out, error = _sensitivities(by, of, columns)

    def paired(k: Any) -> Any:
        # Both of a complex pair are what JAX pairs, without a conjugate.
        products = [jnp.sum(jnp.real(ct * d[:, k])) for ct, d in zip(g, out, strict=True)]
        return sum(p.astype(flat.dtype) for p in products)

    by_number = jax.vmap(paired)(jnp.arange(flat.size))
    zeros = [_compat.like_type(jnp.zeros(a.shape, a.dtype), by_number) for a in inputs]
    (parts,) = jax.linear_transpose(flat.ravel, zeros)(by_number)
    found = [*map(_compat.sum_over_more, parts, inputs)]
    return by.accepted(of, error, found, g), error


@functools.partial(jax.jit, static_argnums=0)
@_compat.any_rank
def _adjoint(by: BySolver, given: Arrays, g: Arrays) -> tuple[Arrays, Any]:
    of = by.recorded(given)
    m = len(of.y0)
    g = [ct.astype(y.dtype) for ct, y in zip(g, of.y0, strict=True)]

    def field(s: Any, state: Arrays) -> Arrays:
        y, costate = state[:m], state[m : 2 * m]
        value, pull = jax.vjp(functools.partial(of.f, -s), of.p, y)
        by_p, by_y = pull(costate)
        return [*map(jnp.negative, value), *by_y, *by_p]

    def back(carry: tuple[Arrays, Arrays], row: Any) -> tuple[Any, Any]:
        costate, by_p = carry
        (now, before), y, ct = row
        costate = [a + b for a, b in zip(costate, ct, strict=True)]
        start, times = [*y, *costate, *by_p], jnp.stack([-now, -before])
        out = by.solver.integrate(field, start, times, of.options, of.takes, leg=True)
        end = [leaf[-1].astype(a.dtype) for leaf, a in zip(out, start, strict=True)]
        return (end[m : 2 * m], end[2 * m :]), end[:m]

    start = [_compat.like_type(jnp.zeros_like(y), ct) for y, ct in zip(of.y0, g, strict=True)]
    zeros = (start, [_compat.like_type(jnp.zeros_like(p), p) for p in of.p])
    (costate, by_p), again = zeros, [y[:0] for y in of.ys]
    if of.ts.size > 1:
        later = ((of.ts[1:], of.ts[:-1]), [y[1:] for y in of.ys], [ct[1:] for ct in g])
        (costate, by_p), again = jax.lax.scan(back, zeros, later, reverse=True)
    costate = [a + ct[0] for a, ct in zip(costate, g, strict=True)]
    error = _difference(of, again, [y[:-1] for y in of.ys])
    return by.accepted(of, error, [*by_p, *costate], g), error


def _difference(of: Recorded, again: Arrays, recorded: Arrays) -> Any:
    """How far two solutions are apart, relative to the size of each component."""
    p, ts, ys, again, recorded = jax.lax.stop_gradient((of.p, of.ts, of.ys, again, recorded))
    slopes = jax.vmap(lambda t, y: of.f(t, p, y))(ts, ys)
    largest = jnp.zeros(())
    for y, f, a, b in zip(ys, slopes, again, recorded, strict=True):
        size = max_abs(y, axis=0)
        way = jnp.abs(jnp.diff(ts)).reshape(-1, *[1] * (y.ndim - 1)).astype(size.dtype)
        way = way * jnp.minimum(jnp.abs(f[1:]), jnp.abs(f[:-1]))
        size = jnp.maximum(size, jnp.max(way, axis=0, initial=0) / 10)
        least = jnp.finfo(y.dtype).eps ** 0.5 * jnp.max(size, initial=0)
        size = jnp.maximum(size, least)
        gap = jnp.abs(a - b) / jnp.where(size > 0, size, 1)
        largest = jnp.maximum(largest, max_abs(gap).astype(largest.dtype))
    # What one device gets wrong is wrong on all that it sends to.
    for name in sorted(of.coupled):
        if not _compat.tracks_varying(name) or name in _compat.varying_axes(largest):
            largest = jax.lax.pmax(largest, name)
    return largest
