"""User code of the JAX host, for type checkers: what is decorated keeps its parameters and result.

Nothing here runs. A line with `type: ignore` is a mistake that has to be reported: where it is not,
the comment is unused, which is an error too.
"""

from collections.abc import Callable
from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

import freevars.jax as fv
from freevars.report import CaptureReport

Function = Callable[[Array], Array]


@fv.root
def newton(fun: Function, x0: Array, steps: int = 20) -> Array:
    for _ in range(steps):
        x0 = x0 - fun(x0) / jax.grad(fun)(x0)
    return x0


@fv.argmin(has_aux=True, on_failure="nan")
def minimize(objective: Function, start: Array, *, rate: float) -> tuple[Array, int]:
    return start - rate * jax.grad(objective)(start), 1


one = jnp.ones(())
assert_type(newton(lambda x: x**2, one), Array)
assert_type(newton(fun=lambda x: x**2, x0=one, steps=3), Array)
assert_type(minimize(lambda x: x**2, start=one, rate=0.1), tuple[Array, int])
assert_type(newton.__wrapped__(lambda x: x**2, one), Array)
solver: fv.ImplicitSolver[..., Array] = newton

newton(lambda x: x**2, one, steps="many")  # type: ignore[arg-type]
newton(lambda x: x**2, one, nonsense=3)  # type: ignore[call-arg]
newton(lambda x: x**2)  # type: ignore[call-arg]
text: str = newton(lambda x: x**2, one)  # type: ignore[assignment]
minimize(lambda x: x**2, one)  # type: ignore[call-arg]
fv.root(newton.__wrapped__, linear_slve=None)  # type: ignore[call-overload]
fv.fixed_point(on_failure="ignore")  # type: ignore[call-overload]


class Solver:
    """Methods are bound, in a class body and once they are bound."""

    def __init__(self) -> None:
        self.held = fv.root(self.run)

    def run(self, fun: Function, x0: Array) -> Array:
        return x0 - fun(x0)

    @fv.root
    def solve(self, fun: Function, x0: Array, steps: int = 3) -> Array:
        return x0 - fun(x0)

    @fv.fixed_point
    @fv.on_host
    def on_host(self, fun: fv.HostFunction, x0: Array, steps: int = 3) -> Array:
        return jnp.asarray(fun(x0))


thing = Solver()
assert_type(thing.solve(lambda x: x, one, steps=2), Array)
assert_type(thing.held(lambda x: x, x0=one), Array)
assert_type(thing.on_host(lambda x: x, one, steps=2), Array)
assert_type(Solver.solve(thing, lambda x: x, one), Array)
thing.solve(lambda x: x, one, steps="2")  # type: ignore[arg-type]
thing.solve(thing, lambda x: x, one)  # type: ignore[arg-type]
thing.on_host(lambda x: x, one, stepps=2)  # type: ignore[call-arg]


@fv.argmin
@fv.on_host
def host(fun: fv.HostFunction, x0: NDArray[np.float64], tol: float = 1e-6) -> NDArray[np.float64]:
    gradient: NDArray[np.float64] = fun.grad(x0)
    return gradient - x0


@fv.on_host(flat=False, vmap="whole")
def alone(fun: fv.HostFunction, x0: Array) -> Array:
    return x0


array = np.ones(3)
assert_type(host(lambda x: x**2, array, tol=1e-3), NDArray[np.float64])
assert_type(alone(jnp.sum, one), Array)
bare: fv.HostSolver[..., Array] = alone
host(lambda x: x**2, array, tol="small")  # type: ignore[arg-type]
alone(jnp.sum, one, 3)  # type: ignore[call-arg]
fv.on_host(flt=False)  # type: ignore[call-overload]


def model(x: Array, n: int) -> tuple[Array, int]:
    return x, n


closure = fv.Closure(model, one, 2)
assert_type(closure(one, 3), tuple[Array, int])
closure("not an array", 2)  # type: ignore[arg-type]
closure(one)  # type: ignore[call-arg]
closure(one, 2, 3)  # type: ignore[call-arg]

converted, hoisted = fv.closure_convert(model, one, 2, hoist="differentiable")
assert_type(converted(one, 2, *hoisted), tuple[Array, int])
assert_type(converted.__wrapped__(one, 2), tuple[Array, int])
pair: fv.Converted[[Array, int], tuple[Array, int]] = converted
fv.closure_convert(model, one, 2, hoist=lambda value: value is one)
fv.closure_convert(model, one, 2, hoist="some")  # type: ignore[arg-type]
assert_type(fv.captures(model, one, 2), CaptureReport)
assert_type(closure.captures, CaptureReport)
