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
    """The base class of every exception in this module."""


class StructureError(FreevarsError, TypeError):
    """A call brought another structure, shape, dtype, static leaf or number of values than the
    example arguments of the conversion had; or a solver or its function returned another than a
    derivative rule takes, or started from one.

    ``captured`` is the position of the captured value that does not fit, if it is one.
    """

    captured: int | None = None


class CaptureError(FreevarsError, TypeError):
    """A captured value cannot be made an explicit argument without risking a lost derivative."""


class LeakError(FreevarsError, TypeError):
    """A traced value was used outside the transformation that it belongs to: a function captures
    it that a custom derivative rule calls, or that is called too late. The cause is JAX's error."""


class NotASolutionError(FreevarsError, RuntimeError):
    """What a solver returned does not satisfy the condition that its derivative rule rests on."""


class SingularError(FreevarsError, ArithmeticError):
    """The linear system of a derivative has no unique solution, or none that rounding leaves."""
