"""Implicit rules that other libraries have, over one equation, by the name to print.

Each is asked for what its users would write: its own rule around the solver of the benchmark where
it has one, else its own solver. Not here: freevars.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks._peers import installed

Function = Callable[..., Any]  # equation(x, *args), or layer(z, *args)
Solver = Callable[..., Array]  # solver(fun, x0)


def dense_roots(solver: Solver, equation: Function, x0: Any, optimiser: Any) -> dict[str, Function]:
    """Rules that write the system out. `optimiser(optimistix)` is a method of optimistix and its
    options."""

    def divide(g: Any, y: Any) -> Any:
        matrix = jax.jacobian(g)(y)
        return y / matrix if jnp.ndim(y) == 0 else jnp.linalg.solve(matrix, y)

    def custom_root(*args: Any) -> Any:
        fun = lambda x: equation(x, *args)  # noqa: E731
        return jax.lax.custom_root(fun, x0, solver, divide)

    found: dict[str, Function] = {"lax.custom_root": custom_root}
    if installed("jaxopt"):
        from jaxopt import implicit_diff

        rule = implicit_diff.custom_root(equation, solve=divide)  # its own takes no traced scalar
        solve = rule(lambda x0, *args: solver(lambda x: equation(x, *args), x0))
        found["jaxopt"] = lambda *args: solve(x0, *args)
    if installed("optimistix"):
        import optimistix

        method, options = optimiser(optimistix)
        found["optimistix"] = lambda a: (
            optimistix.root_find(equation, method, x0, a, options=options, throw=False).value
        )
    return found


def fixed_points(iterate: Solver, layer: Function, z0: Array) -> dict[str, Function]:
    """Rules that apply the system: `iterate(fun, z)` solves the adjoint's too."""

    def custom_root(weights: Any) -> Any:
        left = lambda z: z - layer(z, weights)  # noqa: E731
        solve = lambda left, z: iterate(lambda z: z - left(z), z)  # noqa: E731

        def tangent(g: Any, y: Any) -> Any:
            by_iteration = lambda g, b: iterate(lambda u: b + u - g(u), b, 1e-5)  # noqa: E731
            return jax.lax.custom_linear_solve(g, y, by_iteration, by_iteration)

        return jax.lax.custom_root(left, z0, solve, tangent)

    found: dict[str, Function] = {"lax.custom_root": custom_root}
    if installed("jaxopt"):
        from jaxopt import implicit_diff, linear_solve

        by_krylov = lambda *a: linear_solve.solve_bicgstab(*a, tol=1e-5)  # noqa: E731
        rule = implicit_diff.custom_fixed_point(layer, solve=by_krylov)
        solve = rule(lambda z0, weights: iterate(lambda z: layer(z, weights), z0))
        found["jaxopt, BiCGStab"] = lambda weights: solve(z0, weights)
    if installed("optimistix"):
        import lineax
        import optimistix

        method = optimistix.FixedPointIteration(rtol=1e-6, atol=1e-6)
        rule = optimistix.ImplicitAdjoint(lineax.GMRES(rtol=1e-5, atol=1e-5))
        found["optimistix, GMRES"] = lambda weights: (
            optimistix.fixed_point(layer, method, z0, weights, adjoint=rule, throw=False).value
        )
    return found
