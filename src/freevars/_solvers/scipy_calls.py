"""The arguments of scipy's solvers: which are needed, which are refused; the same in both hosts.

Not here: scipy itself, which only `freevars.jax.scipy` and `freevars.torch.scipy` need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from numbers import Number
from typing import Any, NoReturn

__all__ = [
    "HESSIAN",
    "IMPLICIT",
    "JACOBIAN",
    "NO_GRADIENT",
    "PRODUCTS",
    "are_pairs",
    "as_tuple",
    "check_constraint",
    "check_objective",
    "check_pair",
    "check_span",
    "check_times",
    "dense",
    "ends",
    "is_open",
    "ivp_options",
    "listed",
    "pairs_of",
    "refuse_derivatives",
    "refuse_integrand",
    "refuse_loss",
    "refuse_of_linprog",
    "refuse_of_quad",
]

# What a method of `minimize` takes besides the value; scipy warns of anything else.
NO_GRADIENT = {"nelder-mead", "powell", "cobyla", "cobyqa"}
HESSIAN = {"dogleg", "trust-exact", "trust-constr"}
PRODUCTS = {"newton-cg", "trust-ncg", "trust-krylov"}

JACOBIAN = {"hybr", "lm"}  # methods of `root` that take one

IMPLICIT = {"Radau", "BDF", "LSODA"}  # methods of `solve_ivp` that take a Jacobian
_OPTIONS = {"first_step", "max_step", "min_step", "rtol", "atol"}  # of `solve_ivp`
_TOLERANCES = {"rtol": 1e-6, "atol": 1e-9}  # where none are given
_SINGLE = {"rtol": 1e-4, "atol": 1e-7}  # in float32


def as_tuple(args: Any) -> tuple[Any, ...]:
    """Extra arguments as scipy takes them: a tuple, or the only one."""
    return args if isinstance(args, tuple) else (args,)


def refuse_derivatives(name: str, host: str, own_rule: str, **given: Any) -> None:
    """Refuse derivatives from the caller: they are derived from the function.

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


def check_objective(value: Any, total: str) -> None:
    """Refuse a value that is not an objective of `minimize`; `total` is how a host writes a sum.

    Raises:
        TypeError: it is not one number.
    """
    if isinstance(value, tuple):
        message = (
            "minimize: expected a function that returns a number, got a tuple from it. The gradient"
            " beside the value (scipy's jac=True) is not needed: return the value alone."
        )
        raise TypeError(message)
    shape = _shape(value)
    if shape != () and not isinstance(value, Number):
        got = type(value).__name__ if shape is None else f"shape {shape}"
        message = (
            f"minimize: expected a function that returns a number of shape (), got {got}. Let it"
            f" end in {total}, say; a root or a sum of squares of several is found by root or"
            " least_squares."
        )
        raise TypeError(message)
    dtype = str(getattr(value, "dtype", "float"))
    if "float" not in dtype:
        advice = "its real part, or |z|^2" if "complex" in dtype else "it as a floating number"
        message = (
            f"minimize: expected a function that returns a real floating number, got {dtype}."
            f" Return {advice}."
        )
        raise TypeError(message)


def are_pairs(bounds: Any, n: int, name: str, x0: Any = None) -> bool:
    """Whether bounds are scipy's sequence of a pair for each of n unknowns, or two sides, each like
    x0.

    Raises:
        TypeError: they are neither, or may be both.
    """
    if _shape(bounds) == (n, 2):
        return True
    if isinstance(bounds, (tuple, list)):
        pairs = len(bounds) == n and all(
            isinstance(b, (tuple, list)) and len(b) == 2  # noqa: PLR2004
            for b in bounds
        )
        alike = isinstance(x0, (tuple, list)) and all(type(b) is type(x0) for b in bounds)
        if pairs and not (n == 2 and alike):  # noqa: PLR2004
            return True
        rows = len(bounds) == n and all(_shape(b) == (2,) for b in bounds)
        if (rows or pairs) and n == 2:  # noqa: PLR2004
            tuples = "" if pairs else ", or a list of tuples (min, max)"
            message = (
                f"{name}: bounds: {bounds!r} is two sides of two numbers, or two pairs (min, max):"
                f" expected scipy.optimize.Bounds(lower, upper){tuples}."
            )
            raise TypeError(message)
        if rows or len(bounds) == 2:  # noqa: PLR2004
            return rows
    message = (
        f"{name}: bounds: expected scipy.optimize.Bounds, a pair (lower, upper), or a pair"
        f" (min, max) for each of {n} unknowns, got {bounds!r}."
    )
    raise TypeError(message)


def listed(bounds: Any) -> Any:
    """Bounds, as a list where they are an iterator, `zip(lower, upper)` say."""
    return list(bounds) if isinstance(bounds, Iterator) else bounds


def check_constraint(where: str, constraint: Mapping[str, Any]) -> None:
    """Refuse a dict that is no constraint of `minimize`.

    Raises:
        ValueError: its type is missing, or another one than scipy knows.
        TypeError: its function is missing.
    """
    kind = constraint.get("type")
    if str(kind).lower() not in ("eq", "ineq"):
        message = f"{where}: expected type 'eq' or 'ineq', got {kind!r}."
        raise ValueError(message)
    if not callable(constraint.get("fun")):
        message = f"{where}: fun: expected a function of x, got {constraint.get('fun')!r}."
        raise TypeError(message)


def _shape(a: Any) -> tuple[int, ...] | None:
    """Of an array or tensor; None of anything else."""
    shape = getattr(a, "shape", None)
    return None if shape is None else tuple(shape)


def is_open(bounds: Any) -> bool:
    """Whether bounds of `least_squares` are scipy's default, which are none."""
    if not (isinstance(bounds, tuple) and all(isinstance(side, float) for side in bounds)):
        return False
    return bounds == (-inf, inf)


def refuse_of_quad(**given: Any) -> None:
    """Refuse arguments of `quad` that are not supported.

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


def refuse_integrand(value: Any, host: str, *, is_complex: bool) -> NoReturn:
    """Refuse a value of the function of `quad` that is not a number.

    Raises:
        TypeError: always.
    """
    what = "a complex number takes complex_func=True; " if is_complex else ""
    message = (
        f"quad: expected a function that returns a number of shape (), got {value!r}."
        f" {what}{host}.integral takes a solver that integrates more than one."
    )
    raise TypeError(message)


def check_pair(name: str, end: str, matrix: Any, vector: Any) -> None:
    """Refuse a matrix of `linprog` without its vector.

    Raises:
        TypeError: one of them is None.
    """
    if (matrix is None) != (vector is None):
        message = f"{name}: expected both A_{end} and b_{end}, or neither of them."
        raise TypeError(message)


def refuse_of_linprog(*, integrality: Any, **given: Any) -> None:
    """Refuse arguments of `linprog` that are not supported.

    Raises:
        TypeError: one of them is not None, or some x is to be a whole number.
    """
    for name, value in given.items():
        if value is not None:
            message = f"linprog: {name}= has no place here, got {value!r}: leave it out."
            raise TypeError(message)
    if integrality is not None and any(_entries(integrality)):
        message = (
            f"linprog: integrality: expected None, got {integrality!r}. A whole number has no"
            " derivative. Find it by scipy.optimize.milp, and fix it here by its bounds."
        )
        raise TypeError(message)


def _entries(a: Any) -> list[Any]:
    return list(a) if _shape(a) != () and not isinstance(a, Number) else [a]


def dense(matrix: Any) -> Any:
    """A matrix of scipy.sparse as an array, everything else as it is."""
    return matrix.toarray() if hasattr(matrix, "toarray") else matrix


def pairs_of(bounds: Any, n: int) -> Any:
    """A pair (min, max) for each of n unknowns of `linprog`, which takes one pair for all too;
    scipy's `Bounds` as they are."""
    if bounds is None:
        bounds = (0, None)
    if hasattr(bounds, "lb"):
        return bounds
    bounds = listed(bounds)
    if len(bounds) == 1:
        (bounds,) = bounds
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


def check_times(shape: tuple[int, ...]) -> None:
    """Refuse a `t_eval` that is no vector.

    Raises:
        TypeError: it has another shape.
    """
    if len(shape) != 1:
        message = (
            "solve_ivp: t_eval: expected the times at which y is returned as one vector, of shape"
            f" (n,), got shape {tuple(shape)}."
        )
        raise TypeError(message)


def ends(t_span: Any) -> tuple[Any, Any]:
    """The two times of `t_span`.

    Raises:
        TypeError: there are not two.
    """
    try:
        first, last = t_span
    except (TypeError, ValueError):
        message = (
            f"solve_ivp: t_span: expected a pair, the first and the last time, got {t_span}. The"
            " times at which y is returned are t_eval."
        )
        raise TypeError(message) from None
    return first, last


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
