"""`captures`: what a function captures, by name. Not here: making the report (`_report.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from freevars._contract import Hoist
from freevars.report import CaptureReport
from freevars.torch._closure import Closure
from freevars.torch._convert.convert import Rng
from freevars.torch._report import report_of_function

__all__ = ["captures"]


def captures(
    fun: Callable[..., Any],
    *example_args: Any,
    hoist: Hoist = "differentiable",
    rng: Rng = "allow",
) -> CaptureReport:
    """Every tensor that `fun` reads from outside its arguments: its name, its type, who reads it.

    Nothing is converted and nothing is kept. It may be called anywhere, inside a torch.func
    transform too, where it shows which of them traces each tensor.

    Args:
        fun: any callable. It runs once, on the example. For a `Closure`, its
            `Closure.captures`.
        *example_args: as for `closure_convert`.
        hoist: the policy that the report is about, as for `closure_convert`. Tensors that it does
            not hoist are listed too.
        rng: as for `closure_convert`.

    Returns:
        A `freevars.report.CaptureReport`, with the tensors in order of first use; it prints as a
        table and shows as HTML in a notebook.

    Raises:
        freevars.errors.CaptureError: `fun` writes in place to a captured tensor, to its argument or
            to a running statistic, calls `.backward()`, draws random numbers under `rng="error"`,
            uses a higher-order operator, or hides a captured tensor in what it returns.
        TypeError: `fun` is not callable.
        ValueError: `hoist` or `rng` is none of those of `closure_convert`.

    Example:
        >>> import torch, freevars.torch as fv
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())
        >>> report = fv.captures(lambda x: net(x).sum(), torch.ones(3))
        >>> [value.name for value in report.values]
        ['net[0].weight', 'net[0].bias']
    """
    if isinstance(fun, Closure):
        return fun.captures
    return report_of_function(fun, example_args, hoist, rng)
