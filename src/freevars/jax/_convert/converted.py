"""`closure_convert` and what it gives: a function whose captured values are its last arguments.

Not here: how the values are found (`convert`), and which of them become arguments (`hoist`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, Self, TypeVar

from freevars._contract import Hoist
from freevars._names.callables import plain_name
from freevars._sequences import replaced
from freevars.errors import StructureError
from freevars.jax._convert.arguments import describe
from freevars.jax._convert.convert import convert, described, trace
from freevars.jax._convert.hoist import policy_of
from freevars.jax._convert.program import Program
from freevars.jax._convert.stored import restore, store

__all__ = ["Converted", "closure_convert"]

P = ParamSpec("P")
R = TypeVar("R")


class Converted(Generic[P, R]):
    """A function whose captured values are its last arguments; made by `closure_convert`.

    `converted.__wrapped__` is the function itself, which a copy that was pickled does not have.

    Example:
        >>> import freevars.jax as fv
        >>> a = 3.0
        >>> converted, hoisted = fv.closure_convert(lambda x: a * x, 1.0)
        >>> isinstance(converted, fv.Converted), converted.__wrapped__(2.0)
        (True, 6.0)
    """

    __wrapped__: Callable[P, R]

    def __init__(
        self,
        fun: Callable[P, R],
        program: Program,
        values: tuple[Any, ...],
        hoisted: tuple[int, ...],
    ) -> None:
        self.__name__ = self.__qualname__ = plain_name(fun)
        self.__doc__ = getattr(fun, "__doc__", None)
        self.__module__ = getattr(fun, "__module__", __name__)
        self.__wrapped__ = fun
        # Not the signature of `fun`: the hoisted values follow its arguments.
        self.__signature__ = _SIGNATURE
        self._program = program
        self._hoisted = hoisted
        self._n_args = len(program.inputs.tree.children())
        self._n_all = self._n_args + len(hoisted)
        # The values that are not hoisted, at their positions among all.
        inside = [] if len(hoisted) == len(values) else list(values)
        for i in hoisted if inside else ():
            inside[i] = None
        self._constants = tuple(inside)

    def __call__(self, *args_and_hoisted: Any) -> R:
        n = self._n_args
        if len(args_and_hoisted) != self._n_all:
            self._refuse_count(len(args_and_hoisted))
        values: Any = args_and_hoisted[n:]
        if self._constants:
            values = self._with_constants(values)
        try:
            result: R = self._program(values, args_and_hoisted[:n])
        except StructureError as error:
            if hasattr(self, "__wrapped__"):
                add_name(error, self.__wrapped__, args_and_hoisted[:n])
            raise
        return result

    def _with_constants(self, hoisted: tuple[Any, ...]) -> Sequence[Any]:
        if not hoisted:
            return self._constants
        return tuple(replaced(self._constants, self._hoisted, hoisted))

    def _refuse_count(self, got: int) -> None:
        message = (
            f"{self.__name__}, converted, takes {self._n_args} arguments and {len(self._hoisted)}"
            " hoisted"
            f" values, {self._n_all} in all, got {got}. Call it as"
            " converted(*args, *hoisted)."
        )
        raise StructureError(message)

    def __copy__(self) -> Self:
        return self._with(self._constants)

    def __deepcopy__(self, memo: Any) -> Self:
        return self._with(copy.deepcopy(self._constants, memo))

    def _with(self, constants: tuple[Any, ...]) -> Self:
        """The same function over other constants."""
        made = object.__new__(type(self))
        vars(made).update(vars(self), _constants=constants)
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in _NOT_SENT}
        return {**state, "_constants": tuple(map(store, self._constants))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        constants = tuple(map(restore, state["_constants"]))
        vars(self).update(state, _constants=constants, __signature__=_SIGNATURE)

    def __repr__(self) -> str:
        inputs = ", ".join(map(describe, self._program.inputs.types))
        hoisted = ", ".join(describe(self._program.value_types[i]) for i in self._hoisted)
        return f"<converted {self.__name__}({inputs}; hoisted: {hoisted or 'none'})>"


_NOT_SENT = {"__wrapped__", "__signature__"}  # a pickled one is its program, not the function
_SIGNATURE = inspect.Signature(
    [inspect.Parameter("args_and_hoisted", inspect.Parameter.VAR_POSITIONAL)]
)


def closure_convert(
    fun: Callable[P, R], *example_args: Any, hoist: Hoist = "traced"
) -> tuple[Converted[P, R], list[Any]]:
    """A function that takes the values that `fun` captures as arguments, and these values.

    `converted(*args, *hoisted)` equals `fun(*args)`, in value and in every derivative, and other
    values of the same types may stand for `hoisted`.

    Args:
        fun: any callable, pure. It runs once, on tracers.
        *example_args: pytrees that fix structure, shapes and dtypes. `jax.ShapeDtypeStruct` will
            not do for an array; a leaf that JAX does not take as an array (a string, a function,
            None, a dtype) is static: `fun` sees it as it is, and each call must bring an equal one.
        hoist: "traced" for the tracers that `fun` meets, of any dtype and any transformation, while
            concrete arrays stay inside as constants; "all" for every array met, concrete
            `jax.Array` and NumPy arrays too, so that the list is the same inside and outside a
            transformation; "floating" for those of floating or complex dtype, and what is traced;
            "differentiable" for the tracers that a derivative may flow into, the list that
            `jax.closure_convert` gives; or a function that decides for each value. Python numbers
            and NumPy scalars are part of the program in all of them.

    Returns:
        `(converted, hoisted)`: `hoisted` is a list of arrays, each once, in the order in which
        `fun` first reads them; a value that only dead code reads is not in it. What a custom
        derivative rule inside `fun` holds counts as read, along with what its function captures.

    Raises:
        TypeError: `fun` is not callable.
        ValueError: `hoist` is none of these policies.
        freevars.errors.StructureError: a call brings another structure, shape, dtype, static leaf
            or number of values than the example; the error names the first path that differs.
        freevars.errors.CaptureError: `fun` captures a mutable reference, or a function inside it
            that has a `custom_vjp`, or a rule that cannot be traced alone, captures a traced value.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax as fv
        >>> def slope(w):
        ...     converted, hoisted = fv.closure_convert(lambda x: w * x**2, 1.0)
        ...     return converted(3.0, *hoisted)
        >>> print(jax.grad(slope)(2.0))
        9.0
    """
    policy = policy_of(hoist)
    program, values = convert(fun, example_args)
    which = tuple([i for i, v in enumerate(values) if policy(v)])
    return Converted(fun, program, values, which), [values[i] for i in which]


def add_name(error: StructureError, fun: Callable[..., Any], args: Sequence[Any]) -> None:
    """Add the name of the captured value that an error is about, by tracing `fun` again."""
    if error.captured is None:
        return
    try:
        traced = trace(fun, args)
        value = traced.values[error.captured]
        text = described(fun, value, traced.jaxpr, traced.values)
    except Exception:  # noqa: BLE001 (what is being raised matters more than its name)
        return
    _, colon, rest = str(error).partition(": expected ")
    error.args = (f"captured value {error.captured} of {plain_name(fun)}, {text}{colon}{rest}",)
