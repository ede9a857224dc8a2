"""Linear systems as conditions, for higher orders, and many conditions at once, for
`torch.func.vmap`.

A batch of problems is one condition with a row for each: F is `torch.func.vmap` of theirs, and its
system is block-diagonal. The user's solver runs once for all of them where it can: where its
problems already have a leading axis (`batch_dims=`), or where it consists of PyTorch operations, so
that vmap can run it too; otherwise once for each. Where only PyTorch's own reverse mode is active,
F of all of them is recorded once.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Self

import torch
from torch import Tensor

from freevars.errors import FreevarsError
from freevars.torch import _compat, _modes
from freevars.torch._rules.attach import attached, record
from freevars.torch._rules.condition import Condition, Solution
from freevars.torch._rules.derivative import LinearOperator
from freevars.torch._rules.implicit import implicit
from freevars.torch._rules.products import jvp, vjp
from freevars.torch._rules.system import LinearSolve
from freevars.torch._rules.truncated import Truncated

__all__ = ["DifferentiableCondition", "in_front"]


class DifferentiableCondition(Condition):
    """A condition as `implicit` takes it."""

    def system(self, values: tuple[Tensor, ...], b: Tensor, *, transposed: bool) -> Tensor:
        return implicit(LinearSystem(self, transposed=transposed), *values, b)[0]

    def solve_batch(
        self, size: int, dims: Sequence[int | None], *values: Tensor
    ) -> tuple[Tensor, ...]:
        out = BatchedCondition(self, size, dims).solved(*values)
        solution, others = out[:3], out[3:]
        return *(_split(t, size) for t in solution), *others


class LinearSystem:
    """A^T u = b (or A u = b) as a condition; its values are a solution, the values there, and b,
    which may be `many` axes of right-hand sides."""

    def __init__(self, of: DifferentiableCondition, *, transposed: bool, many: int = 0) -> None:
        self.of = of
        self.transposed = transposed
        self.many = many
        self.constants = frozenset({1, 2, *(i + 3 for i in of.constants)})
        self.others: frozenset[int] = frozenset()

    def residual(self, u: Tensor, _: Tensor, /, *given: Tensor) -> Tensor:
        x, _f, columns, *values, b = given

        def fun(z: Tensor) -> Tensor:
            return self.of.residual(z, columns, *values)

        def product(u: Tensor) -> Tensor:
            return vjp(fun, x, u) if self.transposed else jvp(fun, [x], [u], like=x)

        for _axis in range(self.many):
            product = torch.func.vmap(product)
        return product(u) - b

    def solve(self, *given: Tensor) -> tuple[Tensor, ...]:
        x, f, columns, *values, b = given
        many = b.flatten(0, -3) if self.many else b
        u = self.of.linear(self.transposed, Solution(x, f, columns), tuple(values), many)
        nothing = u.new_empty(0)
        return u.reshape(b.shape), nothing, nothing

    def system(self, values: tuple[Tensor, ...], b: Tensor, *, transposed: bool) -> Tensor:
        # The matrix does not depend on the unknown of this system.
        system = LinearSystem(self.of, transposed=transposed != self.transposed, many=self.many)
        return implicit(system, *values[3:-1], b)[0]

    def compare(self, now: Tensor, recorded: Tensor) -> None:
        """Its parts are compared where they are evaluated."""

    def solve_batch(
        self, size: int, dims: Sequence[int | None], *values: Tensor
    ) -> tuple[Tensor, ...]:
        """By one system for many right-hand sides, where they alone have the new axis."""
        *given, b = values
        b = in_front(b, dims[-1], size)
        if all(d is None for d in dims[:-1]):
            many = LinearSystem(self.of, transposed=self.transposed, many=self.many + 1)
            u, *nothing = implicit(many, *given, b)
        else:
            of = BatchedCondition(self.of, size, dims[3:-1])
            each = LinearSystem(of, transposed=self.transposed, many=self.many)
            solution = zip(given[:3], dims, strict=False)
            at = (in_front(t, d, size).flatten(0, 1) for t, d in solution)
            right = b.movedim(0, -3).flatten(-3, -2)
            u, *nothing = implicit(each, *at, *given[3:], right)
            u = _split(u.movedim(-2, 0), size).movedim(1, -2)
        return u, *(t.expand(size, *t.shape) for t in nothing)


class BatchedCondition(DifferentiableCondition):
    """`size` problems of one condition, whose values have one more axis where `dims` says."""

    def __init__(self, of: DifferentiableCondition, size: int, dims: Sequence[int | None]) -> None:
        super().__init__()
        self.of = of
        self.size = size
        self.dims = tuple(dims)
        self.rule = of.rule
        self.unknown = of.unknown
        self.constrained = of.constrained
        self.constants, self.others = of.constants, of.others
        self.by_options = of.by_options
        self.watched = of.watched
        self._by: Sequence[Tensor] = ()  # what the recorded F is differentiated by

    def numbers(self) -> Iterable[float]:
        return self.of.numbers()

    def constants_as_they_are(self) -> AbstractContextManager[None]:
        return self.of.constants_as_they_are()

    def inputs_recorded(self) -> Sequence[Tensor]:
        return self._by

    def solved(self, *values: Tensor) -> tuple[Tensor, ...]:
        """A solution and what comes with it, whose root is differentiable in the values."""
        tracked = torch.is_grad_enabled() and any(v.requires_grad for v in values)
        if not tracked or self.watched or _compat.transforms_active():
            return implicit(self, *values)
        plain = tuple(v.detach() for v in values)
        with _modes.solver_running():
            x, columns, others = self.find(*plain)
        f = record(self, lambda x: self.residual(x, columns, *values), x.detach(), plain[0])
        by = (v for i, v in enumerate(values) if i not in self.constants and v.requires_grad)
        self._by = list({id(v): v for v in by}.values())
        x = attached(self, columns, values)
        return x, f.detach(), columns, *(t.detach() for t in others)

    def equations(self, x: Tensor, /, *values: Tensor) -> Tensor:
        x0_dim, *dims = self.dims
        fun = torch.func.vmap(self.of.equations, (0, x0_dim, *dims), randomness="same")
        f: Tensor = fun(self._split(x), *values)
        return f.flatten(0, 1)

    def to_bounds(self) -> Self:
        return type(self)(self.of.to_bounds(), self.size, self.dims)

    def completed(self, f: Tensor, x: Tensor, columns: Tensor, /, *values: Tensor) -> Tensor:
        if self.rule.conserved is None:
            return f
        fun = torch.func.vmap(self.of.completed, (0, 0, 0, *self.dims), randomness="same")
        out: Tensor = fun(self._split(f), self._split(x), self._split(columns), *values)
        return out.flatten(0, 1)

    def totals(self, x: Tensor, /, *values: Tensor) -> Tensor:
        fun = torch.func.vmap(self.of.totals, (0, *self.dims), randomness="same")
        totals: Tensor = fun(self._split(x), *values)
        return totals.flatten(0, 1)

    def start(self, x0: Tensor) -> Tensor:
        each: Tensor = torch.func.vmap(self.of.start)(in_front(x0, self.dims[0], self.size))
        return each.flatten(0, 1)

    def compare(self, now: Tensor, recorded: Tensor) -> None:
        self.of.compare(now, recorded)

    def explained(
        self, k: int, name: str, at: Solution, values: Sequence[Tensor]
    ) -> FreevarsError | None:
        n = len(at.x) // self.size
        member, k = divmod(k, n)
        own = Solution(*(t[member * n : (member + 1) * n] for t in at))
        return self.of.explained(k, name, own, _one(values, self.dims, member))

    def own_linear_solve(self, values: Sequence[Tensor]) -> LinearSolve | None:
        """Once for each element: it is written for one, and may read its own tensor for each."""
        own = self.of.own_linear_solve(values)
        if own is None or isinstance(own, Truncated):
            return own
        of, size, dims = self.of, self.size, self.dims  # not this object: see `Problem`

        def each(operator: LinearOperator, b: Tensor) -> Tensor:
            found = []
            for k, right in enumerate(b.reshape(size, -1)):
                solve = of.own_linear_solve(_one(values, dims, k))
                assert solve is not None  # noqa: S101 (for the type checker)
                found.append(solve(operator.part(k, size), right))
            return torch.cat(found)

        return each

    def run(self, *values: Tensor) -> tuple[Tensor, ...]:
        found = self._together(values)
        if found is None:
            each = [self.of.run(*_one(values, self.dims, k)) for k in range(self.size)]
            found = tuple(torch.stack(same) for same in zip(*each, strict=True))
        x, *others = found
        return x.flatten(0, 1), *others

    def _together(self, values: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Solve all at once, or None: a solver may branch on its data, or leave PyTorch."""
        try:
            found = self.of.run_many(self.size, self.dims, *values)
            if found is not None:
                return found
            return torch.func.vmap(self.of.run, self.dims)(*values)
        except Exception:  # noqa: BLE001 (whatever it is: one after the other, it is raised again)
            return None

    def _split(self, x: Tensor) -> Tensor:
        return _split(x, self.size)


def _split(x: Tensor, size: int) -> Tensor:
    return x.reshape(size, len(x) // size, *x.shape[1:])


def _one(values: Sequence[Tensor], dims: Sequence[int | None], k: int) -> list[Tensor]:
    """The values of problem `k`."""
    return [t if d is None else t.select(d, k) for t, d in zip(values, dims, strict=True)]


def in_front(t: Tensor, dim: int | None, size: int) -> Tensor:
    """`t` with its new axis first, along which it may be the same."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
