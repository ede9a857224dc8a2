"""What autograd's tape tells about a run of `fun`: tensors that came past the watch, and inner
derivatives whose paths run outside of `fun`.

Not here: watching the run itself (`discovery.py`, `substitution.py`).
"""

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from freevars.errors import CaptureError
from freevars.torch import _compat, _modes
from freevars.torch._describe import Line, describe

__all__ = [
    "check_autograd_graph",
    "has_custom_functions",
    "hidden_path",
    "leaves_behind",
    "nodes_behind",
    "not_hoisted",
]

Edge = tuple[Any, int]


def check_autograd_graph(
    outputs: Iterable[Tensor],
    known: Collection[Tensor],
    made: Callable[[Tensor], bool],
    fun: Any,
    replaced: Container[int] = (),
) -> None:
    """Refuses outputs whose tape ends in a tensor that is neither one of `known` nor `made` by
    `fun`: a captured tensor that was read where nothing could see or replace it. `replaced` are
    those, by id, that other tensors stand for. With torch.func there is one tape a level."""
    levels = _compat.unwrap if _compat.functorch_active() else _only
    stops: set[Edge] = set()
    leaves: set[int] = set()
    for t in known:
        for u in levels(t):
            node = u.grad_fn
            if node is None:
                leaves.add(id(u))
            else:
                stops.add((node, u.output_nr))
    edges: list[tuple[Any, int]] = [(u.grad_fn, u.output_nr) for t in outputs for u in levels(t)]
    seen: set[Any] = {None}
    cannot_see = "custom Functions" in _modes.broken
    for edge in edges:  # grows while it is walked
        node = edge[0]
        if node in seen or (stops and edge in stops):
            continue
        seen.add(node)
        following = node.next_functions
        if cannot_see and _compat.is_custom_function_node(node):
            raise CaptureError(_modes.broken_message("custom Functions"))
        if following:
            edges += following
        elif hasattr(node, "variable"):
            leaf = node.variable
            if id(leaf) not in leaves and not made(leaf) and not _is_given_back(node, known):
                not_seen = id(leaf) in replaced
                raise CaptureError((_not_replaced if not_seen else not_hoisted)(leaf, fun))


def hidden_path(
    outputs: Iterable[Tensor], inputs: Sequence[Tensor], captured: Iterable[Tensor], fun: Any
) -> str | None:
    """What is wrong with `torch.autograd.grad(outputs, inputs)` inside `fun`, where the path to an
    input, a captured tensor, runs through another captured tensor that was computed from it
    outside: as arguments the two are independent, and that path is gone."""
    if not inputs:
        return None
    wanted = {_edge(u): u for u in inputs}
    derived = {_edge(t): t for t in captured if t.grad_fn is not None}
    met = [derived[e] for e in _walk([_edge(t) for t in outputs], derived) if e in derived]
    for t in met:
        for edge in _walk([_edge(t)], ()):
            u = wanted.get(edge)
            if u is not None and u is not t:
                return (
                    f"expected an inner derivative with respect to {describe(u, fun)} that has "
                    f"all its paths inside the function, got {describe(t, fun)}, which was "
                    "computed from it outside. Compute that inside the function, or detach it; "
                    "call torch.func.vjp inside too, for its pullback holds such a path."
                )
    return None


def has_custom_functions(output: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether the tape of `output`, back to `inputs`, holds a custom Function."""
    stops = set(map(_edge, inputs))
    nodes = (edge[0] for edge in _walk([_edge(output)], stops) if edge not in stops)
    return any(map(_compat.is_custom_function_node, nodes))


def leaves_behind(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The leaves in which the tapes of `tensors` end."""
    return [node.variable for node in nodes_behind(tensors) if hasattr(node, "variable")]


def nodes_behind(tensors: Iterable[Tensor]) -> list[Any]:
    """The nodes of the tapes of `tensors`, each once."""
    nodes: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen: set[Any] = {None, *nodes}
    for node in nodes:  # grows while it is walked
        following = {n for n, _ in node.next_functions} - seen
        seen |= following
        nodes += following
    return nodes


def _edge(t: Tensor) -> Edge:
    return (id(t), 0) if t.grad_fn is None else (t.grad_fn, t.output_nr)


def _walk(starts: list[Edge], stops: Container[Edge]) -> Iterator[Edge]:
    """The edges of the tape from `starts`, not beyond `stops`; a leaf as `_edge` has it."""
    edges = list(starts)
    seen: set[Edge] = set()
    for edge in edges:  # grows while it is walked
        if edge in seen or edge[0] is None:
            continue
        seen.add(edge)
        leaf = getattr(edge[0], "variable", None)
        yield edge if leaf is None else (id(leaf), 0)
        if edge not in stops and leaf is None and not isinstance(edge[0], int):
            edges += edge[0].next_functions


def _only(t: Tensor) -> tuple[Tensor]:
    return (t,)


def _is_given_back(node: Any, known: Iterable[Tensor]) -> bool:
    """Whether one of `known` ends the tape in `node` and is not its variable: what saved a leaf
    under hooks (`save_on_cpu`, a checkpoint in another) gives another object back."""
    with _compat.unseen():  # our own look is no read
        leaves = (t for t in known if t.is_leaf and t.requires_grad and not _compat.is_wrapped(t))
        return any(torch.autograd.graph.get_gradient_edge(t).node is node for t in leaves)


def _not_replaced(t: Tensor, fun: Any) -> str:
    return (
        "expected every read of a captured tensor to go through PyTorch's Python API, got one that "
        f"does not, of {describe(t, fun)}: in a run before, whose result the function keeps "
        "(functools.lru_cache), in a C++ extension, or, from PyTorch 2.14 on, in a custom Function "
        "whose `apply` was kept under another name before freevars.torch was imported. Compute "
        "what is kept before, so that it is captured itself; else pass the tensor as an argument, "
        "or import freevars.torch first, or call `apply` on the Function itself."
    )


def not_hoisted(t: Tensor, fun: Any, line: Line | None = None) -> str:
    return (
        "expected to read the hoisted values and the arguments only, got a tensor that could "
        "carry a "
        f"derivative and was not hoisted: {describe(t, fun, line)}. The example arguments "
        "did not lead "
        "to this branch: convert again with arguments that do, or detach the tensor to declare "
        "it constant."
    )
