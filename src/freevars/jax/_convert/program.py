"""A traced function without its captured values: the static part of every closure.

Programs are interned: two that compute the same thing are one object, so they compare and hash by
identity and share one compiled version. The table holds them weakly. The most recent ones that hold
no array or function of the user's are also held strongly, so that a loop which creates, calls and
drops a closure in each iteration compiles once. Not here: tracing a user's function, and who holds
the captured values.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax import tree_util

from freevars.errors import StructureError
from freevars.jax import _compat
from freevars.jax._convert.arguments import (
    ArgSpec,
    combine,
    describe,
    fit,
    int_ranges,
    mismatch,
    partition,
    same_static,
    too_large,
)
from freevars.jax._convert.static import Static

__all__ = ["Program"]

_RECENT: OrderedDict[Program, None] = OrderedDict()
_RECENT_SIZE = 32
_RECENT_LOCK = threading.Lock()  # no code of the user's runs under it


class _Ref(weakref.ref["Program"]):
    """A program in the table, which removes itself."""

    __slots__ = ("key",)

    key: Hashable


# A plain dict, whose `setdefault` is safe between threads: comparing keys can run the user's code
# (the equality of a static argument), during which no lock may be held.
_PROGRAMS: dict[Hashable, _Ref] = {}


def _ref(program: Program, key: Hashable) -> _Ref:
    ref = _Ref(program, _forget)
    ref.key = key
    return ref


def _forget(ref: weakref.ref[Program]) -> None:
    if isinstance(ref, _Ref) and _PROGRAMS.get(ref.key) is ref:
        _PROGRAMS.pop(ref.key, None)


def _keep(program: Program) -> None:
    dropped = None  # let go after the lock is free
    with _RECENT_LOCK:
        _RECENT[program] = None
        _RECENT.move_to_end(program)
        if len(_RECENT) > _RECENT_SIZE:
            dropped, _ = _RECENT.popitem(last=False)
    del dropped


class Program:
    """What a converted function computes, from captured values and arguments.

    Equality is identity: `intern` returns the program made earlier with the same key.
    """

    def __init__(
        self,
        jaxpr: Any,
        fixed: Sequence[Any],
        value_types: tuple[Any, ...],
        inputs: ArgSpec,
        outputs: ArgSpec,
        name: str,
        traced: Any,
    ) -> None:
        self.traced = traced  # the same with custom rules as they were traced (`traced_rules`)
        self.jaxpr = jaxpr  # reads fixed constants, then captured values, then arguments
        self.fixed = tuple(fixed)  # arrays that custom rules hold too: they cannot be replaced
        self.value_types = value_types
        self.inputs = inputs
        self.outputs = outputs
        self.name = name
        # JAX flattens arguments faster than any Python code, and for types that it has seen before
        # it checks them as well; so pass them as they are wherever it accepts them.
        self.flat = bool(inputs.statics) or not _hashable(inputs.tree)
        self._direct = not self.flat and not outputs.statics
        self._int_values, self._int_args = int_ranges(value_types), int_ranges(inputs.types)

    @classmethod
    def intern(cls, key: Hashable, make: Callable[[], Program], *, keep: bool) -> Program:
        """The program of this key, made now if there is none; `keep` says that it may outlive its
        last use, because it holds nothing of the user's."""
        program = None
        while program is None:
            ref = _PROGRAMS.get(key)
            if ref is None:
                made = make()
                ref = _PROGRAMS.setdefault(key, _ref(made, key))
            program = ref()
            if program is None:
                _forget(ref)
        if keep:
            _keep(program)
        return program

    def __repr__(self) -> str:
        return f"<program {self.name} at {id(self):#x}>"

    @functools.cached_property
    def _run(self) -> Callable[..., Any]:
        """The compiled function. It holds the program weakly: the program owns it."""
        ref = weakref.ref(self)
        method = Program._run_leaves if self.flat else Program._run_tree

        def call(values: Sequence[Any], *args: Any) -> Any:
            program = ref()
            assert program is not None  # noqa: S101 (who calls `_run` holds the program)
            return method(program, values, *args)

        call.__name__ = call.__qualname__ = self.name
        return jax.jit(call, inline=True)

    def __call__(self, values: Sequence[Any], args: tuple[Any, ...]) -> Any:
        """The result of the function for these captured values and arguments."""
        if self._int_values or self._int_args:
            self._refuse_large_ints(values, args)
        try:
            if self._direct:
                return self._run(values, *args)
            return self._call_with_statics(values, args)
        except TypeError as error:
            if not isinstance(error, StructureError):
                # JAX refuses, say, a string where an array was: say where and what.
                self._check(values, args)
            raise

    def _call_with_statics(self, values: Sequence[Any], args: tuple[Any, ...]) -> Any:
        if self.flat:
            arrays, tree, statics = partition(args)
            if tree != self.inputs.tree or not _equal_statics(statics, self.inputs.statics):
                self._check(values, args)
            results = self._run(values, *arrays)
        else:
            results = self._run(values, *args)
        return combine(self.outputs, results) if self.outputs.statics else results

    def _refuse_large_ints(self, values: Sequence[Any], args: tuple[Any, ...]) -> None:
        """Raise where a Python number does not fit, as JAX does when one is combined with an array;
        once traced, a number can only be cast."""
        for name, got, expected, ranges in (
            ("captured value ", values, self.value_types, self._int_values),
            ("args", partition(args)[0], self.inputs.types, self._int_args),
        ):
            i = too_large(got, ranges)
            if i is not None:
                path = i if got is values else _path_of(args, i)
                message = (
                    f"{name}{path} of {self.name}: the Python number {got[i]} does not fit"
                    f" {describe(expected[i])}, the type that it was converted for."
                )
                raise OverflowError(message)

    # The compiled functions. These run once for each combination of argument types, so their type
    # checks cost later calls nothing.

    def _run_tree(self, values: Sequence[Any], *args: Any) -> Any:
        leaves, tree = tree_util.tree_flatten(args)
        if tree != self.inputs.tree:
            self._check(values, args)
        return self._run_leaves(values, *leaves, whole=args)

    def _run_leaves(self, values: Sequence[Any], *leaves: Any, whole: Any = None) -> Any:
        fitted = self._fit(leaves, self.inputs.types)
        captured = self._fit(values, self.value_types)
        if fitted is None or captured is None:
            self._check(values, combine(self.inputs, leaves) if whole is None else whole)
        operands = [*self.fixed, *captured, *fitted]
        try:
            results = _compat.evaluate(self.jaxpr, operands)
        except ValueError as error:
            axes = self._newly_varying(operands)
            if not axes:
                raise
            raise StructureError(self._varying_message(axes)) from error
        return results if self.outputs.statics else combine(self.outputs, results)

    def _newly_varying(self, operands: Sequence[Any]) -> list[str]:
        """The named axes over which an operand varies, and did not on the example."""
        pairs = zip(operands, self.jaxpr.invars, strict=True)
        axes = [_compat.varying_axes(x) - _compat.varying_axes(v.aval) for x, v in pairs]
        return sorted(frozenset[str]().union(*axes))

    def _varying_message(self, axes: Sequence[str]) -> str:
        names = ", ".join(map(repr, axes))
        return (
            f"{self.name} expected arguments that are the same on all devices of the axis {names}, "
            "as on the example (check_vma=True), got one that varies. Convert within the "
            "shard_map, on an example that varies as the arguments do; give a solver an x0 that "
            f'varies as the captured values do: jax.lax.pcast(x0, ({names},), to="varying").'
        )

    def _fit(self, xs: Sequence[Any], types: Sequence[Any]) -> Any:
        if len(xs) != len(types):
            return None
        weak = self._weak_matters
        fitted = [fit(x, t, weak_matters=weak) for x, t in zip(xs, types, strict=True)]
        return None if any(x is None for x in fitted) else fitted

    @functools.cached_property
    def has_custom_vjp(self) -> bool:
        """Whether a rule in it is for reverse mode only."""
        return _compat.has_custom_vjp(self.jaxpr)

    @functools.cached_property
    def has_custom_vmap(self) -> bool:
        """Whether a rule in it is for batches, whose function JAX cannot linearise."""
        return _compat.has_custom_vmap(self.jaxpr)

    @functools.cached_property
    def _weak_matters(self) -> bool:
        """Whether a weakly typed input decides the dtype in which something is computed."""
        return _compat.converts_weak_values(self.jaxpr)

    def _check(self, values: Sequence[Any], args: tuple[Any, ...]) -> None:
        """Raise the error for the first argument or captured value that does not fit."""
        from freevars.jax._describe.reads import first_read  # noqa: PLC0415 (see `described`)

        weak = self._weak_matters
        error = mismatch(self.inputs, tuple(args), name="args", weak_matters=weak)
        if error is not None:
            raise error
        if len(values) != len(self.value_types):
            message = f"{self.name} has {len(self.value_types)} captured values, got {len(values)}."
            raise StructureError(message)
        for i, (value, expected) in enumerate(zip(values, self.value_types, strict=True)):
            if not _compat.is_array(value) or fit(value, expected, weak_matters=weak) is None:
                message = (
                    f"captured value {i} of"
                    f" {self.name}{first_read(self.jaxpr, len(self.fixed) + i)}:"
                    f" expected {describe(expected)}, got {describe(value)}."
                    " Pass a value of the type that was captured."
                )
                mismatched = StructureError(message)
                mismatched.captured = i
                raise mismatched


def _path_of(args: tuple[Any, ...], i: int) -> str:
    keyed = tree_util.tree_leaves_with_path(args)
    return [tree_util.keystr(path) for path, leaf in keyed if _compat.is_array(leaf)][i]


def _equal_statics(got: Sequence[tuple[int, Any]], expected: Sequence[tuple[int, Static]]) -> bool:
    return len(got) == len(expected) and all(
        i == j and same_static(b, a) for (i, a), (j, b) in zip(got, expected, strict=True)
    )


def _hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True
