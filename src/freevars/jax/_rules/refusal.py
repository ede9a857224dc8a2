"""What is done about a solution that is refused.

Where values are known, an error; inside a compiled program, NaN, and with `on_failure="warn"` a
callback that says why. Not here: the figures (`diagnostics`), and what the error says (`explain`).
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freevars._solvers.failures import Context, failure
from freevars._solvers.verdict import Figures, Limits
from freevars.errors import FreevarsError
from freevars.jax import _compat
from freevars.jax._rules import constrained
from freevars.jax._rules.coordinates import Coordinates
from freevars.jax._rules.diagnostics import Diagnostics
from freevars.jax._rules.explain import Diagnosis, explain, known_figures, not_finite
from freevars.jax._rules.rule import Rule
from freevars.jax._rules.sizes import limits_of
from freevars.jax._solver.problem import Problem

__all__ = ["diagnosis", "error", "tell_failure"]


def tell_failure(
    rule: Rule, found: Diagnostics, at: tuple[Any, Any, Any, Any], dx: Any, *, by_options: bool
) -> None:
    """Report a failure now if its values are known; inside a compiled program the result is NaN."""
    limits = limits_of(Coordinates(at[0]), rule.tol)
    if rule.on_failure == "warn":
        jax.debug.callback(functools.partial(_warn, rule, limits), found.good, found.figures)
        return
    if isinstance(found.good, _compat.Tracer):
        return
    if not found.good:
        raise error(rule, found, limits, *at, by_options=by_options)
    leaves = jax.tree.leaves(dx)
    known = not any(isinstance(dot, _compat.Tracer) for dot in leaves)
    if known and not all(np.all(np.isfinite(dot)) for dot in leaves):
        raise not_finite(rule.name)


def error(
    rule: Rule,
    found: Diagnostics,
    limits: Limits,
    x: Any,
    x0: Any,
    options: Any,
    problem: Any,
    *,
    by_options: bool = False,
) -> FreevarsError:
    """The error for a verdict on known values."""
    x, x0, problem = jax.tree.map(_compat.lowered, (x, x0, problem))
    context = Context(rule.name, rule.kind, rule.on_failure == "least_squares", polish=rule.polish)
    stated = None if problem is None else jax.tree.unflatten(*problem)[0]
    # Without its bounds the system of a minimum is symmetric: it keeps no totals.
    by_bounds = context.least_squares and not found.figures.conserved <= limits.residual
    answered = found.figures.residual <= limits.residual
    if stated is not None and stated.constrained and (answered or by_bounds):
        reason = constrained.explain(
            stated,
            x,
            x0,
            has_aux=rule.fun_has_aux(stated, 1),
            squares=rule.kind == "least_squares",
            name=rule.name,
            tol=rule.tol,
        )
        if reason is not None:
            return reason
    regular = bool(found.figures.rcond > limits.rcond)
    if problem is not None and not regular and not context.least_squares:
        kept = rule.compiled_kept(*problem, x)
        found = found._replace(figures=found.figures._replace(conserved=kept))
    return explain(
        found,
        limits,
        context,
        x,
        x0,
        options,
        by_options=by_options,
        constrained=stated is not None and stated.constrained,
    )


def _warn(rule: Rule, limits: Limits, good: Any, figures: Figures) -> None:
    """Called with known values, from inside a program too."""
    if not good:
        context = Context(rule.name, rule.kind, polish=rule.polish)
        warnings.warn(str(failure(known_figures(figures), limits, context)), stacklevel=2)


def diagnosis(
    rule: Rule, problem: Problem, x: Any, x0: Any, options: dict[str, Any], captured: Any
) -> Diagnosis:
    """What is measured of a solution, with the error that a derivative would raise."""
    leaves, tree = jax.tree.flatten(rule.read(problem, x0))
    types = enumerate(map(jnp.result_type, leaves))
    smooth = tuple(i for i, dtype in types if jnp.issubdtype(dtype, jnp.inexact))
    found, step = rule.compiled_verdict(tree, smooth, leaves, x, x0, captured)
    if isinstance(found.good, _compat.Tracer):
        message = (
            f"{rule.name}.diagnose: it returns Python numbers, which are not known inside"
            ' jit, vmap or grad. on_failure="warn" reports failures there.'
        )
        raise TypeError(message)
    limits = limits_of(Coordinates(x), rule.tol)
    given = (rule, found, limits, x, x0, options, (tree, leaves))
    refused = None if found.good else error(*given)
    return Diagnosis(bool(found.good), refused, known_figures(found.figures), limits, x, step)
