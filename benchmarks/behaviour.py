"""The compatibility matrix: which implicit rules work under which transformations, measured.

    python -m benchmarks.behaviour > docs/behaviour.md
    python -m benchmarks.behaviour --check docs/behaviour.md     fail where it says otherwise

Every cell solves x^2 = a for the x above zero, by a function that captures a, and differentiates
that in its own way. ok: the right number to 1e-4. Otherwise the wrong number, or the class
of the error. Not here: how fast any of them is.
"""

import argparse
import difflib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

import freevars.jax as fv
from benchmarks import torch_behaviour
from benchmarks._peers import installed

Solve = Callable[[Callable[[Any], Any]], Any]  # residual of a vector of one -> x
A = 2.0
D1, D2 = 0.5 * A**-0.5, -0.25 * A**-1.5


def newton(fun: Any, x: Any, steps: int = 20) -> Any:
    slope = lambda x: jax.grad(lambda x: jnp.sum(fun(x)))(x)  # noqa: E731, PLW0108
    return lax.fori_loop(0, steps, lambda _, x: x - fun(x) / slope(x), x)


TOLERANCE = 1e-12


def numpy_secant(fun: Any, x: Any) -> Any:
    """A solver that needs numbers, like any C or Fortran library: secant steps."""
    x, before = np.asarray(x, float), np.asarray(x, float) * 1.5
    for _ in range(30):
        f, g = np.asarray(fun(x), float), np.asarray(fun(before), float)
        if np.max(np.abs(f)) < TOLERANCE or np.max(np.abs(f - g)) == 0:
            break
        x, before = x - f * (x - before) / (f - g), x
    return x


X0 = np.ones(1)
ON_HOST: dict[str, Solve] = {}
ROWS: dict[str, Solve] = {}


def row(name: str, *, host: bool = False) -> Callable[[Solve], Solve]:
    def note(solve: Solve) -> Solve:
        (ON_HOST if host else ROWS)[name] = solve
        return solve

    return note


ours, ours_on_host = fv.root(newton), fv.root(fv.on_host(numpy_secant))
row("freevars")(lambda fun: ours(fun, X0))
row("freevars", host=True)(lambda fun: ours_on_host(fun, X0))


def _custom_root(solver: Any) -> Solve:
    tangent = lambda g, y: y / g(jnp.ones_like(y))  # noqa: E731
    return lambda fun: lax.custom_root(fun, jnp.asarray(X0), solver, tangent)


row("lax.custom_root")(_custom_root(newton))
row("lax.custom_root", host=True)(_custom_root(numpy_secant))

if installed("jaxopt"):
    import jaxopt

    def _implicit(rule: Any, shifted: Callable[[Any, Any], Any], solver: Any) -> Solve:
        def solve(fun: Any) -> Any:
            condition = lambda x: shifted(fun, x)  # noqa: E731
            return rule(condition)(lambda x0: solver(fun, x0))(jnp.asarray(X0))

        return solve

    same, plus_x = (lambda fun, x: 1.0 * fun(x)), (lambda fun, x: x + fun(x))
    rules = {"root": (jaxopt.implicit_diff.custom_root, same)}
    rules["fixed_point"] = (jaxopt.implicit_diff.custom_fixed_point, plus_x)
    for name, (rule, shifted) in rules.items():
        row(f"jaxopt custom_{name}")(_implicit(rule, shifted, newton))
        row(f"jaxopt custom_{name}", host=True)(_implicit(rule, shifted, numpy_secant))

    def _integral(fun: Any) -> Any:
        """A function with `fun` as its derivative: by Gauss, exact for what is solved here."""
        nodes, weights = np.polynomial.legendre.leggauss(4)
        return lambda x: sum(
            w / 2 * jnp.sum(x * fun(x * (t + 1) / 2)) for t, w in zip(nodes, weights, strict=True)
        )

    row("jaxopt LBFGS")(
        lambda fun: jaxopt.LBFGS(_integral(fun), tol=1e-10, maxiter=100).run(jnp.asarray(X0)).params
    )
    row("jaxopt ScipyMinimize", host=True)(
        lambda fun: (
            jaxopt.ScipyMinimize(fun=_integral(fun), method="L-BFGS-B", tol=1e-12)
            .run(jnp.asarray(X0))
            .params
        )
    )

if installed("optimistix"):
    import optimistix

    row("optimistix")(
        lambda fun: (
            optimistix.root_find(
                lambda x, _: fun(x), optimistix.Newton(1e-10, 1e-10), jnp.asarray(X0)
            ).value
        )
    )

row("unrolled")(
    lambda fun: lax.scan(lambda x, _: (newton(fun, x, 1), None), X0, None, length=20)[0]
)
row("unrolled", host=True)(lambda fun: numpy_secant(fun, X0))


def plain(solve: Solve) -> Callable[[Any], Any]:
    return lambda a: solve(lambda x: x**2 - a)[0]


# Each: what is to come out, and how to get it from a solver.
Column = tuple[Any, Callable[[Solve], Any]]
ROOTS = np.array([1.0, A])
COMPOSITIONS: dict[str, Column] = {
    "value": (A**0.5, lambda s: plain(s)(A)),
    "grad": (D1, lambda s: jax.grad(plain(s))(A)),
    "jit(grad)": (D1, lambda s: jax.jit(jax.grad(plain(s)))(A)),
    "grad(jit)": (D1, lambda s: jax.grad(jax.jit(plain(s)))(A)),
    "jvp": (D1, lambda s: jax.jvp(plain(s), (A,), (1.0,))[1]),
    "vmap(grad)": (0.5 * ROOTS**-0.5, lambda s: jax.vmap(jax.grad(plain(s)))(ROOTS)),
    "grad(vmap)": (
        0.5 * ROOTS**-0.5,
        lambda s: jax.grad(lambda a: jnp.sum(jax.vmap(plain(s))(a)))(jnp.asarray(ROOTS)),
    ),
    "scan": (
        D1,
        lambda s: jax.grad(
            lambda a: lax.scan(lambda c, _: (plain(s)(a) + 0 * c, None), a, length=2)[0]
        )(A),
    ),
    "checkpoint": (D1, lambda s: jax.grad(jax.checkpoint(plain(s)))(A)),
    "forward over reverse": (D2, lambda s: jax.jacfwd(jax.jacrev(plain(s)))(A)),
    "reverse over forward": (D2, lambda s: jax.jacrev(jax.jacfwd(plain(s)))(A)),
    "reverse over reverse": (D2, lambda s: jax.grad(jax.grad(plain(s)))(A)),
    "in itself": (0.25 * A**-0.75, lambda s: jax.grad(lambda a: plain(s)(plain(s)(a)))(A)),
}
KEY = jax.random.key(0)


def captures(solve: Solve, n: Any, flag: Any, z: Any, key: Any) -> Any:
    """The derivative by a, where everything else that the function captures is traced as well."""

    def f(a: Any, n: Any, flag: Any, z: Any, key: Any) -> Any:
        one = 1.0 if n is None else n / 2
        one = one if flag is None else jnp.where(flag, one, 0.0)
        one = one if z is None else one * jnp.abs(z)
        if key is not None:
            draw = jax.random.uniform(key)
            return solve(lambda x: x**2 - a * one * draw / jax.random.uniform(key))[0]
        return solve(lambda x: x**2 - a * one)[0]

    return jax.jit(jax.grad(f))(A, n, flag, z, key)


KINDS: dict[str, Column] = {
    "int": (D1, lambda s: captures(s, jnp.int32(2), None, None, None)),
    "bool": (D1, lambda s: captures(s, None, jnp.bool_(True), None, None)),
    "complex": (D1, lambda s: captures(s, None, None, jnp.asarray(0.6 + 0.8j), None)),
    "key": (D1, lambda s: captures(s, None, None, None, KEY)),
}


def cell(column: Column, solve: Solve) -> str:
    expected, measure = column
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = np.asarray(measure(solve))
    except Exception as error:  # noqa: BLE001 (whatever is raised is what is asked for)
        return type(error).__name__
    if got.shape == np.shape(expected) and np.allclose(got, expected, rtol=1e-4):
        return "ok"
    return f"wrong: {got.tolist()!s:.20}"


def table(columns: dict[str, Column], rows: dict[str, Solve]) -> Iterator[str]:
    yield "| | " + " | ".join(rows) + " |"
    yield "|---" * (len(rows) + 1) + "|"
    for name, column in columns.items():
        yield f"| {name} | " + " | ".join(cell(column, solve) for solve in rows.values()) + " |"


def page() -> str:
    lines = [
        "# Compatibility matrix",
        "",
        f"Printed by `python -m benchmarks.behaviour`, with {VERSIONS}. Every cell solves",
        "x^2 = a by a function that captures a and is differentiated by it, in the way that its",
        "row says. ok is the right number to 1e-4; otherwise the wrong number or the class of the",
        "error.",
        "",
        "## Solvers in JAX",
        "",
        *table(COMPOSITIONS, ROWS),
        "",
        "A traced value of another kind captured too, under `jit(grad)`:",
        "",
        *table(KINDS, ROWS),
        "",
        "## Solvers in NumPy or scipy",
        "",
        *table(COMPOSITIONS | KINDS, ON_HOST),
        "",
        "optimistix has solvers of its own only, and so no row here.",
        "",
        "## Solvers in PyTorch",
        "",
        *table(torch_behaviour.COLUMNS, torch_behaviour.ROWS),
        "",
        "`autograd.Function` is a rule by hand around the same solver, which is handed the",
        "function as it is. A derivative that is lost without a word shows as the number 0.0.",
    ]
    return "\n".join(lines) + "\n"


VERSIONS = f"jax {jax.__version__} and torch {torch.__version__.partition('+')[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", type=Path, metavar="PAGE", help="compare with a page instead")
    against = parser.parse_args().check
    jax.config.update("jax_enable_x64", True)
    today = page()
    if against is None:
        print(today, end="")
        return 0
    # Other releases may have printed it; what counts is what the cells say.
    written = re.sub(r"with jax \S+ and torch \S+\.", f"with {VERSIONS}.", against.read_text())
    difference = list(difflib.unified_diff(written.splitlines(), today.splitlines(), lineterm=""))
    print("\n".join(difference) or f"{against}: as printed today")
    return int(bool(difference))


if __name__ == "__main__":
    sys.exit(main())
