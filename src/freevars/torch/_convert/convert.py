"""Closure conversion: the tensors that a function reads from outside become explicit arguments.

    converted, hoisted = closure_convert(fun, *example_args)
    converted(*args, *hoisted) == fun(*args)

`fun` runs once on the example under a watch (`discovery.py`). `converted` runs it again under
another, which gives it the hoisted values (`substitution.py`); Python control flow is kept. Not
here: the conversion as one value (`_closure.py`).
"""

import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from freevars._contract import Hoist, check_callable, hoist_policy
from freevars.torch import _compat, _hooks
from freevars.torch._compat import pytree
from freevars.torch._convert import operators
from freevars.torch._convert.autograd_graph import check_autograd_graph
from freevars.torch._convert.converted import Converted, Rng, Run
from freevars.torch._convert.discovery import DiscoveryMode
from freevars.torch._convert.draws import Draws, state_of
from freevars.torch._convert.outputs import outputs_of, refuse_hidden
from freevars.torch._convert.places import Search
from freevars.torch._convert.structure import Structure, struct_of
from freevars.torch._modes import resolve
from freevars.torch._selftest import check_release

__all__ = [
    "Converted",
    "Rng",
    "closure_convert",
    "differentiable",
    "discover",
    "policy_of",
    "prepare",
]

D = TypeVar("D", bound=DiscoveryMode)
P = ParamSpec("P")
R = TypeVar("R")


def closure_convert(
    fun: Callable[P, R], *example_args: Any, hoist: Hoist = "differentiable", rng: Rng = "allow"
) -> tuple[Converted[P, R], list[Tensor]]:
    """A function that takes the tensors that `fun` captures as arguments, and these tensors.

    `converted(*args, *hoisted)` equals `fun(*args)`, in value and in derivatives of any order. Each
    hoisted value has a partial derivative of its own, and a derivative that reaches it flows on to
    the captured tensor; the parameters of a module stand for themselves. `converted(*args)` uses
    the hoisted values returned here, for adjoints that list them beside; inside a custom Function
    that was not given them it is refused. What is hoisted are the tensors met here: binding a
    variable to another tensor later changes nothing.

    Args:
        fun: any callable. It runs once here, on the example, and again at every call.
        *example_args: any pytree of tensors, numbers and other values.
        hoist: "differentiable" for the tensors that a derivative could flow into now (they require
            grad, a torch.func transform wraps them, or they carry a forward-mode tangent); "traced"
            is the same here, because nothing tells the two apart in PyTorch; "floating" for every
            tensor of floating or complex dtype besides; "all" for every tensor read; or a function
            that decides for each tensor. A differentiable tensor that it leaves out is a declared
            constant.
        rng: "allow" lets `fun` draw random numbers afresh at each call; "replay" gives every call
            the draws of the example run; "error" refuses. The conversion leaves the generators as
            they were.

    Returns:
        `(converted, hoisted)`: `hoisted` is a list of tensors, each once, in the order in which
        `fun` first reads them.

    Raises:
        TypeError: `fun` is not callable.
        ValueError: `hoist` or `rng` is none of these.
        freevars.errors.CaptureError: `fun` writes in place to a captured tensor, to its argument or
            to a running statistic, changes a captured tensor itself (`requires_grad_`, `.grad`,
            `.data`, a hook), calls `.backward()`, reads a captured tensor where it cannot be
            replaced (TorchScript, a custom operator's own function), captures a nested tensor,
            returns a generator that has yet to run, or takes an inner derivative whose path runs
            outside of it; from `converted`, a captured tensor is gone from its variable.
        freevars.errors.StructureError: an argument or result is a nested tensor; from `converted`,
            a call with another structure, dtype, shape or number of values.

    Example:
        >>> import torch, freevars.torch as fv
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> converted, hoisted = fv.closure_convert(lambda x: (w * x).sum(), torch.ones(2))
        >>> converted(torch.ones(2), torch.tensor([5.0, 7.0]))
        tensor(12.)
    """
    converted: Any
    converted, hoisted = _convert(fun, example_args, hoist, rng)
    return converted, list(hoisted)


def policy_of(hoist: Hoist) -> Callable[[Tensor], bool]:
    """Whether a captured tensor is hoisted."""
    policy = hoist_policy(hoist, _NAMED)
    return (lambda t: bool(policy(resolve(t)))) if policy is hoist else policy


def differentiable(t: Tensor) -> bool:
    """Whether a derivative could flow into a captured tensor now."""
    # What a running converted call gives in place of `t` counts as well: `t` itself is not read
    # there.
    given = resolve(t)
    return given is not t or operators.may_carry_derivative(given)


_NAMED: dict[str, Callable[[Tensor], bool]] = {
    "differentiable": differentiable,
    # What a transform wraps can be told from what it differentiates for floating types alone, and
    # of these it may differentiate all.
    "traced": differentiable,
    "floating": lambda t: t.is_floating_point() or t.is_complex() or differentiable(t),
    "all": lambda _: True,
}


@_compat.uncompiled
def _convert(
    fun: Callable[..., Any], example: tuple[Any, ...], hoist: Hoist, rng: Rng
) -> tuple[Converted[..., Any], tuple[Tensor, ...]]:
    prepare(fun, rng)
    structure = Structure(example)
    policy = policy_of(hoist)
    search = Search(fun)  # before the run, which may put its own tensors into the places
    discovery, out, draws = discover(fun, example, policy, rng, DiscoveryMode)
    read = [resolve(t) for t in discovery.captured.values()]
    check_autograd_graph(
        outputs_of(out), [*discovery.arguments.values(), *read], discovery.has_made, fun
    )
    out_struct = struct_of(out)
    del read, out  # which hold tensors
    discovery.drop_unheld()
    gathered = [t for t, _ in discovery.name_sharded(search)]
    captured = tuple(t for t in discovery.captured.values() if policy(t))
    hoisted_ids = {id(t) for t in captured}
    # What the policy leaves out although a derivative could flow: the caller's declared constants.
    declared = [
        t for t in discovery.captured.values() if id(t) not in hoisted_ids and differentiable(t)
    ]
    made = discovery.made_and_alive()
    by = {k: names for k, t in made.items() if (names := _differentiated_by(t))}
    run = Run(
        out_struct=out_struct,
        replay=draws if rng == "replay" and discovery.drew is not None else Draws(),
        makes_leaves=discovery.makes_leaves or bool(discovery.leaves),
        normalises=discovery.normalises,
        communicates=discovery.communicates,
        kept=search.kept(made),
        left={k: weakref.ref(made[k]) for k in by},
        careful=any(names != {"autograd"} for names in by.values()),
    )
    del made
    converted: Converted[..., Any] = Converted(
        fun,
        structure,
        search,
        captured,
        run,
        declared=declared,
        gathered=gathered,
        constants=[t for t in discovery.captured.values() if id(t) not in hoisted_ids],
        first_reads=[discovery.where.get(id(t)) for t in captured],
    )
    return converted, converted.hoisted


def prepare(fun: Callable[..., Any], rng: Rng) -> None:
    """Refuses what no watch can run, and makes sure that a watch sees what runs."""
    check_callable(fun)
    if rng not in {"allow", "error", "replay"}:
        message = f'rng: expected "allow", "error" or "replay", got {rng!r}.'
        raise ValueError(message)
    _hooks.install_hooks()
    check_release()


def _differentiated_by(t: Tensor) -> set[str]:
    """The transforms that take a derivative by `t`, and the tape."""
    return {name for name, by in _compat.layers(t) if by}


def discover(
    fun: Callable[..., Any],
    example: tuple[Any, ...],
    policy: Callable[[Tensor], bool],
    rng: Rng,
    watch: type[D],
) -> tuple[D, Any, Draws]:
    """One watched run: what it saw, what `fun` returned, and what it drew, which is taken back."""
    leaves, spec = pytree.tree_flatten(example)
    # Aliases tell an argument from the same tensor captured.
    arguments = [operators.alias(x) if isinstance(x, Tensor) else x for x in leaves]
    given = [x for x in arguments if isinstance(x, Tensor)]
    discovery = watch(fun, given, policy, rng=rng, constants=policy is not differentiable)
    before = state_of(None)
    try:
        with discovery.watching():
            out = fun(*pytree.tree_unflatten(arguments, spec))
            discovery.returned(outputs_of(out))
            discovery.run_is_over()
            refuse_hidden(out, lambda t: discovery.is_foreign(t) and policy(t), fun)
    finally:
        draws = Draws.since([before, *discovery.generators.values()])
        if discovery.drew is not None:
            draws.take_back()
    return discovery, out, draws
