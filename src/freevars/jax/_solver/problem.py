"""What a solver is given: a converted function with its extra arguments.

Not here: what the solver does with it, and what its result satisfies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import tree_util

from freevars.jax import _compat
from freevars.jax._closure import Closure
from freevars.jax._convert.static import as_static, from_static

__all__ = ["Problem", "count"]


class Problem(NamedTuple):
    """A closure and the extra arguments of the function: everything that derivatives flow into.

    Its leaves are arrays; what is no array among the extra arguments is sealed into the structure.
    """

    fun: Closure[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(
        fun: Callable[..., Any], x0: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Problem:
        """Convert `fun`, unless it is a closure already."""
        if kwargs:
            closure = Closure(lambda x, args, kwargs: fun(x, *args, **kwargs), x0, args, kwargs)
        elif args or not isinstance(fun, Closure):
            closure = Closure(fun, x0, *args)
        else:
            closure = fun
        return Problem(closure, *as_static((args, kwargs), _compat.is_array))

    def as_given(self) -> Callable[..., Any]:
        """The function as the solver calls it: a pytree too, so that a solver may jit."""
        partial: Any = tree_util.Partial
        return partial(_with_kwargs, self.fun) if self.kwargs else self.fun

    def extra(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The extra arguments as the solver is given them."""
        args, kwargs = from_static((self.args, self.kwargs))
        return args, kwargs

    def has_aux(self, wanted: int) -> bool:
        """Whether the function returns `(value, aux)`, with a value of so many real numbers."""
        out = self.fun.out_struct
        return isinstance(out, tuple) and len(out) == 2 and count(out[0]) == wanted  # noqa: PLR2004

    def value(self, x: Any, *, has_aux: bool) -> Any:
        """The value of the function, without its aux."""
        args, kwargs = self.extra()
        out = self.as_given()(x, *args, **kwargs)
        return out[0] if has_aux else out


def _with_kwargs(closure: Closure[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    return closure(x, args, kwargs)


def count(tree: Any) -> int:
    """How many real numbers a pytree of arrays or of their types holds."""
    return sum(a.size * (1 if jnp.isrealobj(a) else 2) for a in tree_util.tree_leaves(tree))
