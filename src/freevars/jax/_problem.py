"""What a solver is given: a converted function with its extra arguments.

Not here: what the solver does with it, and what its result satisfies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from freevars.jax._closure import Closure

__all__ = ["Problem"]


class Problem(NamedTuple):
    """A closure and the extra arguments of the function: everything that derivatives flow into."""

    fun: Closure[Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(
        fun: Callable[..., Any], x0: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Problem:
        """Convert `fun`, unless it is a closure already."""
        if args or kwargs:
            closure = Closure(lambda x, args, kwargs: fun(x, *args, **kwargs), x0, args, kwargs)
            return Problem(closure, args, kwargs)
        return Problem(fun if isinstance(fun, Closure) else Closure(fun, x0), (), {})

    def value(self, x: Any, *, has_aux: bool) -> Any:
        """The value of the function, without its aux.

        A solver with aux may be given a function with aux or one without. With it, the result is a
        pair; a pair of unknowns is told apart by being like x.
        """
        out = self.as_given()(x, *self.args, **self.kwargs)
        is_pair = isinstance(out, tuple) and len(out) == 2  # noqa: PLR2004 (a pair)
        if has_aux and is_pair and jax.tree.structure(out) != jax.tree.structure(x):
            return out[0]
        return out

    def as_given(self) -> Callable[..., Any]:
        """The function as the solver calls it."""
        if not (self.args or self.kwargs):
            return self.fun
        return lambda x, *args, **kwargs: self.fun(x, args, kwargs)
