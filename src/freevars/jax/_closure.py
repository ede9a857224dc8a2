"""A converted function as one value: callable, and a pytree whose leaves are its captured values.

Everything that JAX does with arrays it does with a `Closure`: differentiate by it, batch it, carry
it through a loop, put it on a device. Its static part is a `Program`, which compares by what it
computes, so that a fresh lambda with the same code never recompiles what takes it. Not here: how
captured values are found, and what makes two programs equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Generic, ParamSpec, Self, TypeVar

from jax import export, tree_util

from freevars._contract import by_position
from freevars.jax._convert.arguments import describe
from freevars.jax._convert.convert import convert
from freevars.jax._convert.program import Program
from freevars.jax._convert.serialize import from_bytes, to_bytes
from freevars.jax._convert.stored import restore, store
from freevars.report import CaptureReport

__all__ = ["Closure"]

P = ParamSpec("P")
R = TypeVar("R")

_SHOWN = 4  # how many captured values a repr lists


class Closure(Generic[P, R]):
    """`fun` with every value that it captures as a leaf: callable, and a differentiable argument.

    `Closure(fun, *example_args)(*args)` equals `fun(*args)`, in value and in every derivative, and
    `jax.tree.map` over a closure gives the function for other captured values. Two closures have
    equal tree structures exactly where they compute the same thing from their values, so that
    `jax.jit(solver)(Closure(lambda x: f(x, w), x0), x0)` compiles once for all `w`.

    Called outside a transformation a closure is one compiled dispatch, compiled once for all
    closures of the same structure; inside one it is traced into the program under way.

    Args:
        fun: any callable, pure. It runs once, on tracers.
        *example_args: pytrees that fix structure, shapes and dtypes, as for `closure_convert`.

    Attributes:
        values: the captured arrays, in the order in which `fun` first reads them; every array met,
            traced, concrete or NumPy.
        constants: concrete arrays captured by a function inside `fun` with a rule that cannot be
            traced alone, as that of a `custom_vmap`, or by such a rule. They cannot be replaced, so
            they are part of the structure and not leaves.
        captures: a report of what is captured, by name (`freevars.report.CaptureReport`).
        in_struct: the example arguments, a tuple, with a `jax.ShapeDtypeStruct` for each array.
        out_struct: the same for the result.

    Raises:
        TypeError: `fun` is not callable.
        freevars.errors.StructureError: a call brings another structure, shape, dtype or static leaf
            than the example; the error names the first path that differs.
        freevars.errors.CaptureError: `fun` captures a mutable reference, or a function inside it
            that has a `custom_vjp`, or a rule that cannot be traced alone, captures a traced value.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax as fv
        >>> w = jnp.array([1.0, 2.0])
        >>> f = fv.Closure(lambda x: jnp.sum(w * x**2), w)
        >>> x = jnp.array([3.0, 4.0])
        >>> print(f(x))
        41.0
        >>> print(jax.grad(lambda f: f(x))(f).values[0])
        [ 9. 16.]
    """

    __slots__ = ("__weakref__", "_origin", "_program", "_values")

    _program: Program
    _values: tuple[Any, ...]
    _origin: tuple[Callable[P, R], tuple[Any, ...]] | None

    def __init__(self, fun: Callable[P, R], *example_args: Any) -> None:
        self._program, self._values = convert(fun, example_args)
        # What made this closure, for reports. A transformation drops it: a tree structure that
        # held a user's function would keep its arrays alive in every cache that holds the
        # structure.
        self._origin = (fun, example_args)

    @property
    def values(self) -> tuple[Any, ...]:
        """The captured values, in the order in which the function first reads them."""
        return self._values

    @property
    def constants(self) -> tuple[Any, ...]:
        """The concrete arrays that are part of the structure, because a custom rule that was not
        traced captures them."""
        return self._program.fixed

    @property
    def captures(self) -> CaptureReport:
        """What is captured, with names; made anew each time, by tracing the function once more.

        A closure that came out of a transformation no longer knows its Python function. It has
        types but no names, and the lines are those of the first function that had its structure.
        """
        from freevars.jax._report.build import report_of_program  # noqa: PLC0415 (see `described`)

        return report_of_program(self._program, self._values, self._origin)

    @property
    def in_struct(self) -> Any:
        """The example arguments, a tuple, with a `jax.ShapeDtypeStruct` for each array."""
        return self._program.inputs.struct()

    @property
    def out_struct(self) -> Any:
        """The result, with a `jax.ShapeDtypeStruct` for each array."""
        return self._program.outputs.struct()

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs:
            raise by_position(repr(self), kwargs)
        result: R = self._program(self._values, args)
        return result

    def __repr__(self) -> str:
        program = self._program
        takes = ", ".join(map(describe, program.inputs.types))
        gives = ", ".join(map(describe, program.outputs.types))
        values = ", ".join(map(describe, self._values[:_SHOWN]))
        more = f", … {len(self._values)} in all" if len(self._values) > _SHOWN else ""
        fixed = f"; {len(program.fixed)} held constant" if program.fixed else ""
        captures = f"captures {values or 'nothing'}{more}{fixed}"
        return f"Closure({program.name}: ({takes}) -> {gives}; {captures})"

    # A copy has the program and the values, whatever the Python function would capture by now.

    def __copy__(self) -> Self:
        return self._with(self._values)

    def __deepcopy__(self, memo: Any) -> Self:
        return self._with(copy.deepcopy(self._values, memo))

    def _with(self, values: tuple[Any, ...]) -> Self:
        made = object.__new__(type(self))
        made._program, made._values, made._origin = self._program, values, self._origin
        return made

    def __reduce__(self) -> Any:
        named = [(x, f"captured value {i} of {self!r}") for i, x in enumerate(self._values)]
        return _restored, (self._program, tuple([store(x, name) for x, name in named]))


def _flatten(closure: Closure[..., Any]) -> tuple[tuple[Any, ...], Program]:
    return closure._values, closure._program  # noqa: SLF001


def _flatten_with_keys(closure: Closure[..., Any]) -> tuple[Iterable[tuple[Any, Any]], Program]:
    keyed = [
        (_ValueKey(i), value)
        for i, value in enumerate(closure._values)  # noqa: SLF001
    ]
    return keyed, closure._program  # noqa: SLF001


class _ValueKey(tree_util.SequenceKey):
    """The key of a captured value, shown as the Python that reads it."""

    def __str__(self) -> str:
        return f".values[{self.idx}]"


def _unflatten(program: Program, values: Iterable[Any]) -> Closure[..., Any]:
    # No checks: JAX puts anything in the place of a leaf, an axis number or a sentinel.
    closure: Closure[..., Any] = object.__new__(Closure)
    closure._program = program  # noqa: SLF001
    closure._values = tuple(values)  # noqa: SLF001
    closure._origin = None  # noqa: SLF001
    return closure


def _restored(program: Program, values: Iterable[Any]) -> Closure[..., Any]:
    return _unflatten(program, map(restore, values))


tree_util.register_pytree_with_keys(Closure, _flatten_with_keys, _unflatten, _flatten)
# A program that `jax.export` has compiled for closures takes those of another process.
export.register_pytree_node_serialization(
    Closure,
    serialized_name="freevars.jax.Closure",
    serialize_auxdata=to_bytes,
    deserialize_auxdata=from_bytes,
)
