"""The inputs of one call of a solver, as one list of tensors: the values of its condition.

In this order: x0; the tensors among the arguments of `fun` and among the solver's options; the
hoisted values of `fun`, and of the user's condition if there is one; and what the solver and the
`linear_solve` can reach themselves (the object of a method, a closure) and a derivative could flow
into. The solution depends on the arguments and the hoisted values. If it is a solution, it does not
depend on the rest: where a derivative with respect to the rest is needed, that is checked, and the
derivative is zero.

Not here: what is done with the values (`problem.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor

from freevars._solvers.signature import SolverCall
from freevars.torch import _compat, _modes
from freevars.torch._compat import pytree
from freevars.torch._convert.autograd_graph import leaves_behind
from freevars.torch._convert.operators import may_carry_derivative
from freevars.torch._convert.substitution import SubstitutionMode
from freevars.torch._describe import reachable
from freevars.torch._rules.partition import partition
from freevars.torch._rules.sharded import whole

__all__ = ["Inputs"]

T = TypeVar("T")

# The largest tensor of which each number is looked at in an error.
_FEW = 1000


class Inputs:
    """The values of one call, and where each of them belongs."""

    def __init__(
        self,
        solver: Callable[..., Any],
        call: SolverCall,
        x0: Tensor,
        hoisted: Mapping[str, Sequence[Tensor]],
        *,
        captured: Sequence[Tensor],
        linear_solve: Callable[..., Any] | None,
        x0_matters: bool,
    ) -> None:
        self._solver = solver
        of_fun = len(pytree.tree_leaves((call.args, call.kwargs)))
        given, self._around = partition(((call.args, call.kwargs), call.options))
        reached = reachable(solver, *call.options.values(), linear_solve).values()
        self._reached = [t for t, _ in reached]
        known = {id(t) for t in (*given, *captured)}
        found = [
            (t, name)
            for t, name in reached
            if id(t) not in known and may_carry_derivative(_modes.resolve(t))
        ]
        self._held = [t for t, _ in found]
        where = {id(t): k for k, t in enumerate((*given, *captured), start=1)}
        # What the solver reads itself and `fun` too, with its position among the values.
        self._shared = [(t, where[id(t)]) for t, _ in reached if id(t) in where]
        held = map(_modes.resolve, self._held)
        read = [t for values in hoisted.values() for t in values]
        self.values: tuple[Tensor, ...] = (x0, *given, *read, *held)
        self._ends = (1 + len(given), 1 + len(given) + len(read))
        self._counts = {name: len(values) for name, values in hoisted.items()}
        options = {k + 1 for k, i in enumerate(self._around.where) if i >= of_fun}
        self.others = frozenset(
            {*({0} if not x0_matters else ()), *options, *range(self._ends[1], len(self.values))}
        )
        """The positions of the values on which a solution does not depend."""
        self._names_held = [name for _, name in found]
        self._options = call.options
        self.x0 = call.x0

    def attached(self) -> tuple[list[Tensor], list[Tensor]]:
        """The values as inputs of the derivative, in PyTorch's own reverse mode, and more of them.

        x0, where it does not matter, and what the solver holds come without history: a pass would
        walk it, and it may be gone (a warm start). The leaves that it leads to come beside, so that
        whoever asks for a derivative by one of them passes by.
        """
        loose = {*range(self._ends[1], len(self.values)), *({0} & self.others)}
        values = [v.detach() if i in loose else v for i, v in enumerate(self.values)]
        values = [*map(_compat.not_inference, values)]
        found = [self.values[i] for i in sorted(loose)]
        leaves = [*(t for t in found if t.is_leaf and t.requires_grad), *leaves_behind(found)]
        return values, list({id(t): t for t in leaves}.values())

    def arguments(self, values: Sequence[Tensor]) -> tuple[Any, Any, dict[str, Any]]:
        """Positional and keyword arguments of `fun`, and the solver's options."""
        (args, kwargs), options = self._around.combine(values[1 : self._ends[0]])
        return args, kwargs, options

    def positions(self, function: str) -> frozenset[int]:
        """Where the hoisted values of a function stand."""
        start = self._ends[0]
        for name, count in self._counts.items():
            if name == function:
                return frozenset(range(start, start + count))
            start += count
        raise KeyError(function)

    def hoisted(self, values: Sequence[T], function: str) -> Sequence[T]:
        return [values[i] for i in sorted(self.positions(function))]

    def as_read(self, values: Sequence[Tensor], captured: Sequence[Tensor]) -> list[Tensor]:
        """The values, with what `fun` itself reads in place of the hoisted ones."""
        start, end = self._ends
        return [*values[:start], *captured, *values[end:]]

    def held_by_solver(self, values: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Inside, the solver reads the given values in place of what it holds, where those belong
        to a transform that does not see it run."""
        pairs = [*zip(self._held, values[self._ends[1] :], strict=True)]
        pairs += [(t, values[k]) for t, k in self._shared]
        table = {id(t): v for t, v in pairs if _of_a_transform(_modes.resolve(t))}
        return (
            SubstitutionMode(self._solver, table).reraising_refusals() if table else nullcontext()
        )

    def solver_reads_any(self, dims: Sequence[int | None]) -> bool:
        """Whether the solver reads one of the values that have an axis more, as `dims` says, past
        the function and the start that it is given."""
        start, end = self._ends
        own = [*dims[1:start], *dims[end:], *(dims[k] for _, k in self._shared)]
        return any(d is not None for d in own)

    def leaves(self) -> list[Tensor]:
        """The tensors whose `.grad` the solver's own backward passes could change."""
        # Within a converted call, also what that gives.
        found = [*self._reached, *map(_modes.resolve, self._reached)]
        with _compat.unseen():
            plain = [t for t in found if not _compat.is_wrapped(t)]
            leaves = [t for t in plain if t.is_leaf or t.retains_grad]
            return list({id(t): t for t in (*leaves, *leaves_behind(plain))}.values())

    def names_of_others(self) -> list[str]:
        """What the solver has and a derivative is taken by, as a person calls it."""
        names = {id(self.values[0]): "x0"} if 0 in self.others else {}
        for name, option in self._options.items():
            for path, leaf in pytree.tree_flatten_with_path(option)[0]:
                names[id(leaf)] = f"{name}{pytree.keystr(path)}"
        held = self.values[self._ends[1] :]
        names |= {id(t): name for t, name in zip(held, self._names_held, strict=True)}
        others = (self.values[i] for i in sorted(self.others))
        return [names[id(t)] for t in others if any(by for _, by in _compat.layers(t))]

    def numbers(self) -> Iterator[float]:
        """The numbers among the options: bounds may be there."""
        yield from (float(x) for x in self._around.leaves if isinstance(x, int | float))
        for t in self.values[1 : self._ends[0]]:
            if not _compat.is_wrapped(t) and t.numel() <= _FEW and not t.is_complex():
                yield from map(float, whole(t.detach()).reshape(-1).tolist())


def _of_a_transform(t: Tensor) -> bool:
    return _compat.is_wrapped(t) or bool(_compat.tangents(t))
