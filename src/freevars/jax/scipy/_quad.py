"""`scipy.integrate.quad`, with derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from freevars._solvers.integration import OnDoubt
from freevars._solvers.scipy_calls import as_tuple, refuse_integrand, refuse_of_quad
from freevars.jax._host.on_host import on_host
from freevars.jax._rules.integrals import integral
from freevars.jax.scipy._scipy import runs, tracing

__all__ = ["quad"]


def _run(
    func: Any, a: Any, b: Any, args: tuple[Any, ...], *, points: Any, limits: Any, options: Any
) -> tuple[Any, Any]:
    """Run scipy on the host."""
    del args
    example = func(runs.inside(a, b))
    values, error = runs.quad(func, a, b, np.size(example), limit=limits, points=points, **options)
    return np.reshape(values, np.shape(example)), error


_run.__name__ = "quad"  # what errors call it


@functools.cache
def _solver(on_failure: OnDoubt, check: bool, tol: float | None) -> Any:  # noqa: FBT001
    rule = integral(has_aux=True, on_failure=on_failure, check=check, tol=tol)
    return rule(on_host(_run, aux=np.zeros(())))


def quad(
    func: Callable[..., Any],
    a: Any,
    b: Any,
    args: Any = (),
    full_output: Any = 0,
    epsabs: Any = 1.49e-8,
    epsrel: Any = 1.49e-8,
    limit: int = 50,
    points: Any = None,
    weight: Any = None,
    wvar: Any = None,
    wopts: Any = None,
    maxp1: Any = 50,
    limlst: Any = 50,
    complex_func: bool = False,  # noqa: FBT001, FBT002 (scipy's)
    *,
    on_failure: OnDoubt = "raise",
    check: bool = True,
    tol: float | None = None,
) -> tuple[Any, Any]:
    """`scipy.integrate.quad` of a function in JAX, differentiable by limits and captures.

    A backward pass integrates once for each number that is differentiated by, since scipy's method
    takes numbers alone; for many of them, `freevars.jax.integral` of a rule in JAX is faster.

    Args:
        func: `func(t, *args)`, in JAX, gives a number for one of shape ().
        a: a real number, which may be traced. An infinite one has derivative zero.
        b: as `a`.
        args: extra arguments of `func`.
        full_output: not supported, and refused.
        epsabs: as in scipy.
        epsrel: as in scipy.
        limit: as in scipy.
        points: as in scipy.
        weight: not supported, and refused. Write the weight into `func`.
        wvar: not supported, and refused.
        wopts: not supported, and refused.
        maxp1: not used without a weight.
        limlst: not used without a weight.
        complex_func: whether func gives complex numbers, as in scipy.
        on_failure: as for `freevars.jax.integral`; scipy's `epsabs` is absolute, and too large for
            a derivative that is small.
        check: as for `freevars.jax.integral`.
        tol: as for `freevars.jax.integral`.

    Returns:
        The integral, and scipy's estimate of its error, which has derivative zero.

    Raises:
        TypeError: `func` cannot be traced by JAX or gives no number, or see above.
        freevars.errors.FreevarsError: as for `freevars.jax.integral`.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax.scipy
        >>> def tail(rate, start):
        ...     density = lambda t: rate * jnp.exp(-rate * t)
        ...     return freevars.jax.scipy.quad(density, start, jnp.inf)[0]
        >>> slopes = jax.grad(tail, (0, 1))(2.0, 0.5)  # of exp(-rate start)
        >>> print([f"{s:.4f}" for s in slopes])
        ['-0.1839', '-0.7358']
    """
    del maxp1, limlst
    refuse_of_quad(full_output=full_output, weight=weight, wvar=wvar, wopts=wopts)

    def number(t: Any, *args: Any) -> Any:
        value = func(t, *args)
        kind = jax.numpy.result_type(value) if jax.tree.structure(value).num_leaves == 1 else None
        is_complex = kind is not None and jax.numpy.issubdtype(kind, jax.numpy.complexfloating)
        if kind is None or np.shape(value) != () or (is_complex and not complex_func):
            refuse_integrand(value, "freevars.jax", is_complex=is_complex)
        return value

    if points is not None:  # the integral does not depend on where it is cut
        points = jax.lax.stop_gradient(jax.numpy.array(points))
    options = {"epsabs": epsabs, "epsrel": epsrel}
    with tracing("quad", func):
        result: tuple[Any, Any] = _solver(on_failure, check, tol)(
            number, a, b, as_tuple(args), points=points, limits=limit, options=options
        )
    return result
