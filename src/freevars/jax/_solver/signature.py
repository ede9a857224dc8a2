"""One call of a decorated solver, taken apart: the function, its extra arguments, `x0`, the
options.

The signature of the solver decides. What it collects in `*args` and `**kwargs`, or takes as a tuple
named `args` as scipy's solvers do, it passes on to the function; what it names otherwise is its
own. Not here: derivatives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from freevars.jax import _compat
from freevars.jax._convert.arguments import ArgSpec, mismatch
from freevars.jax._convert.static import as_static, from_static
from freevars.jax._solver.problem import Problem

__all__ = ["SolverCall", "SolverSignature", "as_unknown", "like"]

_COLLECTED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class SolverCall(NamedTuple):
    """What one call brings. The leaves of the options are arrays, the rest of them is sealed."""

    fun: Callable[..., Any]
    x0: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: dict[str, Any]


class SolverSignature:
    """How a solver is called: `solver(fun, x0, ...)`, whatever it calls these two."""

    def __init__(self, solver: Callable[..., Any]) -> None:
        if not callable(solver):
            msg = f"a solver is a function solver(fun, x0, ...), got {solver!r}."
            raise TypeError(msg)
        self._solver = solver
        self._signature = inspect.signature(solver)
        parameters = list(self._signature.parameters.values())
        if parameters and parameters[0].name in ("self", "cls"):
            msg = (
                f"{solver!r} is a method that is not bound yet. Its object may change, and what is"
                " compiled would not notice: decorate the bound method instead, solve ="
                " decorator(thing.method), or a function that takes what it needs as options."
            )
            raise TypeError(msg)
        positional = [p for p in parameters[:2] if p.kind not in (*_COLLECTED, p.KEYWORD_ONLY)]
        if len(positional) < 2:  # noqa: PLR2004
            msg = (
                "a solver takes a function and a starting point as its first two arguments, got"
                f" {solver!r} with the signature {self._signature}."
            )
            raise TypeError(msg)

    def take_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SolverCall:
        """Sort what a call brings."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        (_, fun), (_, x0), *rest = bound.arguments.items()
        fun_args: tuple[Any, ...] = ()
        fun_kwargs: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for name, value in rest:
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                fun_kwargs = dict(value)
            elif kind is inspect.Parameter.VAR_POSITIONAL or name == "args":
                fun_args += _as_tuple(value)
            else:
                options[name] = value
        # A Python number stays one: solvers count with it.
        return SolverCall(fun, x0, fun_args, fun_kwargs, as_static(options, _is_array))

    def call(self, problem: Problem, x0: Any, options: dict[str, Any]) -> Any:
        """Call the solver as its user did, with the converted function."""
        args, kwargs = problem.extra()
        given: dict[str, Any] = from_static(options)
        for i, (name, parameter) in enumerate(self._signature.parameters.items()):
            if i == 0:
                given[name] = problem.as_given()
            elif i == 1:
                given[name] = x0
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given[name] = kwargs
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL or name == "args":
                given[name] = args
        bound = inspect.BoundArguments(self._signature, given)
        return self._solver(*bound.args, **bound.kwargs)


def _as_tuple(args: Any) -> tuple[Any, ...]:
    if args is None:
        return ()
    return tuple(args) if isinstance(args, (tuple, list)) else (args,)


def _is_array(x: Any) -> bool:
    return isinstance(x, (_compat.Array, np.ndarray, _compat.Tracer)) and _compat.is_array(x)


def as_unknown(x0: Any, name: str) -> Any:
    """`x0` as arrays of definite floating or complex dtypes."""

    def convert(path: Any, leaf: Any) -> Any:
        where = f"{name}: x0{tree_util.keystr(path)}"
        if not _compat.is_array(leaf):
            msg = f"{where} is {leaf!r}; an unknown is a floating or complex array or number."
            raise TypeError(msg)
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            msg = (
                f"{where} has dtype {dtype}; an unknown is floating or complex, or the solution"
                " could not have a derivative. Start from a float, 1.0 for 1."
            )
            raise TypeError(msg)
        return jnp.asarray(leaf, dtype=dtype)

    return tree_util.tree_map_with_path(convert, x0)


def like(x: Any, x0: Any, name: str) -> Any:
    """`x`, if it is of the structure and types of `x0`; `name` is what an error calls it."""
    arrays, tree = tree_util.tree_flatten(x0)
    types = [_compat.example_type(a) for a in arrays]
    leaves, got = tree_util.tree_flatten(x)
    alike = got == tree and all(map(_compat.is_array, leaves))
    if not (alike and [_compat.example_type(leaf) for leaf in leaves] == types):
        spec = ArgSpec(tree, tuple(types), ())
        hint = " A solver returns an x of the structure, shapes and dtypes of its x0."
        error = mismatch(spec, x, name=name, weak_matters=False, hint=hint)
        if error is not None:
            raise error
    return jax.tree.map(lambda a, b: jnp.asarray(a, dtype=b.dtype), x, x0)
