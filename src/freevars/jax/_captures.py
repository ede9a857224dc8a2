"""`captures`: what a function captures, by name. Not here: how the report is made (`_report`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from freevars._contract import Hoist
from freevars.jax._closure import Closure
from freevars.jax._convert.hoist import policy_of
from freevars.jax._report.build import report_of_function
from freevars.report import CaptureReport

__all__ = ["captures"]


def captures(fun: Callable[..., Any], *example_args: Any, hoist: Hoist = "traced") -> CaptureReport:
    """Every value that `fun` reads from outside its arguments: its name, its type, who reads it.

    Nothing is converted and nothing is kept. It may be called anywhere, inside `grad`, `vmap`,
    `jit` or `scan` too, where it shows which of them traces each value.

    Args:
        fun: any callable, pure. It runs once, on tracers. For a `Closure`, its `Closure.captures`.
        *example_args: as for `closure_convert`.
        hoist: the policy that the report is about, as for `closure_convert`.

    Returns:
        A `freevars.report.CaptureReport`, with the values in order of first use; it prints as a
        table and shows as HTML in a notebook.

    Raises:
        TypeError: `fun` is not callable.
        ValueError: `hoist` is none of those of `closure_convert`.

    Example:
        >>> import jax.numpy as jnp, freevars.jax as fv
        >>> params = {"w": jnp.ones(3), "b": jnp.zeros(())}
        >>> report = fv.captures(lambda x: params["w"] @ x + params["b"], jnp.ones(3))
        >>> [value.name for value in report.values]
        ["params['w']", "params['b']"]
    """
    policy_of(hoist)  # refuses what is none
    if isinstance(fun, Closure):
        return fun.captures
    return report_of_function(fun, example_args, hoist)
