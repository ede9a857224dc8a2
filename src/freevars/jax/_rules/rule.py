"""The implicit rule of one decorated solver: what it states, and its derivative at a solution.

Problems are passed as leaves and a static tree, so that the maps can be compiled. Not here: JAX's
rule around it and the running of the solver (`solver`), and what is done about a failure
(`refusal`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from freevars._solvers.verdict import Kind, OnFailure
from freevars.jax import _compat
from freevars.jax._closure import Closure
from freevars.jax._rules import diagnostics, eager, implicit, linear
from freevars.jax._rules.constrained import Constrained
from freevars.jax._rules.coordinates import Coordinates
from freevars.jax._rules.sizes import Unknown, limits_of
from freevars.jax._rules.system import LinearSystem, nothing_if
from freevars.jax._rules.totals import Totals
from freevars.jax._solver.problem import Problem, count

__all__ = ["Rule"]

_CONDITIONS: dict[Kind, implicit.Condition] = {
    "root": implicit.zero,
    "argmin": implicit.stationary,
    "fixed_point": implicit.fixed,
    "least_squares": implicit.least,
    "implicit": implicit.zero,
}


@dataclass(frozen=True, eq=False)
class Rule:
    """What a solver's result satisfies, and how its derivative is taken and checked."""

    name: str  # the solver's
    kind: Kind
    method: linear.Method
    has_aux: bool = False
    on_failure: OnFailure = "raise"
    check: bool = True
    tol: float | None = None
    polish: bool = False
    conserved: Totals | None = None
    one_sided: bool = False
    # Problems whose solution needed a closer look, by hash: the next one will usually need one too.
    _looked: set[int] = field(default_factory=set, init=False)

    def condition(self, problem: Problem, *, to_bounds: bool = False) -> implicit.Condition:
        """The equations, from the functions of a call; `to_bounds`: for a step that ends on those
        that are active."""
        if problem.constrained:
            squares = self.kind == "least_squares"
            return Constrained(squares, self.one_sided, self.check, to_bounds)
        return _CONDITIONS[self.kind]

    # What is compiled for all calls of the solver. The tree that rebuilds the leaves is static.

    @functools.cached_property
    def compiled_tangent(self) -> Any:
        """`tangent`."""
        return jax.jit(self.tangent, static_argnums=(0, 1))

    @functools.cached_property
    def _inlined_tangent(self) -> Any:
        return jax.jit(self.tangent, static_argnums=(0, 1), inline=True)

    @functools.cached_property
    def _compiled_push(self) -> Any:
        return jax.jit(self.push, static_argnums=(0, 1, 6))

    @functools.cached_property
    def _pushes(self) -> tuple[Any, Any]:
        return jax.jit(eager.pushed), jax.jit(eager.transposed, static_argnums=2)

    @functools.cached_property
    def compiled_verdict(self) -> Any:
        """`verdict`."""
        return jax.jit(self.verdict, static_argnums=(0, 1))

    @functools.cached_property
    def compiled_kept(self) -> Any:
        """`kept`."""
        return jax.jit(self.kept, static_argnums=0)

    @functools.cached_property
    def compiled_polish(self) -> Any:
        """`polished`."""
        return jax.jit(self.polished, static_argnums=0)

    def fun_has_aux(self, problem: Problem, n: int) -> bool:
        """With aux, `fun` may have one too: its value is then what is of the right size."""
        wanted = {"argmin": 1, "least_squares": None}.get(self.kind, n)
        return self.has_aux and self.kind != "implicit" and problem.has_aux(wanted)

    def check_equations(self, problem: Problem, x0: Any) -> None:
        """Refuse a function that states no condition on x, before a solver meets it."""
        has_aux = self.fun_has_aux(problem, count(x0))
        condition = self.condition(problem)
        implicit.check_equations(condition, problem, x0, has_aux=has_aux, name=self.name)

    def read(self, problem: Problem, x0: Any) -> tuple[Problem, Any]:
        """What the solution depends on."""
        return problem, x0 if self.conserved else ()

    def linearise(
        self,
        tree: Any,
        leaves: list[Any],
        x: Any,
        x0: Any,
        moving: tuple[int, ...],
        *,
        to_bounds: bool = False,
    ) -> implicit.Linearised:
        problem, _ = jax.tree.unflatten(tree, leaves)
        has_aux = self.fun_has_aux(problem, count(x))
        condition = self.condition(problem, to_bounds=to_bounds)
        rebuild = functools.partial(jax.tree.unflatten, tree)
        try:
            return implicit.linearise(condition, rebuild, leaves, x, x0, moving, has_aux=has_aux)
        except ValueError as error:
            if not problem.has_custom_vmap:
                raise
            message = (
                f"{self.name}: expected a function whose derivative JAX can split into known values"
                " and a linear part; it calls a jax.custom_batching.custom_vmap, of which JAX can"
                " do neither that nor reverse mode. Call the custom_vmap from a function with a"
                " jax.custom_jvp, whose rule states the derivative."
            )
            raise NotImplementedError(message) from error

    def system(
        self,
        tree: Any,
        leaves: list[Any],
        x: Any,
        x0: Any,
        moving: tuple[int, ...] = (),
        captured: Any = None,
        *,
        to_bounds: bool = False,
    ) -> tuple[implicit.Linearised, Unknown, LinearSystem]:
        """The condition at x to first order, x with its sizes, and the system dF/dx."""
        point = self.linearise(tree, leaves, x, x0, moving, to_bounds=to_bounds)
        limits = limits_of(point.coordinates, self.tol)
        v0 = point.coordinates.to_real(x0)
        apart = jax.tree.unflatten(tree, leaves)[0].constrained
        unknown = Unknown.of(point.v, v0, point.space, point.coordinates, limits, apart=apart)
        bound = None
        if captured is not None:
            # An exact solve has its derivatives from the system, a truncated series its own.
            fixed = (leaves, x) if self.method.is_truncated else jax.lax.stop_gradient((leaves, x))
            forward, transposed = (functools.partial(closure, *fixed) for closure in captured)
            bound = (forward, transposed)
        sizes = unknown.v, unknown.far, unknown.d, limits
        eps = point.coordinates.eps
        return point, unknown, self.method.prepare(point.by_x, point.space, eps, bound, sizes)

    def linear_captures(self, problem: Problem, x0: Any) -> Any:
        """The functions that solve the linear system and its transpose, as closures, if they
        capture traced values."""
        if not self.method.calls_users_functions or not count(x0) or _compat.nothing_traced():
            return None
        leaves, tree = jax.tree.flatten(self.read(problem, x0))

        def solve(leaves: list[Any], x: Any, b: Any, *, which: int) -> Any:
            found = self.linearise(tree, leaves, x, x0, ())
            return self.method.methods(found.by_x, found.space, found.coordinates.eps)[which](b)

        b = Coordinates(x0).to_real(x0)
        solvers = [functools.partial(solve, which=which) for which in (0, 1)]
        if not _compat.captured_tracers(jax.jit(solvers[0]), leaves, x0, b):
            return None
        return tuple(Closure(solver, leaves, x0, b) for solver in solvers)

    @_compat.any_rank
    def polished(self, tree: Any, leaves: list[Any], x: Any, x0: Any, captured: Any) -> Any:
        """The solution after one more step, of Newton's method.

        Unless a second one would be no shorter (Deuflhard's monotonicity test): then x is so far
        from a solution that a step tells nothing, or so near that rounding is all that is left.
        """
        point, unknown, system = self.system(tree, leaves, x, x0, (), captured, to_bounds=True)
        moved, _ = diagnostics.newton(system, unknown, point.equations)
        return point.coordinates.from_real(moved)

    @_compat.any_rank
    def verdict(
        self,
        tree: Any,
        moving: tuple[int, ...],
        leaves: list[Any],
        x: Any,
        x0: Any,
        captured: Any,
    ) -> Any:
        """The verdict on x for a derivative by the moving leaves, and the Newton step."""
        point, unknown, system = self.system(tree, leaves, x, x0, moving, captured)
        found = diagnostics.measure(system, unknown, point.equations)
        return found, point.coordinates.from_real(found.step)

    @_compat.any_rank
    def kept(self, tree: Any, leaves: list[Any], x: Any) -> Any:
        """Whether a singular system is singular because it conserves totals."""
        point = self.linearise(tree, leaves, x, x, ())
        return diagnostics.kept(point.by_x, point.space)

    def derivative(self, *arguments: Any, known: bool) -> Any:
        """`tangent` of the same arguments, by what is compiled for all calls.

        Where values are `known`, outside of any program, and a failure raises an error, a program
        without the closer look suffices for many problems, and compiles in a third of the time; the
        look is included from the first solution of a problem that needs one. Inside a traced
        program it is inlined, since XLA does more with constants than across a call. But a caller's
        method stays in a function of its own: `jax_debug_infs` should not see the infinities that
        lineax works with.
        """
        tree, moving, leaves, x, x0, directions, _, captured = arguments
        told = self.check and self.on_failure in {"raise", "least_squares"}
        if told and known:
            at = tree, moving, leaves, x, x0, captured
            with _compat.at_once():
                found, minus = self._compiled_push(*at, hash(tree) in self._looked)
                if not found.final:
                    self._looked.add(hash(tree))
                    found, minus = self._compiled_push(*at, True)
            if minus is None:
                return jax.tree.map(jnp.zeros_like, x), found
            return eager.derivative_of(self.name, self._pushes, minus, x, directions), found
        traced = any(isinstance(leaf, _compat.Tracer) for leaf in jax.tree.leaves(x))
        inlined = traced and self.method.linear_solve is None
        return (self._inlined_tangent if inlined else self.compiled_tangent)(*arguments)

    @_compat.any_rank
    def push(
        self,
        tree: Any,
        moving: tuple[int, ...],
        leaves: list[Any],
        x: Any,
        x0: Any,
        captured: Any,
        closely: bool,  # noqa: FBT001 (static)
    ) -> Any:
        """The verdict on x, with a closer look or without, and the linear map of directions of the
        moving leaves to that of -x, as a pytree; None where none moves. A refusal raises, so the
        map needs no guard."""
        x, finite = _where_finite(x, x0)
        point, unknown, system = self.system(tree, leaves, x, x0, moving, captured)
        found = diagnostics.measure(system, unknown, point.equations, closely=closely)
        found = found.unless(finite)
        if not moving:  # JAX 0.9 returns a traced value of a map of nothing
            return found, None

        def minus(dots: list[Any]) -> Any:
            return point.to_x(point.space.agree(system.solve(point.by_moved(dots))))

        return found, jax.linearize(minus, [jnp.zeros_like(leaves[i]) for i in moving])[1]

    @_compat.any_rank
    def tangent(
        self,
        tree: Any,
        moving: tuple[int, ...],
        leaves: list[Any],
        x: Any,
        x0: Any,
        dots: list[Any],
        others: list[Any],
        captured: Any,
    ) -> Any:
        """The direction x' for the direction `dots` of the moving leaves, which is linear in
        `dots`, and what tells whether to trust it. `others` are directions of what the solution
        does not depend on, if it is one."""
        finite = True
        if self.check:
            # A member of a batch with a zero direction contributes 0, not 0 times infinity.
            x, finite = _where_finite(x, x0)
        point, unknown, system = self.system(tree, leaves, x, x0, moving, captured)
        found, good = None, True
        if self.check:
            found = diagnostics.measure(system, unknown, point.equations)
            found = found.unless(finite)
            good = found.good
        dv = jax.tree.map(jnp.zeros_like, point.v)
        if moving:
            minus = point.space.agree(system.solve(point.by_moved(dots), good))
            dv = jax.tree.map(jnp.negative, minus)
        if good is not True:
            none = nothing_if(good, point.space, point.v, [*dots, *others])
            dv = jax.tree.map(jnp.add, dv, none)
        return point.to_x(dv), found


def _where_finite(x: Any, x0: Any) -> tuple[Any, Any]:
    """x, or x0 where it is not finite; and whether it is."""
    finite: Any = True
    for leaf in jax.tree.leaves(x):
        finite &= jnp.all(jnp.isfinite(leaf))
    return jax.tree.map(lambda x, x0: jnp.where(jnp.isfinite(x), x, x0), x, x0), finite
