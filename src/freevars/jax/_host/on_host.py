"""`on_host`: lets a NumPy solver be the solver in JAX. Not here: how (`host_solver`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar, Unpack, overload

from freevars._solvers.options import check_options
from freevars.jax._host.host_solver import HostSolver, Options
from freevars.jax._host.oracle import HostFunction

__all__ = ["on_host"]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
# What a caller gives for the function that the solver sees as a `HostFunction`.
Function: TypeAlias = Callable[..., Any]


class HostDecorator(Protocol):
    """Lets a NumPy solver be the solver in JAX."""

    @overload
    def __call__(
        self, solver: Callable[Concatenate[HostFunction, P], R], /
    ) -> HostSolver[Concatenate[Function, P], R]: ...
    @overload
    def __call__(
        self, solver: Callable[Concatenate[S, HostFunction, P], R], /
    ) -> HostSolver[Concatenate[S, Function, P], R]: ...
    @overload
    def __call__(self, solver: Callable[P, R], /) -> HostSolver[P, R]: ...


# The function comes first, for a method second; a caller gives any function of JAX there.
@overload
def on_host(
    solver: Callable[Concatenate[HostFunction, P], R], /, **options: Unpack[Options]
) -> HostSolver[Concatenate[Function, P], R]: ...
@overload
def on_host(
    solver: Callable[Concatenate[S, HostFunction, P], R], /, **options: Unpack[Options]
) -> HostSolver[Concatenate[S, Function, P], R]: ...
@overload
def on_host(solver: Callable[P, R], /, **options: Unpack[Options]) -> HostSolver[P, R]: ...
@overload
def on_host(**options: Unpack[Options]) -> HostDecorator: ...
def on_host(solver: Callable[..., Any] | None = None, /, **options: Unpack[Options]) -> Any:
    """A JAX solver from a NumPy one: scipy's, or any that takes Python callbacks.

    The solver never sees a JAX value. Where all values are known, it is called directly. Inside
    `jit`, `vmap` or `scan` it runs in a thread of its own, and the compiled program evaluates `fun`
    for it; no JAX code runs inside a callback, and captured values stay on their device. Put
    `root`, `argmin` or `fixed_point` above it for derivatives.

    In a program over several devices or processes, one solver runs for one problem; every device
    takes part in evaluating `fun` and has the result, and a failure is an error on each of them.
    Inside `shard_map` that is one solver for each member along the axes over which the problem
    varies; with `check_vma=False`, along all axes over which the function does not reduce.

    Args:
        solver: `solver(fun, x0, **options)` gives x. `x0` and x are float64 vectors of shape (n,),
            and `fun` is a NumPy function of such a vector (`HostFunction`): for an objective
            `fun(v)`, `fun.value_and_grad(v)`, `fun.grad(v)`, `fun.hessian(v)` and `fun.hvp(v, d)`;
            for equations `fun(v)`, `fun.jacobian(v)` and `fun.hvp(v, d)`. Options that are arrays
            arrive as NumPy ones; of the constraints of `argmin`, `bounds` as a pair of vectors and
            the others as functions like equations.
        flat: False gives the solver pytrees of NumPy arrays, of the dtypes of `x0`, for vectors.
        aux: an example, a pytree of arrays or numbers, of what the solver returns beside x: it then
            returns `(x, aux)`, and aux has the types of the example.
        vmap: what a batch does. "sequential": one solve after the other. "whole": `solver` takes
            batches, and every vector, value and matrix has a leading axis over the batch, of size 1
            outside `vmap`.

    Raises:
        Exception: whatever the solver raises, with a note that names it; inside `jit`, where only
            JAX can raise, a `jax.errors.JaxRuntimeError` with the original's traceback as text.
        TypeError: the solver returns a vector of another shape, or another aux, than expected; a
            derivative is taken and no rule stands above; inside `shard_map`, devices share one
            problem and each has a part of x, or a value of its own.

    Example:
        >>> import jax, jax.numpy as jnp, scipy.optimize, freevars.jax as fv
        >>> @fv.argmin
        ... @fv.on_host
        ... def minimize(fun, x0):
        ...     return scipy.optimize.minimize(fun.value_and_grad, x0, jac=True, method="BFGS").x
        >>> def nearest(a):
        ...     return minimize(lambda x: jnp.sum((x - a) ** 4 + (x - a) ** 2), jnp.zeros(2)).sum()
        >>> print(f"{jax.jit(jax.grad(nearest))(3.0):.3f}")
        2.000
    """
    check_options("on_host", options, Options)

    def decorate(solver: Callable[P, R], /) -> HostSolver[P, R]:
        return HostSolver(solver, **options)

    return decorate if solver is None else decorate(solver)
