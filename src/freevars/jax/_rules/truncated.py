"""Truncated backward passes: a few terms of the Neumann series in place of a solve.

For a fixed point the system is A = I - dfun/dx, and its inverse the sum of all powers of dfun/dx.
Taking only a few terms is cheaper and deliberately biased: the residual says nothing, and is not
checked. The truncated result itself is what further derivatives differentiate.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax

from freevars.jax._rules.operator import LinearOperator

__all__ = ["Truncated", "neumann", "one_step"]

Tree: TypeAlias = Any


class Truncated:
    """A `linear_solve` that sums terms of the Neumann series: `neumann(terms, step)`, `one_step`.

    Args:
        operator: the `LinearOperator` A.
        b: a pytree like `operator.structure`.

    Returns:
        step sum_{k < terms} (I - step A)^k b, in place of A^-1 b.

    Example:
        >>> import jax, freevars.jax as fv
        >>> iterate = fv.fixed_point(
        ...     lambda fun, x0: jax.lax.fori_loop(0, 60, lambda _, x: fun(x), x0),
        ...     linear_solve=fv.one_step,
        ... )
        >>> slope = jax.grad(lambda a: iterate(lambda x: x / 2 + a, 0.0))
        >>> print(slope(1.0))  # 1, not 1 + 1/2 + 1/4 + ... = 2
        1.0
    """

    def __init__(self, terms: int, step: Any) -> None:
        if isinstance(terms, bool) or not isinstance(terms, int) or terms < 1:
            message = f"neumann: terms: expected a number of at least 1, got {terms!r}."
            raise ValueError(message)
        self.terms = terms
        self.step = step

    def __call__(self, operator: LinearOperator, b: Tree) -> Tree:
        """The truncated series, a polynomial of the operator."""

        def scaled(v: Tree) -> Tree:
            return jax.tree.map(lambda leaf: (self.step * leaf).astype(leaf.dtype), v)

        def add(state: tuple[Tree, Tree], _: Any) -> tuple[tuple[Tree, Tree], None]:
            power, total = state
            image = scaled(operator.matvec(power))
            power = jax.tree.map(lambda p, q: p - q, power, image)
            return (power, jax.tree.map(lambda s, p: s + p, total, power)), None

        if self.terms == 1:
            return scaled(b)
        return scaled(jax.lax.scan(add, (b, b), None, length=self.terms - 1)[0][1])

    def __repr__(self) -> str:
        return f"neumann({self.terms}, step={self.step!r})"


def neumann(terms: int, step: Any = 1.0) -> Truncated:
    """A `linear_solve` that sums `terms` terms of the Neumann series.

    In place of A^-1 b it takes step sum_{k < terms} (I - step A)^k b, which tends to A^-1 b where
    all eigenvalues of step A lie within 1 of 1. For `fixed_point`, A is I - dfun/dx and a step of 1
    gives the powers of dfun/dx: backpropagation through the last `terms` iterations, as long as
    they stay at the solution. For `argmin`, A is the second derivative, and the step is that of
    gradient descent. The result is biased, and no check of its residual is made; that x is a
    solution is still checked where it can be.

    Args:
        terms: how many, an int of 1 or more; each but the first applies the operator once.
        step: a number, or a captured value.

    Returns:
        A function `solve(operator, b)`, to be given as `linear_solve=`.

    Raises:
        ValueError: `terms` is not an int of 1 or more.

    References:
        Lorraine, Vicol and Duvenaud 2020, "Optimizing Millions of Hyperparameters by Implicit
        Differentiation"; for fixed points Geng et al. 2021, "On Training Implicit Models" (the
        phantom gradient).

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax as fv
        >>> iterate = fv.fixed_point(
        ...     lambda fun, x0: jax.lax.fori_loop(0, 60, lambda _, x: fun(x), x0),
        ...     linear_solve=fv.neumann(3),
        ... )
        >>> slope = jax.grad(lambda a: iterate(lambda x: x / 2 + a, 0.0))
        >>> print(slope(1.0))  # 1 + 1/2 + 1/4, not 2
        1.75
    """
    return Truncated(terms, step)


one_step = Truncated(1, 1.0)
"""A `linear_solve` that takes A for the identity: for `fixed_point`, the derivative of one more
iteration at the solution.

Source: Bolte, Pauwels and Vaiter 2023, "One-step differentiation of iterative algorithms"; Fung et
al. 2022, "JFB: Jacobian-Free Backpropagation for Implicit Networks".
"""
