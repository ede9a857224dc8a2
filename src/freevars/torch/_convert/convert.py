"""Closure conversion: the tensors that a function reads from outside become explicit arguments.

    converted, hoisted = closure_convert(fun, *example_args)
    converted(*args, *hoisted) == fun(*args)

`fun` runs once on the example under a watch (`discovery.py`). `converted` runs it again under
another, which gives it the hoisted values (`substitution.py`); Python control flow is kept. Not
here: the conversion as one value (`_closure.py`).
"""

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from freevars.errors import CaptureError, StructureError
from freevars.torch import _compat, _hooks
from freevars.torch._compat import pytree
from freevars.torch._convert import operators
from freevars.torch._convert.autograd_graph import check_autograd_graph
from freevars.torch._convert.discovery import DiscoveryMode
from freevars.torch._convert.structure import Structure, struct_of
from freevars.torch._convert.substitution import (
    AllocationTracker,
    CarefulSubstitutionMode,
    ForeignTensors,
    SubstitutionMode,
)
from freevars.torch._describe import Line, describe, function_name, reachable
from freevars.torch._hooks import resolve

__all__ = [
    "Converted",
    "Hoist",
    "Rng",
    "closure_convert",
    "differentiable",
    "discover",
    "outside_compiler",
    "policy_of",
]

D = TypeVar("D", bound=DiscoveryMode)
F = TypeVar("F", bound=Callable[..., Any])
Rng = Literal["allow", "error", "replay"]
Hoist = Literal["differentiable", "floating", "all"] | Callable[[Tensor], bool]


def closure_convert(
    fun: Callable[..., Any], *example_args: Any, hoist: Hoist = "differentiable", rng: Rng = "allow"
) -> tuple["Converted", tuple[Tensor, ...]]:
    """Makes the tensors that `fun` reads from outside explicit arguments.

    ``converted(*args, *hoisted)`` equals ``fun(*args)``, in value and in derivatives of any
    order. Each hoisted value has a partial derivative of its own, and a derivative that reaches
    it flows on to the captured tensor.

    Args:
        fun: anything callable. It runs once here, on the example, and again at every call.
        *example_args: any pytree of tensors, numbers and other values.
        hoist: `"differentiable"` hoists the tensors that a derivative could flow into now (they
            require grad, a torch.func transform wraps them, or they carry a forward-mode
            tangent); `"floating"` also every tensor of floating or complex type; `"all"` every
            tensor read; or a function that decides for each tensor. A differentiable tensor that
            it leaves out is a declared constant.
        rng: `"allow"` lets `fun` draw random numbers afresh at each call; `"replay"` gives every
            call the draws of the example run; `"error"` refuses. The conversion leaves the
            generators as they were.

    Returns:
        `converted` and the tuple of hoisted values, each captured tensor once, in order of first
        use.

    Raises:
        CaptureError: `fun` writes in place to a captured tensor, to its argument or to a running
            statistic, changes a captured tensor itself (`requires_grad_`, `.grad`, `.data`, a
            hook), calls `.backward()`, reads a captured tensor where it cannot be replaced
            (TorchScript, a custom operator's own function), captures a nested tensor, returns a
            generator that has yet to run, or takes an inner derivative whose path runs outside of
            it.
        StructureError: an argument or result is a nested tensor; from `converted`, a call with
            another structure, type, shape or number of values.

    Example:
        >>> import torch
        >>> import freevars.torch as fv
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> converted, hoisted = fv.closure_convert(lambda x: (w * x).sum(), torch.ones(2))
        >>> converted(torch.ones(2), torch.tensor([5.0, 7.0]))
        tensor(12.)
    """
    return outside_compiler(_convert, fun, rng)(fun, example_args, hoist, rng)


def outside_compiler(run: F, fun: Callable[..., Any], rng: Rng) -> F:
    """`run`, which calls `fun` under a watch, as it must be called; checks both arguments."""
    if not callable(fun):
        message = f"expected a function to convert, got {type(fun).__name__}."
        raise StructureError(message)
    if rng not in {"allow", "error", "replay"}:
        message = f"expected rng='allow', rng='error' or rng='replay', got {rng!r}."
        raise StructureError(message)
    _hooks.install_hooks()
    chosen: F = _compat.eagerly(run) if _compat.compiling() else run
    return chosen


def policy_of(hoist: Hoist) -> Callable[[Tensor], bool]:
    """Whether a captured tensor is hoisted."""
    if hoist == "differentiable":
        return differentiable
    if hoist == "floating":
        return lambda t: t.is_floating_point() or t.is_complex() or differentiable(t)
    if hoist == "all":
        return lambda _: True
    if callable(hoist):
        return lambda t: bool(hoist(resolve(t)))
    expected = "hoist='differentiable', 'floating', 'all' or a function of a tensor"
    message = f"expected {expected}, got {hoist!r}."
    raise StructureError(message)


def differentiable(t: Tensor) -> bool:
    """Whether a derivative could flow into a captured tensor now."""
    # What a running converted call gives in place of `t` counts as well: `t` itself is not read
    # there.
    given = resolve(t)
    return given is not t or operators.may_carry_derivative(given)


def _convert(
    fun: Callable[..., Any], example: tuple[Any, ...], hoist: Hoist, rng: Rng
) -> tuple["Converted", tuple[Tensor, ...]]:
    structure = Structure(example)
    policy = policy_of(hoist)
    discovery, out, state = discover(fun, example, policy, rng, DiscoveryMode)
    read = [resolve(t) for t in discovery.captured.values()]
    check_autograd_graph(
        outputs_of(out), [*discovery.arguments.values(), *read], discovery.has_made, fun
    )
    out_struct = struct_of(out)
    del read, out  # which hold tensors
    discovery.drop_unheld()
    captured = tuple(t for t in discovery.captured.values() if policy(t))
    hoisted_ids = {id(t) for t in captured}
    # What the policy leaves out although a derivative could flow: the caller's declared constants.
    declared = [
        t for t in discovery.captured.values() if id(t) not in hoisted_ids and differentiable(t)
    ]
    replay = None
    if rng == "replay" and discovery.drew is not None:
        replay = (state, tuple(discovery.generators.values()))
    converted = Converted(
        fun,
        structure,
        captured,
        declared,
        replay,
        constants=[t for t in discovery.captured.values() if id(t) not in hoisted_ids],
        makes_leaves=discovery.makes_leaves,
        out_struct=out_struct,
    )
    converted.first_reads = tuple(discovery.where.get(id(t)) for t in captured)
    return converted, converted.aliases()


def discover(
    fun: Callable[..., Any],
    example: tuple[Any, ...],
    policy: Callable[[Tensor], bool],
    rng: Rng,
    watch: type[D],
) -> tuple[D, Any, Tensor]:
    """One watched run: what it saw, what `fun` returned, and the state of the random generator
    before it, which is that after it too."""
    leaves, spec = pytree.tree_flatten(example)
    # Aliases tell an argument from the same tensor captured.
    arguments = [operators.alias(x) if isinstance(x, Tensor) else x for x in leaves]
    given = [x for x in arguments if isinstance(x, Tensor)]
    discovery = watch(fun, given, policy, rng=rng, constants=policy is not differentiable)
    state = torch.get_rng_state()
    try:
        with discovery.watching():
            out = fun(*pytree.tree_unflatten(arguments, spec))
            discovery.returned(outputs_of(out))
            discovery.run_is_over()
            refuse_hidden(out, lambda t: discovery.is_foreign(t) and policy(t), fun)
    finally:
        if discovery.drew is not None:
            torch.set_rng_state(state)
            for generator, before in discovery.generators.values():
                generator.set_state(before)
    return discovery, out, state


_SIGNATURE = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])


class Converted:
    """`fun` with its captured tensors as trailing arguments; made by `closure_convert`."""

    def __init__(
        self,
        fun: Callable[..., Any],
        structure: Structure | None,
        captured: tuple[Tensor, ...],
        declared: Sequence[Tensor] = (),
        replay: tuple[Tensor, tuple[tuple[torch.Generator, Tensor], ...]] | None = None,
        *,
        constants: Sequence[Tensor] = (),
        makes_leaves: bool = False,
        out_struct: Any = None,
    ) -> None:
        functools.update_wrapper(self, fun, updated=())
        self.__signature__ = _SIGNATURE  # not that of `fun`: the hoisted values follow
        self._fun = fun
        self._structure = structure
        self._captured = captured
        self._keys = tuple(id(t) for t in captured)
        self._types = tuple((t.shape, t.dtype) for t in captured)
        self._declared = declared
        self._outside = ForeignTensors(fun, constants)
        self._replay = replay
        self._makes_leaves = makes_leaves
        # For errors and reports: the line that read each tensor first, and, within a `Closure`, the
        # example, `hoist` and `rng` that it was made with.
        self.first_reads: tuple[Line | None, ...] = (None,) * len(captured)
        self.origin: tuple[tuple[Any, ...], Hoist, Rng] | None = None
        self.in_struct = None if structure is None else structure.struct
        self.out_struct = out_struct

    def aliases(self) -> tuple[Tensor, ...]:
        """The captured tensors, each with a place of its own on the tape."""
        return tuple(operators.alias(t) for t in self._captured)

    def __repr__(self) -> str:
        name, n = function_name(self._fun), len(self._keys)
        return f"<{name} with {n} captured values as trailing arguments>"

    def __call__(self, *args: Any) -> Any:
        if _compat.compiling():
            return self._eagerly(*args)
        return self._call(args)

    @_compat.eagerly  # type: ignore[untyped-decorator]
    def _eagerly(self, *args: Any) -> Any:
        return self._call(args)

    def _call(self, args: tuple[Any, ...]) -> Any:
        _hooks.hook_compiler()
        n = len(args) - len(self._keys)
        table = self._table(args, n)
        arguments = args[:n]
        if self._structure is None:
            leaves = pytree.tree_leaves(arguments)
        else:
            leaves = self._structure.check(arguments, function_name(self._fun))
        if any(id(x) in table for x in leaves):
            arguments = self._aliased(arguments, table)
            leaves = pytree.tree_leaves(arguments)
        read = [*(x for x in leaves if isinstance(x, Tensor)), *self._declared, *table.values()]
        known = [resolve(t) for t in read]  # within another converted call, what that gives
        mode = self._mode(table, known)
        with self._memory(mode), mode.reraising_refusals():
            run = self._fun if self._replay is None else self._replayed
            out = run(*arguments)
        if type(out) is Tensor:  # no pytree walk for a plain tensor
            out = table.get(id(out), out)
        else:
            refuse_hidden(out, lambda t: id(t) in table, self._fun)
            out = pytree.tree_map_only(Tensor, mode.replace, out)
        mode.known = ()  # a graph may keep the mode, but not the arguments
        check_autograd_graph(outputs_of(out), known, mode.has_made, self._fun)
        return out

    def _memory(self, mode: SubstitutionMode) -> AbstractContextManager[Any]:
        if not self._makes_leaves:
            return nullcontext()
        mode.memory = AllocationTracker()
        return mode.memory

    def _mode(self, table: dict[int, Tensor], known: Sequence[Tensor]) -> SubstitutionMode:
        if torch.is_grad_enabled() and not _compat.transforms_active():
            return SubstitutionMode(self._fun, table, known, self._outside)
        return CarefulSubstitutionMode(self._fun, table, known, self._outside)

    def _table(self, args: tuple[Any, ...], n: int) -> dict[int, Tensor]:
        """Which tensor to give for which captured one; raises where the hoisted values do not
        fit."""
        keys = self._keys
        expected = max(n, 0) if self._structure is None else self._structure.count
        if n != expected:
            message = (
                f"{function_name(self._fun)} expected {expected} arguments and {len(keys)} hoisted "
                f"values, got {len(args)} values in all."
            )
            raise StructureError(message)
        values = args[n:]
        for i, (value, (shape, dtype)) in enumerate(zip(values, self._types, strict=True)):
            is_plain = isinstance(value, Tensor) and not value.is_nested
            if not is_plain or value.shape != shape or value.dtype is not dtype:
                captured = describe(self._captured[i], self._fun, self.first_reads[i])
                message = (
                    f"hoisted value {i} expected like {captured}, got {Structure.shown(value)}."
                )
                raise StructureError(message)
        table = dict(zip(keys, values, strict=True))
        for key, value in table.items():
            if id(value) in table:  # a captured tensor itself, which reading would replace again
                table[key] = operators.alias(value)
        return table

    def _aliased(self, arguments: tuple[Any, ...], table: dict[int, Tensor]) -> tuple[Any, ...]:
        aliased: tuple[Any, ...] = pytree.tree_map_only(
            Tensor, lambda t: operators.alias(t) if id(t) in table else t, arguments
        )
        return aliased

    def _replayed(self, *arguments: Any) -> Any:
        assert self._replay is not None  # noqa: S101 (for the type checker)
        state, generators = self._replay
        before = torch.get_rng_state()
        others = [(generator, generator.get_state()) for generator, _ in generators]
        try:
            torch.set_rng_state(state)
            for generator, first in generators:
                generator.set_state(first)
            return self._fun(*arguments)
        finally:
            torch.set_rng_state(before)
            for generator, now in others:
                generator.set_state(now)


# What a function may return before it has run: generators, `map`, coroutines.
_LATER = (Iterator, AsyncIterator, Awaitable)


def refuse_hidden(out: Any, captured: Callable[[Tensor], bool], fun: Any) -> None:
    """Refuses captured tensors that `fun` returned inside an object that is no pytree."""
    for leaf in pytree.tree_leaves(out):
        if isinstance(leaf, Tensor | int | float | complex | str | bytes | type(None)):
            continue
        if isinstance(leaf, _LATER):
            message = (
                f"expected a function that has run when it returns, got a {type(leaf).__name__}, "
                "which reads its values later, where they cannot be replaced. Return a list, or "
                "run it inside."
            )
            raise CaptureError(message)
        for t, name in reachable(leaf).values():
            if captured(t):
                message = (
                    "expected captured tensors to be returned in containers that PyTorch's pytrees "
                    f"know, got {describe(t, fun)} inside a {type(leaf).__name__} (at {name}), "
                    "where it cannot be replaced. Return a tuple, list or dict, or register the "
                    "class."
                )
                raise CaptureError(message)


def outputs_of(out: Any) -> list[Tensor]:
    """The tensors that a function returned."""
    if isinstance(out, Tensor):
        return [out]
    return [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
