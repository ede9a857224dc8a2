"""What a solver is given: a converted function with its extra arguments.

Usually this is one function, as a closure. Where a call has several (a function and a condition
stated in terms of it; an objective and its constraints) one closure contains them all as parts: a
value that several capture is one of its values, and evaluating one part removes the others as dead
code. Not here: what the solver does with it, and what its result satisfies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import tree_util

from freevars._solvers.kkt import CONSTRAINTS
from freevars.jax import _compat
from freevars.jax._closure import Closure
from freevars.jax._convert.static import as_static, from_static

__all__ = ["Problem", "count"]


@tree_util.register_static
@dataclass(frozen=True)
class Parts:
    """The names of the parts of a closure; of `fun` alone there are none."""

    names: tuple[str, ...] = ()


class Problem(NamedTuple):
    """A closure and the extra arguments of the function: everything that derivatives flow into.

    Its leaves are arrays; extra arguments that are not arrays are static.
    """

    fun: Closure[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parts: Parts = Parts()
    bounds: Any = None  # (lower, upper), each like x
    totals: Any = None  # the closure of what the solver keeps of x

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

    @staticmethod
    def of_parts(
        functions: Mapping[str, Callable[..., Any]],
        points: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        bounds: Any = None,
    ) -> Problem:
        """Convert several functions `function(point, args, kwargs)`, each at a point of its own."""

        def parts(points: dict[str, Any], args: Any, kwargs: Any) -> dict[str, Any]:
            return {name: f(points[name], args, kwargs) for name, f in functions.items()}

        closure = Closure(parts, dict(points), args, kwargs)
        given = as_static((args, kwargs), _compat.is_array)
        return Problem(closure, given[0], given[1], Parts(tuple(functions)), bounds)

    def as_given(self) -> Callable[..., Any]:
        """The function as the solver calls it: a pytree too, so that a solver may jit."""
        partial: Any = tree_util.Partial
        if self.parts.names:
            return partial(_Part("fun"), self.fun)
        return partial(_with_kwargs, self.fun) if self.kwargs else self.fun

    def extra(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The extra arguments as the solver is given them."""
        args, kwargs = from_static((self.args, self.kwargs))
        return args, kwargs

    def struct(self, part: str = "fun") -> Any:
        """What a part returns, with a `jax.ShapeDtypeStruct` for each array."""
        out = self.fun.out_struct
        return out[part] if self.parts.names else out

    def has_aux(self, wanted: int | None) -> bool:
        """Whether the function returns `(value, aux)`, with a value of so many real numbers."""
        out = self.struct()
        pair = isinstance(out, tuple) and len(out) == 2  # noqa: PLR2004
        return pair and (wanted is None or count(out[0]) == wanted)

    @property
    def has_custom_vmap(self) -> bool:
        """Whether a function holds a rule for batches."""
        closures = [self.fun] if self.totals is None else [self.fun, self.totals]
        return any(f._program.has_custom_vmap for f in closures)  # noqa: SLF001 (own package)

    @property
    def coupled(self) -> frozenset[str]:
        """The named axes in use along which a function communicates."""
        return _compat.coupled_axes(self.fun._program.jaxpr)  # noqa: SLF001 (own package)

    def value(self, x: Any, *, has_aux: bool) -> Any:
        """The value of the function, without its aux."""
        args, kwargs = self.extra()
        out = self.as_given()(x, *args, **kwargs)
        return out[0] if has_aux else out

    @property
    def constrained(self) -> bool:
        """Whether the solution is a minimum with constraints."""
        return self.bounds is not None or bool(self.constraints)

    @property
    def constraints(self) -> tuple[str, ...]:
        """The parts that are constraints."""
        return tuple(name for name in self.parts.names if name in CONSTRAINTS)

    def constraint(self, name: str) -> Callable[[Any], Any]:
        """A constraint as the solver calls it, a pytree too."""
        partial: Any = tree_util.Partial
        return partial(_Constraint(name), self)

    def parts_at(self, x: Any) -> dict[str, Any]:
        """The values of all parts at one point."""
        return self.fun(dict.fromkeys(self.parts.names, x), *self.extra())

    @property
    def stated_by(self) -> str:
        """The part that says what holds at the solution."""
        return "condition" if "condition" in self.parts.names else "fun"

    def states(self, x: Any, *, has_aux: bool) -> Any:
        """The value at x of the part that says what holds there, without its aux."""
        if self.stated_by == "fun":
            return self.value(x, has_aux=has_aux)
        args, kwargs = self.extra()
        return _Part("condition")(self.fun, x, *args, **kwargs)


@dataclass(frozen=True)
class _Part:
    """One part of a closure as a function; compares by its name, so that nothing is compiled
    twice."""

    name: str

    def __call__(self, closure: Closure[..., Any], point: Any, *args: Any, **kwargs: Any) -> Any:
        points = {
            # Dead code, at an arbitrary point.
            name: point if name == self.name else jax.tree.map(_ones, avals)
            for name, avals in closure._program.inputs.avals()[0].items()  # noqa: SLF001
        }
        return closure(points, args, kwargs)[self.name]


@dataclass(frozen=True)
class _Constraint:
    """As `_Part`, for a function of x alone."""

    name: str

    def __call__(self, problem: Problem, x: Any) -> Any:
        return problem.parts_at(x)[self.name]


def _ones(t: Any) -> Any:
    ones = jnp.ones(t.shape, t.dtype)
    return _compat.like_type(_compat.like_sharding(ones, t), t)


def _with_kwargs(closure: Closure[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    return closure(x, args, kwargs)


def count(tree: Any) -> int:
    """How many real numbers a pytree of arrays or of their types holds."""
    return sum(a.size * (1 if jnp.isrealobj(a) else 2) for a in tree_util.tree_leaves(tree))
