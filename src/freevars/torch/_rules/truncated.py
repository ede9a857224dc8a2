"""Truncated backward passes: a few terms of the Neumann series in place of a solve.

For a fixed point the system is A = I - dfun/dx, and its inverse the sum of all powers of dfun/dx.
Taking only a few terms is cheaper and deliberately biased: the residual says nothing, and is not
checked.
"""

from torch import Tensor

from freevars.torch._rules.derivative import LinearOperator

__all__ = ["Truncated", "neumann", "one_step"]


class Truncated:
    """A `linear_solve` that sums terms of the Neumann series: `neumann(terms, step)`, `one_step`.

    Args:
        operator: the `LinearOperator` A.
        b: a vector of shape (n,).

    Returns:
        step sum_{k < terms} (I - step A)^k b, in place of A^-1 b.

    Example:
        >>> import torch, freevars.torch as fv
        >>> @fv.fixed_point(linear_solve=fv.one_step)
        ... def iterate(fun, x0):
        ...     for _ in range(60):
        ...         x0 = fun(x0)
        ...     return x0
        >>> a = torch.tensor(1.0, requires_grad=True)
        >>> x = iterate(lambda x: x / 2 + a, torch.tensor(0.0))
        >>> torch.autograd.grad(x, a)  # 1, not 1 + 1/2 + 1/4 + ... = 2
        (tensor(1.),)
    """

    def __init__(self, terms: int, step: float | Tensor) -> None:
        if isinstance(terms, bool) or not isinstance(terms, int) or terms < 1:
            message = f"neumann: terms: expected a number of at least 1, got {terms!r}."
            raise ValueError(message)
        self.terms = terms
        self.step = step

    def __call__(self, operator: LinearOperator, b: Tensor) -> Tensor:
        power = total = b
        for _ in range(self.terms - 1):
            power = power - self.step * operator.matvec(power)
            total = total + power
        return self.step * total

    def __repr__(self) -> str:
        return f"neumann({self.terms}, step={self.step!r})"


def neumann(terms: int, step: float | Tensor = 1.0) -> Truncated:
    """A `linear_solve` that sums `terms` terms of the Neumann series.

    In place of A^-1 b it takes step sum_{k < terms} (I - step A)^k b, which tends to A^-1 b where
    all eigenvalues of step A lie within 1 of 1. For `fixed_point`, A is I - dfun/dx and a step of 1
    gives the powers of dfun/dx. For `argmin`, A is the second derivative, and the step is that of
    gradient descent. The result is biased, and no check of its residual is made; that x is a
    solution is still checked where it can be.

    Args:
        terms: how many, an int of 1 or more; each but the first applies the operator once.
        step: a number, or a tensor with one.

    Returns:
        A function `solve(operator, b)`, to be given as `linear_solve=`.

    Raises:
        ValueError: `terms` is not an int of 1 or more.

    References:
        Lorraine, Vicol and Duvenaud 2020, "Optimizing Millions of Hyperparameters by Implicit
        Differentiation"; for fixed points Geng et al. 2021, "On Training Implicit Models" (the
        phantom gradient).

    Example:
        >>> import torch, freevars.torch as fv
        >>> @fv.fixed_point(linear_solve=fv.neumann(3))
        ... def iterate(fun, x0):
        ...     for _ in range(60):
        ...         x0 = fun(x0)
        ...     return x0
        >>> a = torch.tensor(1.0, requires_grad=True)
        >>> x = iterate(lambda x: x / 2 + a, torch.tensor(0.0))
        >>> torch.autograd.grad(x, a)  # 1 + 1/2 + 1/4, not 2
        (tensor(1.7500),)
    """
    return Truncated(terms, step)


one_step = Truncated(1, 1.0)
"""A `linear_solve` that takes A for the identity: for `fixed_point`, the derivative of one more
iteration at the solution.

Source: Bolte, Pauwels and Vaiter 2023, "One-step differentiation of iterative algorithms"; Fung et
al. 2022, "JFB: Jacobian-Free Backpropagation for Implicit Networks".
"""
