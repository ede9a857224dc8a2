"""What scipy's solvers take, and what a caller need not give them; the same in both hosts.

Not here: scipy itself, which only `freevars.jax.scipy` and `freevars.torch.scipy` need.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from numbers import Number
from typing import Any

__all__ = [
    "HESSIAN",
    "IMPLICIT",
    "JACOBIAN",
    "NO_GRADIENT",
    "ORDERS",
    "PRODUCTS",
    "as_tuple",
    "check_pair",
    "check_span",
    "is_open",
    "ivp_options",
    "pairs_of",
    "refuse_derivatives",
    "refuse_loss",
    "refuse_of_quad",
]

# What a method of `minimize` takes beside the value. To any other scipy says that it has no use.
NO_GRADIENT = {"nelder-mead", "powell", "cobyla", "cobyqa"}
HESSIAN = {"dogleg", "trust-exact", "trust-constr"}
PRODUCTS = {"newton-cg", "trust-ncg", "trust-krylov"}

JACOBIAN = {"hybr", "lm"}  # methods of `root` that take one

ORDERS = {"newton": 1, "halley": 2}  # how many derivatives a method of `root_scalar` takes

IMPLICIT = {"Radau", "BDF", "LSODA"}  # methods of `solve_ivp` that take a Jacobian
_OPTIONS = {"first_step", "max_step", "min_step", "rtol", "atol"}  # of `solve_ivp`
_TOLERANCES = {"rtol": 1e-6, "atol": 1e-9}  # where none are given
_SINGLE = {"rtol": 1e-4, "atol": 1e-7}  # in float32


def as_tuple(args: Any) -> tuple[Any, ...]:
    """Extra arguments as scipy takes them: a tuple, or the only one."""
    return args if isinstance(args, tuple) else (args,)


def refuse_derivatives(name: str, host: str, own_rule: str, **given: Any) -> None:
    """Refuse derivatives that a caller brings: they are taken from the function.

    Raises:
        TypeError: one of them is neither None nor False.
    """
    for what, value in given.items():
        if value is not None and value is not False:
            message = (
                f"{name}: {what}= is not needed, got {value!r}. The function is {host} code, and"
                " the solver is given its exact derivatives. Leave it out, and let the function"
                f" return its value alone; {own_rule} gives a function a derivative of your own."
            )
            raise TypeError(message)


def refuse_loss(name: str, loss: Any) -> None:
    """Refuse a loss of `least_squares` that is another objective.

    Raises:
        TypeError: it is not "linear".
    """
    if loss != "linear":
        message = (
            f"{name}: loss: expected 'linear', got {loss!r}. Another loss is another objective:"
            " write it out and give it to minimize."
        )
        raise TypeError(message)


def is_open(bounds: Any) -> bool:
    """Whether bounds of `least_squares` are scipy's default, which are none."""
    if not (isinstance(bounds, tuple) and all(isinstance(side, float) for side in bounds)):
        return False
    return bounds == (-inf, inf)


def refuse_of_quad(**given: Any) -> None:
    """Refuse arguments of `quad` that have no place.

    Raises:
        TypeError: one of them is neither None nor zero.
    """
    for name, value in given.items():
        if value is not None and value != 0:
            advice = (
                "leave it out" if name == "full_output" else "write the weight into the function"
            )
            message = f"quad: {name}= has no place here, got {value!r}: {advice}."
            raise TypeError(message)


def check_pair(name: str, end: str, matrix: Any, vector: Any) -> None:
    """Refuse a matrix of `linprog` without its vector.

    Raises:
        TypeError: one of them is None.
    """
    if (matrix is None) != (vector is None):
        message = f"{name}: expected both A_{end} and b_{end}, or neither of them."
        raise TypeError(message)


def pairs_of(bounds: Any, n: int) -> list[tuple[Any, Any]]:
    """A pair (min, max) for each of n unknowns of `linprog`, which takes one pair for all too."""
    if bounds is None:
        bounds = (0, None)
    if len(bounds) == 2 and all(map(_is_number, bounds)):  # noqa: PLR2004
        return [tuple(bounds)] * n
    return [tuple(pair) for pair in bounds]


def _is_number(side: Any) -> bool:
    return side is None or isinstance(side, Number) or getattr(side, "ndim", None) == 0


def ivp_options(
    t_eval: Any, of_call: dict[str, Any], options: dict[str, Any], *, single: bool, times: str
) -> dict[str, Any]:
    """The options that the solver of `solve_ivp` is given; `times` says what t_eval may be.

    Raises:
        TypeError: one has no place, or `t_eval` is missing.
    """
    others = {name: value for name, value in options.items() if name not in _OPTIONS}
    for name, value in (of_call | others).items():
        if value is not None and value is not False:
            message = f"solve_ivp: {name}= has no place here, got {value!r}. Leave it out."
            raise TypeError(message)
    if t_eval is None:
        message = (
            "solve_ivp: t_eval: expected the times at which y is returned, got None: how many steps"
            f" the solver takes is not known beforehand. t_eval={times} gives the ends."
        )
        raise TypeError(message)
    given = {name: value for name, value in options.items() if name in _OPTIONS}
    return (_SINGLE if single else _TOLERANCES) | given


def check_span(span: Sequence[float], times: Sequence[float]) -> None:
    """Refuse times outside of `t_span`.

    Raises:
        ValueError: some are.
    """
    low, high = sorted(span)
    slack = 1e-6 * max(abs(low), abs(high))  # an end that was rounded to float32 is still the end
    if times and (min(times) < low - slack or max(times) > high + slack):
        message = (
            f"solve_ivp: t_eval: expected times in t_span, from {low} to {high}, got times from"
            f" {min(times)} to {max(times)}."
        )
        raise ValueError(message)
