"""`scipy.optimize.root_scalar`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freevars._solvers.scipy_calls import as_tuple
from freevars._solvers.scipy_results import root_said
from freevars._solvers.verdict import OnFailure
from freevars.errors import StructureError
from freevars.jax import _compat
from freevars.jax._host.on_host import on_host
from freevars.jax._rules.rules import implicit
from freevars.jax.scipy._result import RootResults, as_arrays
from freevars.jax.scipy._scipy import refuse_derivatives, runs, tracing

__all__ = ["root_scalar"]


def _run(
    fun: Any,
    x0: Any,
    args: tuple[Any, ...],
    *,
    method: Any,
    order: int,
    bracket: Any,
    starts: bool,
    x1: Any,
    xtol: Any,
    rtol: Any,
    maxiter: Any,
    options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Run scipy on the host."""
    del args
    root, said = runs.root_scalar(
        lambda x: fun(np.reshape(x, (1,))),
        order=order,
        method=method,
        bracket=bracket,
        x0=x0[0] if starts else None,
        x1=x1,
        xtol=xtol,
        rtol=rtol,
        maxiter=maxiter,
        options=options,
    )
    return np.reshape(root, (1,)), as_arrays(said)


_run.__name__ = "root_scalar"  # what errors call it


def _first(fun: Callable[..., Any], x: Any) -> Any:
    """What is zero: the value, the first of what `_with_derivatives` gives."""
    return fun(x)[0]


@functools.cache
def _solver(on_failure: OnFailure, polish: bool) -> Any:  # noqa: FBT001
    rule = implicit(_first, has_aux=True, on_failure=on_failure, polish=polish)
    return rule(on_host(_run, aux=as_arrays(root_said())))


def _with_derivatives(f: Callable[..., Any], order: int) -> Callable[..., Any]:
    """The value of f and its first derivatives, as one vector, which is one question."""

    def values(x: Any, *args: Any) -> Any:
        found: list[Any] = [lambda x: _as_number(f(x, *args))]
        for _ in range(order):
            slope: Any = jax.grad(found[-1])
            found.append(slope)
        return jnp.stack([g(x) for g in found])

    return values


def _as_number(value: Any) -> Any:
    if not _is_number(value):
        message = (
            f"root_scalar: expected a function that returns a real number of shape (), got {value}."
            " Several equations, or a complex one, are solved by root."
        )
        raise StructureError(message)
    return jnp.reshape(value, ())


def _is_number(value: Any) -> bool:
    is_one = _compat.is_array(value) and np.size(value) == 1
    return is_one and jnp.issubdtype(jnp.result_type(value), jnp.floating)


def root_scalar(
    f: Callable[..., Any],
    args: Any = (),
    method: Any = None,
    bracket: Any = None,
    fprime: Any = None,
    fprime2: Any = None,
    x0: Any = None,
    x1: Any = None,
    xtol: Any = None,
    rtol: Any = None,
    maxiter: Any = None,
    options: Any = None,
    *,
    on_failure: OnFailure = "raise",
    polish: bool = True,
) -> RootResults:
    """`scipy.optimize.root_scalar` of a function in JAX, differentiable by all it captures.

    "newton" and "halley" are given exact derivatives. Derivatives by the bracket and the starting
    points are zero: a root does not depend on where it was looked for.

    Args:
        f: `f(x, *args)`, in JAX, gives a real number for one of shape ().
        args: extra arguments of `f`.
        method: as in scipy; None: "brentq" with a bracket, "secant" with `x1`, else "newton".
        bracket: two numbers at which f has different signs. They may be traced.
        fprime: refused, because it is not needed: the function has exact derivatives.
        fprime2: refused, as `fprime`.
        x0: a number to start from; it may be traced, as `x1`.
        x1: a second one.
        xtol: as in scipy.
        rtol: as in scipy.
        maxiter: as in scipy.
        options: as in scipy.
        on_failure: as for `freevars.jax.root`.
        polish: as for `minimize`.

    Returns:
        `root`, and what scipy said (`RootResults`).

    Raises:
        TypeError: `f` cannot be traced by JAX or gives no real number, a derivative is given, or
            x0, x1 or a side of the bracket is not one number: many roots at once are `jax.vmap` of
            this.
        freevars.errors.FreevarsError: as for `freevars.jax.root`.
        Exception: whatever scipy raises, as for `freevars.jax.on_host`.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax.scipy
        >>> def kepler(eccentricity, mean):  # E = M + e sin E
        ...     f = lambda angle: angle - eccentricity * jnp.sin(angle) - mean
        ...     return freevars.jax.scipy.root_scalar(f, bracket=(mean - 1, mean + 1)).root
        >>> print(f"{jax.grad(kepler)(0.1, 1.0):.4f}")  # sin E / (1 - e cos E)
        0.9291
    """
    name = "root_scalar"
    refuse_derivatives(name, fprime=fprime, fprime2=fprime2)
    method, order = runs.scalar_method(method, bracket, x0, x1)
    numbers: list[Any] = [x0, x1, *(bracket if bracket is not None else ())]
    _check_numbers([a for a in numbers if a is not None], name)
    dtype = jnp.result_type(float, *(a for a in numbers if a is not None))
    x0, x1, *ends = (None if a is None else jnp.asarray(a, dtype) for a in numbers)
    args = as_tuple(args)
    with tracing(name, f):
        x, status = _solver(on_failure, polish)(
            _with_derivatives(f, order),
            ends[0] if x0 is None else x0,
            args,
            method=method,
            order=order,
            bracket=tuple(ends[:2]) if ends else None,
            starts=x0 is not None,
            x1=x1,
            xtol=xtol,
            rtol=rtol,
            maxiter=maxiter,
            options=options,
        )
    return RootResults(x, **status)


def _check_numbers(numbers: list[Any], name: str) -> None:
    for a in numbers:
        if not _compat.is_array(a) or np.shape(a) != () or jnp.iscomplexobj(a):
            message = (
                f"{name}: expected real numbers of shape () for x0, x1 and the bracket, got {a!r}."
                " Many roots at once are jax.vmap of this; a complex one is found by root."
            )
            raise TypeError(message)
