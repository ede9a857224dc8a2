"""Every exception that freevars raises on purpose.

Each message says what was expected, what came instead, where, and what to do next. The classes also
derive from the built-in class that a user would expect to catch. Not here: deciding when to raise.
"""

__all__ = [
    "CaptureError",
    "FreevarsError",
    "LeakError",
    "NotASolutionError",
    "SingularError",
    "StructureError",
]


class FreevarsError(Exception):
    """The base class of every exception in this module.

    Example:
        >>> from freevars.errors import FreevarsError, SingularError
        >>> issubclass(SingularError, FreevarsError)
        True
    """


class StructureError(FreevarsError, TypeError):
    """A value has another structure, shape, dtype, static leaf or length than it must have.

    A call of a converted function does not fit the example arguments of the conversion; or what a
    solver starts from, what it returns or what its function returns is nothing that the derivative
    rule takes.

    Attributes:
        captured: the position of the captured value that does not fit, if it is one, else None.

    Example:
        >>> import freevars.jax as fv
        >>> f = fv.Closure(lambda x: 2 * x, 1.0)
        >>> try:
        ...     f((1.0, 2.0))
        ... except TypeError as error:
        ...     print(type(error).__name__)
        StructureError
    """

    captured: int | None = None


class CaptureError(FreevarsError, TypeError):
    """A captured value cannot be made an explicit argument without risking a lost derivative.

    Example:
        >>> import torch, freevars.torch as fv
        >>> total = torch.zeros(2, requires_grad=True)
        >>> try:
        ...     fv.closure_convert(lambda x: total.detach().add_(x), torch.ones(2))
        ... except TypeError as error:
        ...     print(type(error).__name__)
        CaptureError
    """


class LeakError(FreevarsError, TypeError):
    """A traced value was used outside the transformation that it belongs to.

    A function captures it that a custom derivative rule calls, or that is called too late. The
    cause (`__cause__`) is JAX's own error, where that came first.

    Example:
        >>> import jax, freevars.jax as fv
        >>> kept = []
        >>> _ = jax.jit(lambda a: kept.append(lambda x: a * x))(1.0)
        >>> try:
        ...     with fv.explain_leaks():
        ...         kept[0](2.0)
        ... except TypeError as error:
        ...     print(type(error).__name__)
        LeakError
    """


class NotASolutionError(FreevarsError, RuntimeError):
    """What a solver returned does not satisfy the condition that its derivative rule rests on.

    Example:
        >>> import jax, freevars.jax as fv
        >>> solver = fv.root(lambda fun, x0: x0)  # it never moves
        >>> try:
        ...     jax.grad(lambda a: solver(lambda x: x**2 - a, 1.0))(4.0)
        ... except RuntimeError as error:
        ...     print(type(error).__name__)
        NotASolutionError
    """


class SingularError(FreevarsError, ArithmeticError):
    """The linear system of a derivative has no unique solution, or rounding leaves none.

    Example:
        >>> import jax, freevars.jax as fv
        >>> solver = fv.root(lambda fun, x0: x0)
        >>> try:
        ...     jax.grad(lambda a: solver(lambda x: 0 * x + a, 1.0))(0.0)
        ... except ArithmeticError as error:
        ...     print(type(error).__name__)
        SingularError
    """
