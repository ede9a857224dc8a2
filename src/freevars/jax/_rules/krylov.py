"""Krylov methods on pytrees: a vector is a pytree, kept as it is.

No method here reshapes, joins or gathers a leaf. All that it needs besides additions is an inner
product, provided by its caller: summed leaf by leaf, and over devices where a vector is spread over
them. Steps stop where |r| <= tol |b| in the norm of that product, so zeros in b do not matter; nor
do units, as long as A and b are scaled to about 1: all norms here are squares. Each method verifies
the residual of its result, and where that is at the level of rounding, |r| <= 10 eps |A| |x|, a
direct solver could not do better.

Among methods for general systems BiCGStab(2) was chosen by measurement: on contractions it applies
the system as often as restarted GMRES does, with 8 vectors instead of 31, and it solves grids
(convection and diffusion, 100 x 100) on which GMRES(30) stalls. Where a step of Richardson's
iteration removes much of the residual, that is faster: it does almost nothing besides applying the
system.

Sources: Richardson 1910; Hestenes and Stiefel 1952 (conjugate gradients, also for the normal
equations); Sleijpen and Fokkema 1993 (BiCGStab(l)). Not here: which method solves what (`linear`),
and derivatives: these are steps, not rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from freevars.jax import _compat

__all__ = [
    "Solution",
    "System",
    "bicgstab",
    "conjugate_gradients",
    "is_solved",
    "least_squares",
    "richardson",
]

Tree: TypeAlias = Any  # a pytree of real arrays of one dtype
Apply: TypeAlias = Callable[[Tree], Tree]


_QUICKLY = 0.7  # of the residual is what a step of Richardson's iteration leaves, or it ends


class System(NamedTuple):
    """A x = b, both about 1, and how exactly to solve it."""

    matvec: Apply
    b: Tree
    dot: Callable[[Tree, Tree], Any]
    tol: float  # |r| <= tol |b|
    eps: float  # the spacing of numbers in A x
    size: Any  # a lower bound of |A|
    max_steps: int  # how often A may be applied, about
    precondition: Apply | None = None  # about A^-1
    verify: bool = True  # compute the residual of the result: that takes an A more, and b in memory


class Solution(NamedTuple):
    """What a method returns."""

    x: Tree
    rr: Any  # the squared norm of the residual b - A x
    solved: Any  # bool
    steps: Any  # how often the system was applied, about


def combine(a: Any, x: Tree, y: Tree) -> Tree:
    """The tree a x + y."""
    return jax.tree.map(lambda x, y: a * x + y, x, y)


def choose(condition: Any, x: Tree, y: Tree) -> Tree:
    """The tree x where a scalar condition holds, else y."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), x, y)


def divide(a: Any, b: Any) -> Any:
    """The quotient, and 0 where b is 0: a method that breaks down stalls, and its residual shows
    it."""
    nonzero = b != 0
    return jnp.where(nonzero, a / jnp.where(nonzero, b, 1), 0)


def is_solved(system: System, rr: Any, xx: Any, bb: Any, size: Any) -> Any:
    """Whether a residual is small, by the squared norms of r, x and b and a bound of |A|: small by
    itself, or at the level of rounding and still below eps^(1/4) |b|."""
    rounding = (10 * system.eps * size) ** 2 * xx
    small = rr <= (2 * system.tol) ** 2 * bb
    return small | ((rr <= rounding) & (rr <= system.eps**0.5 * bb))


def zeros(b: Tree) -> Tree:
    """Zeros, sharded like b. Computed from b, since XLA would otherwise keep one array of zeros and
    copy it for each solve."""
    return jax.tree.map(lambda leaf: 0 * leaf, b)


class _Restart(NamedTuple):
    """The state between restarts, each of which begins with a residual computed anew."""

    x: Tree
    r: Tree
    rr: Any
    size: Any
    steps: Any
    restarts: Any
    solved: Any
    improving: Any


def _restarted(
    system: System,
    cycle: Callable[[_Restart], tuple[Tree, Any, Any, Any]],
    restarts: int,
    *,
    erratic: bool,
) -> Solution:
    """Run `cycle(state) -> x, rr, size, steps` until the system is solved or a restart brings the
    residual down by less than half. The last x of a method that is `erratic` may be a worse one:
    then what there was before is kept, at the cost of two more vectors."""
    b, dot = system.b, system.dot
    bb = dot(b, b)

    def step(state: _Restart) -> _Restart:
        x, _, size, steps = cycle(state)
        r = combine(-1, system.matvec(x), b)
        rr = dot(r, r)
        solved = is_solved(system, rr, dot(x, x), bb, size)
        improving = rr <= 0.25 * state.rr  # False where anything is NaN
        if erratic:
            better = rr <= state.rr
            x, r = choose(better, x, state.x), choose(better, r, state.r)
            rr = jnp.where(better, rr, state.rr)
        return _Restart(x, r, rr, size, steps, state.restarts + 1, solved, improving)

    def goes_on(state: _Restart) -> Any:
        more = (state.restarts < restarts) & (state.steps < system.max_steps)
        return ~state.solved & state.improving & more

    zero = zeros(b)
    start = _Restart(zero, b, bb, system.size + 0 * bb, 0, 0, bb == 0, jnp.isfinite(bb))
    if not system.verify:
        x, rr, _, steps = cycle(start)
        return Solution(x, rr, rr <= system.tol**2 * bb, steps)
    end = _compat.while_loop(goes_on, step, start)
    return Solution(end.x, end.rr, end.solved, end.steps)


def richardson(system: System) -> Solution:
    """For a system I - J: repeat x + (b - A x) while that reduces the residual.

    One product and one norm a step, and each residual is exact. It ends where a step removes too
    small a part of it: there the other methods are faster.
    """
    b, dot = system.b, system.dot
    bb = dot(b, b)
    stop = system.tol**2 * bb

    def step(state: Any) -> Any:
        x, r, rr, _, steps = state
        x = combine(1, x, r)
        r = combine(-1, system.matvec(x), b)
        return x, r, dot(r, r), rr, steps + 1

    def goes_on(state: Any) -> Any:
        _, _, rr, last, _ = state
        return (rr > stop) & (rr <= _QUICKLY**2 * last)

    start = (zeros(b), b, bb, bb / _QUICKLY**2, 0)
    x, _, rr, _, steps = _compat.while_loop(goes_on, step, start)
    better = rr <= bb
    x, rr = choose(better, x, zeros(b)), jnp.where(better, rr, bb)
    # A norm whose square is no number, or none that counts, tells nothing.
    told = (stop >= jnp.finfo(bb.dtype).tiny) & jnp.isfinite(bb)
    return Solution(x, rr, (rr <= stop) & told, steps)


def conjugate_gradients(system: System) -> Solution:
    """For a symmetric definite system: the fewest steps, and four vectors of memory."""
    matvec, b, dot, precondition = system.matvec, system.b, system.dot, system.precondition
    stop = system.tol**2 * dot(b, b)

    def cycle(state: _Restart) -> tuple[Tree, Any, Any, Any]:
        z = state.r if precondition is None else precondition(state.r)
        rz = state.rr if precondition is None else dot(state.r, z)

        def step(state: Any) -> Any:
            x, r, p, rz, rr, size, last, steps = state
            q = matvec(p)
            alpha = divide(rz, dot(p, q))
            x, r = combine(alpha, p, x), combine(-alpha, q, r)
            rr = dot(r, r)
            z = r if precondition is None else precondition(r)
            new = rr if precondition is None else dot(r, z)
            beta = divide(new, rz)
            # On the diagonal of the tridiagonal matrix of Lanczos: a lower bound of |A|.
            inverse = divide(jnp.ones_like(alpha), alpha)
            if precondition is None:
                size = jnp.maximum(size, jnp.abs(inverse + last))
            return x, r, combine(beta, p, z), new, rr, size, beta * inverse, steps + 1

        def goes_on(state: Any) -> Any:
            _, _, _, rz, rr, _, _, steps = state
            return (rr > stop) & (rz != 0) & (steps < system.max_steps)

        start = (state.x, state.r, z, rz, state.rr, state.size, 0 * rz, state.steps)
        x, _, _, _, rr, size, _, steps = _compat.while_loop(goes_on, step, start)
        return x, rr, size, steps

    return _restarted(system, cycle, restarts=4, erratic=False)


def bicgstab(system: System) -> Solution:
    """For any regular system, and with 8 vectors of memory: BiCGStab(2).

    Two steps of biconjugate gradients, then the step of degree 2 that leaves the least residual.
    """
    matvec, b, dot, precondition = system.matvec, system.b, system.dot, system.precondition
    apply = matvec if precondition is None else lambda v: matvec(precondition(v))
    bb = dot(b, b)

    def cycle(state: _Restart) -> tuple[Tree, Any, Any, Any]:
        shadow = state.r

        def bicg(rs: list[Tree], us: list[Tree], y: Tree, rho: Any, alpha: Any) -> Any:
            new = dot(rs[-1], shadow)
            beta = divide(alpha * new, rho)
            us = [combine(-beta, u, r) for u, r in zip(us, rs, strict=True)]
            us.append(apply(us[-1]))
            alpha = divide(new, dot(us[-1], shadow))
            rs = [combine(-alpha, u, r) for u, r in zip(us[1:], rs, strict=True)]
            rs.append(apply(rs[-1]))
            return rs, us, combine(alpha, us[0], y), new, alpha

        def step(state: Any) -> Any:
            y, r, u, rho, alpha, omega, _, size, steps = state
            rs, us, y, rho, alpha = bicg([r], [u], y, -omega * rho, alpha)
            if precondition is None:
                grown = divide(dot(us[1], us[1]), dot(us[0], us[0]))
                size = jnp.maximum(size, jnp.sqrt(grown))
            (r, r1, r2), (u, u1, u2), y, rho, alpha = bicg(rs, us, y, rho, alpha)
            # Least squares for r by r1 and r2, in vectors of length 1.
            n1, n2 = jnp.sqrt(dot(r1, r1)), jnp.sqrt(dot(r2, r2))
            c = divide(dot(r1, r2), n1 * n2)
            d1, d2 = divide(dot(r1, r), n1), divide(dot(r2, r), n2)
            g1 = divide(divide(d1 - c * d2, 1 - c * c), n1)
            g2 = divide(divide(d2 - c * d1, 1 - c * c), n2)
            y = combine(g1, r, combine(g2, r1, y))
            r = combine(-g1, r1, combine(-g2, r2, r))
            u = combine(-g1, u1, combine(-g2, u2, u))
            return y, r, u, rho, alpha, g2, dot(r, r), size, steps + 4

        def goes_on(state: Any) -> Any:
            rr, steps = state[6], state[8]
            # Far above where it began, rounding has taken over.
            return (rr > system.tol**2 * bb) & (rr < 1e6 * bb) & (steps < system.max_steps)

        zero = zeros(b)
        one = 1 + 0 * state.rr
        start = (zero, state.r, zero, one, 0 * one, one, state.rr, state.size, state.steps)
        y, *_, rr, size, steps = _compat.while_loop(goes_on, step, start)
        y = y if precondition is None else precondition(y)
        return combine(1, y, state.x), rr, size, steps

    return _restarted(system, cycle, restarts=6, erratic=True)


def least_squares(system: System, rmatvec: Apply, x: Tree | None = None) -> Solution:
    """The x with the least |A x - b|: conjugate gradients for A'A x = A'b.

    It solves any system, even a singular one, but needs more steps: the condition number is
    squared. The residual never grows, starting from that of `x`; from x = 0, the result is the
    shortest of all such x. Here solved means that |A'r| is small relative to |A'b|.
    """
    matvec, b, dot = system.matvec, system.b, system.dot
    s = rmatvec(b)
    begin = dot(s, s)
    r = b
    if x is None:
        x = zeros(b)
    else:
        r = combine(-1, matvec(x), b)
        s = rmatvec(r)

    def step(state: Any) -> Any:
        x, r, p, ss, steps = state
        q = matvec(p)
        alpha = divide(ss, dot(q, q))
        x, r = combine(alpha, p, x), combine(-alpha, q, r)
        s = rmatvec(r)
        new = dot(s, s)
        return x, r, combine(divide(new, ss), p, s), new, steps + 2

    def goes_on(state: Any) -> Any:
        _, _, _, ss, steps = state
        return (ss > system.tol**2 * begin) & (steps < system.max_steps)

    x, _, _, _, steps = _compat.while_loop(goes_on, step, (x, r, s, dot(s, s), 0))
    r = combine(-1, matvec(x), b)
    s = rmatvec(r)
    solved = dot(s, s) <= system.eps**0.5 * begin
    return Solution(x, dot(r, r), solved, steps)
