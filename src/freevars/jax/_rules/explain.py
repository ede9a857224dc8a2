"""The error for a solution that is refused, where all values are known.

Time does not matter here: what a figure leaves open is examined once more. Not here: the figures
(`diagnostics`), and the texts, which both hosts share (`freevars._solvers.failures`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax import tree_util

from freevars._solvers.bounds import Component, on_a_bound
from freevars._solvers.failures import Context, failure, option_matters
from freevars._solvers.verdict import Figures, Kind, Limits
from freevars.errors import FreevarsError, SingularError
from freevars.jax._convert.static import from_static

if TYPE_CHECKING:
    from freevars.jax._rules.diagnostics import Diagnostics

__all__ = ["Diagnosis", "explain", "known_figures", "not_finite"]


class Diagnosis(NamedTuple):
    """What is measured of a solution; made by the method `diagnose` of a decorated solver.

    Attributes:
        accepted: bool, whether derivatives are given.
        error: the exception that is raised if not; None where they are given.
        figures: what was measured: how far x is from a solution, the condition of the system.
        limits: what the figures may be.
        x: the solution, a pytree like x0.
        newton_step: a pytree like x, to be subtracted from it.

    Example:
        >>> import jax, freevars.jax as fv
        >>> @fv.root
        ... def newton(fun, x0, steps=20):
        ...     return jax.lax.fori_loop(0, steps, lambda _, x: x - fun(x) / jax.grad(fun)(x), x0)
        >>> newton.diagnose(lambda x: x**2 - 4.0, 1.0).accepted
        True
        >>> early = newton.diagnose(lambda x: x**2 - 4.0, 1.0, steps=2)
        >>> print(early.accepted, type(early.error).__name__, round(float(early.newton_step), 3))
        False NotASolutionError 0.049
    """

    accepted: bool
    error: FreevarsError | None
    figures: Figures
    limits: Limits
    x: Any
    newton_step: Any


def explain(
    found: Diagnostics,
    limits: Limits,
    context: Context,
    x: Any,
    x0: Any,
    options: Any,
    *,
    by_options: bool,
    constrained: bool,
) -> FreevarsError:
    """The error for a verdict on x, which a solver with these options found from x0.

    `by_options`: the derivative is by nothing that the function reads. `constrained`: the solver's
    bounds are part of the problem.
    """
    name, kind = context.name, context.kind
    figures = known_figures(found.figures)
    converged = figures.finite and figures.step <= limits.step
    regular = context.least_squares or figures.rcond > limits.rcond
    at_start = _same(x, x0)
    if by_options and figures.finite and regular and not (converged or at_start):
        return option_matters(name, kind, figures.step, limits.step)
    bounded: list[str] = []
    if not (converged or constrained or at_start):
        bounded = _on_a_bound(x, found.step, limits, options, kind)
    return failure(figures, limits, context._replace(bounded=bounded, at_start=at_start))


def known_figures(figures: Figures) -> Figures:
    """The same as numbers of Python."""
    return Figures(bool(figures.finite), *map(float, figures[1:]))


def _same(x: Any, x0: Any) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(x), jax.tree.leaves(x0)))


def _on_a_bound(x: Any, step: Any, limits: Limits, options: Any, kind: Kind) -> list[str]:
    """The components that a bound may have stopped."""
    given = [
        float(number)
        for leaf in jax.tree.leaves(from_static(options))
        if isinstance(leaf, (int, float, np.ndarray, np.generic, jax.Array))
        for number in np.ravel(np.asarray(leaf))
        if np.isrealobj(number) and np.isreal(number)
    ]
    steps = [np.asarray(leaf) for leaf in jax.tree.leaves(step)]
    leaves = tree_util.tree_leaves_with_path(x)
    if len(steps) != len(leaves):  # complex unknowns, which have no order and no bounds
        return []
    components = (
        Component(
            f"x{tree_util.keystr(path)}" + (f"[{', '.join(map(str, index))}]" if index else ""),
            float(values[index]),
            float(change[index]),
            str(values[index]),
            values.dtype.type,
        )
        for (path, leaf), change in zip(leaves, steps, strict=True)
        for values in [np.asarray(leaf)]
        for index in np.ndindex(values.shape)
    )
    return on_a_bound(components, given, kind, limits.step)


def not_finite(name: str) -> SingularError:
    """The error for a derivative from a system that was taken for regular."""
    return SingularError(
        f"{name}: the derivative is not finite: the iterative linear solver stopped short, or the"
        " direction of differentiation is not finite itself. Give another linear_solve, or more"
        " steps."
    )
