"""Implicit rules at every scale: many small systems, one large one, one on many devices.

``python -m benchmarks.scale NAME`` prints the memory, in MB, of a compiled gradient by an unknown
that lies on eight devices.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import freevars.jax as fv
from benchmarks import _rules_of_peers as peers
from benchmarks._table import Row, seconds
from benchmarks._timing import alternate

TITLE = "rules at scale: derivatives by root, argmin and fixed_point, against rules written by hand"

CHECKS = {"freevars": True, "freevars, check=False": False}


def ready(f: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(f(*args))


def row(
    case: str, target: float, sides: dict[str, Callable[..., Any]], *args: Any, **options: Any
) -> Row:
    """The figure of the second side against the first; the others for comparison."""
    reference = jax.tree.leaves(next(iter(sides.values()))(*args))
    for name, side in sides.items():
        for got, want in zip(jax.tree.leaves(side(*args)), reference, strict=True):
            np.testing.assert_allclose(
                got, want, rtol=1e-2, atol=1e-3 * np.max(np.abs(want)), err_msg=name
            )
    timing = alternate(*(ready(side, *args) for side in sides.values()), **options)
    rest = tuple(zip(list(sides)[2:], timing.ratios[2:], strict=True))
    return Row(case, timing.ratios[1], target, *map(seconds, timing.seconds[:2]), rest)


# --- Many small systems ---------------------------------------------------------------------------


def bisect(fun: Any, x0: Array, steps: int = 50) -> Array:
    def halve(_: Any, ends: Any) -> Any:
        low, high = ends
        middle = (low + high) / 2
        below = fun(middle) < 0
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, steps, halve, (0 * x0, 0 * x0 + 10))
    return (low + high) / 2


def scalar_roots() -> Row:
    equation = lambda a: lambda x: x * jnp.exp(x) - a  # noqa: E731

    @jax.custom_jvp
    def by_hand(a: Array) -> Array:
        return bisect(equation(a), jnp.ones_like(a))

    @by_hand.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        x = by_hand(*primals)
        return x, tangents[0] / jax.grad(equation(*primals))(x)

    sides: dict[str, Any] = {"by hand": by_hand}
    for name, check in CHECKS.items():
        solve = fv.root(bisect, check=check)
        sides[name] = lambda a, solve=solve: solve(equation(a), jnp.ones_like(a))
    bounds = {"lower": 0.0, "upper": 10.0}
    bisection = lambda ox: (ox.Bisection(rtol=1e-9, atol=1e-9), bounds)  # noqa: E731
    sides |= peers.dense_roots(bisect, lambda x, a: equation(a)(x), jnp.float64(1.0), bisection)
    compiled = {n: jax.jit(jax.vmap(jax.value_and_grad(f))) for n, f in sides.items()}
    return row(
        "10,000 roots of one unknown, jit(vmap)", 1.3, compiled, jnp.linspace(0.1, 100.0, 10_000)
    )


def small_systems(n: int = 5, count: int = 256) -> Row:
    m = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (n, n)) + 3 * np.eye(n))
    equation = lambda b: lambda x: m @ x + x**3 - b  # noqa: E731

    def newton(fun: Any, x0: Array) -> Array:
        step = lambda _, x: x - jnp.linalg.solve(jax.jacfwd(fun)(x), fun(x))  # noqa: E731
        return jax.lax.fori_loop(0, 8, step, x0)

    @jax.custom_vjp
    def by_hand(b: Array) -> Array:
        return newton(equation(b), jnp.zeros(n))

    by_hand.defvjp(
        lambda b: (x := by_hand(b), (x, b)),
        lambda saved, g: (jnp.linalg.solve(jax.jacfwd(equation(saved[1]))(saved[0]).T, g),),
    )
    sides: dict[str, Any] = {"by hand": by_hand}
    for name, check in CHECKS.items():
        solve = fv.root(newton, check=check)
        sides[name] = lambda b, solve=solve: solve(equation(b), jnp.zeros(n))
    by_newton = lambda ox: (ox.Newton(rtol=1e-9, atol=1e-9), None)  # noqa: E731
    sides |= peers.dense_roots(newton, lambda x, b: equation(b)(x), jnp.zeros(n), by_newton)
    compiled = {
        name: jax.jit(jax.vmap(jax.grad(lambda b, f=f: jnp.sum(f(b) ** 2))))
        for name, f in sides.items()
    }
    b = jnp.asarray(np.random.default_rng(1).normal(size=(count, n)))
    return row(f"{count} systems of {n} unknowns, jit(vmap)", 1.3, compiled, b)


# --- One system -----------------------------------------------------------------------------------


def deep_equilibrium(batch: int = 96, width: int = 64) -> Row:
    """A training step of a layer that is the fixed point of another, its batch as one unknown."""
    keys = jax.random.split(jax.random.key(0), 3)
    weights = {
        "w": 0.6 * jax.random.normal(keys[0], (width, width)) / (2 * width**0.5),
        "u": jax.random.normal(keys[1], (width, width)) / width**0.5,
    }
    inputs = jax.random.normal(keys[2], (batch, width))
    start = jnp.zeros((batch, width))
    layer = lambda weights: lambda z: jnp.tanh(z @ weights["w"] + inputs @ weights["u"])  # noqa: E731

    def iterate(fun: Any, z: Any, tol: float = 1e-6, steps: int = 100) -> Any:
        def goes_on(state: Any) -> Any:
            now, last, k = state
            return (jnp.linalg.norm(now - last) > tol * jnp.linalg.norm(now)) & (k < steps)

        step = lambda state: (fun(state[0]), state[0], state[2] + 1)  # noqa: E731
        return jax.lax.while_loop(goes_on, step, (fun(z), z, 1))[0]

    @jax.custom_vjp
    def by_hand(weights: Any) -> Array:
        return iterate(layer(weights), start)

    def backward(saved: Any, g: Array) -> Any:
        weights, z = saved
        _, by_z = jax.vjp(layer(weights), z)
        u = iterate(lambda u: g + by_z(u)[0], g, 1e-5)
        return jax.vjp(lambda weights: layer(weights)(z), weights)[1](u)

    by_hand.defvjp(lambda weights: (z := by_hand(weights), (weights, z)), backward)
    sides: dict[str, Any] = {"by hand": by_hand}
    for name, check in CHECKS.items():
        solve = fv.fixed_point(iterate, check=check)
        sides[name] = lambda weights, solve=solve: solve(layer(weights), start)
    sides |= peers.fixed_points(iterate, lambda z, weights: layer(weights)(z), start)
    compiled = {
        name: jax.jit(jax.grad(lambda weights, f=f: jnp.mean(f(weights) ** 2)))
        for name, f in sides.items()
    }
    case = f"a training step of a deep equilibrium layer, {batch * width:,} unknowns"
    return row(case, 2.0, compiled, weights)


def cost_of_the_check() -> Iterator[Row]:
    """Derivatives with the check against the same without it."""
    for n, target, how in ((64, 1.25, "written out"), (2000, 1.5, "matrix-free")):
        d = jnp.linspace(1.0, 10.0, n)

        def objective(x: Array, t: Array, d: Array = d) -> Array:
            return jnp.sum(d * x**2) / 2 + jnp.sum(x[1:] * x[:-1]) / 2 + x[0] ** 4 - t * jnp.sum(x)

        def newton(fun: Any, x0: Array) -> Array:
            def step(_: Any, x: Array) -> Array:
                hvp = lambda v: jax.jvp(jax.grad(fun), (x,), (v,))[1]  # noqa: E731
                return x - jax.scipy.sparse.linalg.cg(hvp, jax.grad(fun)(x), tol=1e-6)[0]

            return jax.lax.fori_loop(0, 10, step, x0)

        x = jax.jit(lambda n=n, o=objective: newton(lambda x: o(x, 1.0), jnp.zeros(n)))()
        sides = {}
        for name, check in (("check=False", False), ("freevars", True)):
            # What the solver costs is left out.
            solve = fv.argmin(lambda _, x0, x: x + 0 * x0, check=check)
            sides[name] = jax.jit(
                jax.grad(
                    lambda t, solve=solve, o=objective, x=x: jnp.sum(
                        solve(lambda x: o(x, t), jnp.zeros_like(x), x) ** 2
                    )
                )
            )
        if how == "written out":
            sides["by hand, a step and a condition number"] = checked_by_hand(objective, x)
        yield row(f"the check of {n} unknowns, {how}, against check=False", target, sides, 1.0)


def checked_by_hand(objective: Callable[..., Array], x: Array) -> Callable[..., Array]:
    """The derivative at a minimum x, unless a Newton step is large there or the second derivative
    is singular, both in units of x."""
    n, eps = len(x), float(jnp.finfo(x.dtype).eps)

    @jax.custom_vjp
    def solve(t: Array) -> Array:
        return x + 0 * t

    def backward(t: Array, g: Array) -> tuple[Array]:
        slope = jax.grad(objective)
        units = jnp.maximum(jnp.abs(x), eps**0.5 * jnp.max(jnp.abs(x)))
        matrix = jax.jacfwd(slope)(x, t) * units
        rows = 1 / jnp.max(jnp.abs(matrix), axis=1)
        matrix = matrix * rows[:, None]
        factors = jax.scipy.linalg.lu_factor(matrix)
        sides = jnp.concatenate([(rows * slope(x, t))[:, None], jnp.eye(n)], axis=1)
        found = jax.scipy.linalg.lu_solve(factors, sides)
        rcond = 1 / (jnp.linalg.norm(matrix, 1) * jnp.linalg.norm(found[:, 1:], 1))
        good = (rcond > 10 * eps) & (jnp.max(jnp.abs(found[:, 0])) < eps**0.25)
        u = rows * jax.scipy.linalg.lu_solve(factors, units * g, trans=1)
        (by_t,) = jax.vjp(lambda t: slope(x, t), t)[1](-u)
        return (jnp.where(good, by_t, jnp.nan),)

    solve.defvjp(lambda t: (solve(t), t), backward)
    return jax.jit(jax.grad(lambda t: jnp.sum(solve(t) ** 2)))


# --- One on many devices --------------------------------------------------------------------------


def sharded_gradient(name: str, n: int = 1 << 18) -> Any:
    """The compiled gradient of a loss of the minimum of a separable objective."""
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((8,), ("b",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("b"))
    draw = np.random.default_rng(0)
    theta, target, x0 = (
        jax.device_put(jnp.asarray(a, jnp.float64), place)
        for a in (draw.uniform(1, 2, n), draw.normal(size=n), np.zeros(n))
    )

    def objective(x: Array, theta: Array, target: Array) -> Array:
        return jnp.sum(theta * (x - target) ** 2 + 0.1 * x**4) / n

    def descend(fun: Any, x0: Array) -> Array:
        return jax.lax.fori_loop(0, 60, lambda _, x: x - 0.1 * n * jax.grad(fun)(x), x0)

    @jax.custom_vjp
    def by_hand(x0: Array, theta: Array, target: Array) -> Array:
        return descend(lambda x: objective(x, theta, target), x0)

    def backward(saved: Any, g: Array) -> Any:
        x, *rest = saved
        _, by_x = jax.linearize(lambda x: jax.grad(objective)(x, *rest), x)
        u = jax.scipy.sparse.linalg.cg(by_x, g, tol=1e-9, maxiter=500)[0]
        _, pull = jax.vjp(lambda *rest: jax.grad(objective)(x, *rest), *rest)
        return jnp.zeros_like(x), *pull(-u)

    def forward(*a: Array) -> Any:
        x = by_hand(*a)
        return x, (x, *a[1:])

    by_hand.defvjp(forward, backward)
    solve: Any = by_hand
    if name in CHECKS:
        minimize = fv.argmin(descend, check=CHECKS[name])
        solve = lambda x0, *a: minimize(lambda x: objective(x, *a), x0)  # noqa: E731
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(solve(*a) ** 2), 1))
    return gradient.lower(x0, theta, target).compile()


def sharded_memory() -> Row:
    def measured(name: str) -> float:
        env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
        env["JAX_PLATFORMS"] = "cpu"
        command = [sys.executable, "-m", "benchmarks.scale", name]
        return float(
            subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
        )

    base, *ours = (measured(name) for name in ("by hand", *CHECKS))
    return Row(
        "temporary memory of an unknown on 8 devices",
        ours[0] / base,
        1.5,
        f"{base:.3g} MB",
        f"{ours[0]:.3g} MB",
        (("check=False (1.2)", ours[1] / base),),
    )


def rows() -> Iterator[Row]:
    with jax.enable_x64(True):
        yield scalar_roots()
        yield small_systems()
    yield deep_equilibrium()
    with jax.enable_x64(True):
        yield from cost_of_the_check()
    yield sharded_memory()


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    memory = sharded_gradient(sys.argv[1]).memory_analysis()
    print(float(memory.temp_size_in_bytes) / 1e6)
