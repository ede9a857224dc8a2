"""scipy itself, or what to install; and what its signatures take that has no place here."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freevars._names.callables import plain_name
from freevars._solvers import scipy_calls
from freevars._solvers.scipy_results import solver_said
from freevars.jax import _compat
from freevars.jax._closure import Closure
from freevars.jax._host.on_host import on_host
from freevars.jax._solver.unknown import as_unknown
from freevars.jax.scipy._result import as_arrays

try:
    from scipy import optimize

    from freevars._solvers import scipy_runs as runs
except ImportError as error:  # pragma: no cover (tested in a process of its own)
    message = "freevars.jax.scipy needs scipy: pip install 'freevars[scipy]'"
    raise ImportError(message) from error

__all__ = [
    "as_start",
    "converted",
    "on_host_as",
    "optimize",
    "refuse_derivatives",
    "runs",
    "tracing",
    "value_at",
]

# What JAX says where code asks for the numbers of a traced array.
_ASKS_FOR_NUMBERS = (
    jax.errors.ConcretizationTypeError,  # float(x), math.exp(x), `if x > 0`
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,  # np.exp(x)
    jax.errors.TracerIntegerConversionError,
)


def on_host_as(run: Callable[..., Any]) -> Any:
    """A function of `scipy_runs` as a solver on the host, with what scipy said as aux."""

    @functools.wraps(run)
    def solver(*args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        x, said = run(*args, **options)
        return x, as_arrays(said)

    return on_host(solver, aux=as_arrays(solver_said()))


def refuse_derivatives(name: str, /, **given: Any) -> None:
    """As `scipy_calls.refuse_derivatives`."""
    scipy_calls.refuse_derivatives(name, "JAX", "jax.custom_jvp", **given)


def as_start(x0: Any) -> Any:
    """x0 as scipy takes it: integers are floats, and a list or tuple of numbers is an array."""
    if type(x0) in (list, tuple) and all(_compat.is_array(x) and np.shape(x) == () for x in x0):
        return _floating(jnp.array(x0))
    return jax.tree.map(_floating, x0)


def _floating(x: Any) -> Any:
    if not _compat.is_array(x) or jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return x
    return jnp.asarray(x, jnp.result_type(float, x))


def converted(fun: Callable[..., Any], x0: Any, args: tuple[Any, ...], name: str) -> Any:
    """The function as a closure, so that it is traced once for the solver and for its value at x;
    one of more than x as it is."""
    return fun if args else Closure(fun, as_unknown(x0, name))


def value_at(fun: Callable[..., Any], x: Any, args: tuple[Any, ...]) -> Any:
    """The value at the solution of a function that may be `converted`, which is compiled then."""
    return _value(fun, x) if isinstance(fun, Closure) else fun(x, *args)


_value: Any = jax.jit(lambda closure, x: closure(x))


@contextlib.contextmanager
def tracing(name: str, fun: Any) -> Iterator[None]:
    """Say what to do about a function that cannot be traced.

    Raises:
        TypeError: it was written for numbers, in NumPy say.
    """
    try:
        yield
    except _ASKS_FOR_NUMBERS as error:
        code = getattr(fun, "__code__", None)
        where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        said = str(error).partition("\n")[0].rstrip(".")
        message = (
            f"{name}: expected a function in JAX, got {plain_name(fun)}{where}, which asks for the"
            f" numbers of a traced array ({said}). Write it, what it calls and the constraints with"
            " jax.numpy: jnp.exp(x) for np.exp(x) or math.exp(x), jnp.where or jax.lax.cond for an"
            " `if` on a value. A function that has to stay in NumPy goes through"
            " jax.pure_callback, with a derivative by jax.custom_jvp."
        )
        raise TypeError(message) from error
