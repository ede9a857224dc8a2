"""One call of a decorated solver, as a condition.

Not here: which values it has (`inputs.py`), the decorators (`rules.py`), what F is
(`optimality.py`), and what follows from a condition (`condition.py`).
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from freevars._solvers.signature import SolverCall, SolverSignature, split_aux
from freevars.errors import StructureError
from freevars.torch import _compat
from freevars.torch._compat import pytree
from freevars.torch._convert.convert import Converted
from freevars.torch._convert.operators import may_carry_derivative
from freevars.torch._convert.structure import Structure, same
from freevars.torch._describe import function_name
from freevars.torch._rules.batch import DifferentiableCondition, in_front
from freevars.torch._rules.inputs import Inputs
from freevars.torch._rules.optimality import check_value, optimality, stated_by
from freevars.torch._rules.partition import Remainder, partition
from freevars.torch._rules.preserve_grad import preserve_grad
from freevars.torch._rules.ravel import Unknown
from freevars.torch._rules.rule import Rule
from freevars.torch._rules.snapshot import constants_as_they_are
from freevars.torch._rules.system import LinearSolve
from freevars.torch._rules.truncated import Truncated

__all__ = ["Problem"]


class Problem(DifferentiableCondition):
    """F(x, *values) = 0 of the user's function, and how the user's solver finds `x`."""

    def __init__(
        self,
        rule: Rule,
        functions: Mapping[str, Converted[..., Any]],
        unknown: Unknown,
        signature: SolverSignature,
        inputs: Inputs,
        of_x: Unknown | None = None,
    ) -> None:
        """`of_x`: the solution alone, where the unknown is more than that."""
        super().__init__()
        self._user: Callable[..., Any] | None = None
        self.rule = rule
        self.functions = functions
        self.converted = functions["fun"]
        self.unknown = unknown
        self.of_x = of_x or unknown
        self.signature = signature
        self.inputs = inputs
        self.constants = self.others = inputs.others
        self.communicates = any(function.communicates for function in functions.values())
        moving = (v for i, v in enumerate(inputs.values) if i not in self.constants)
        if not any(may_carry_derivative(v) for v in moving):
            self.by_options = inputs.names_of_others()
        self._aux: Remainder | None = None
        if "fun" not in self.stating:  # what `fun` reads moves x where the condition calls it
            self.constants |= inputs.positions("fun")
        self._check_result()

    @contextmanager
    def running_as_it_is(self, fun: Callable[..., Any]) -> Iterator[None]:
        """Inside, a solver that asks for values only gets them from `fun` itself, the user's
        function: nothing has to be replaced where the result carries no history."""
        self._user = fun
        try:
            yield
        finally:
            self._user = None

    # --- the function

    @property
    def captured(self) -> list[Tensor]:
        """The captured tensors that the hoisted values stand for."""
        return [t for function in self.functions.values() for t in function.captured]

    @property
    def moving(self) -> list[Tensor]:
        """The values on which x depends, and what `fun` reads where it reads one of them."""
        values = self.inputs.values
        moving = [i for i in range(len(values)) if i not in self.constants]
        # Within another conversion, what that gives is read in place of what is captured.
        both = (self.read(values), values)
        found = (t for tensors in both for t in map(tensors.__getitem__, moving))
        return list({id(t): t for t in found}.values())

    def inputs_recorded(self) -> Sequence[Tensor]:
        return [t for t in self.moving if t.requires_grad]

    def read(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.inputs.as_read(values, self.captured)

    @contextmanager
    def constants_as_they_are(self) -> Iterator[None]:
        with ExitStack() as stack:
            totals = [f for name, f in self.functions.items() if name == "conserved"]
            for function in (*self.stating.values(), *totals):
                own = constants_as_they_are(function.__wrapped__, function.constants)
                stack.enter_context(own)
            yield

    @property
    def stating(self) -> Mapping[str, Converted[..., Any]]:
        """The functions that F is computed from."""
        name = stated_by(self.rule.kind)
        return {name: self.functions[name]}

    def views(self, values: Sequence[Tensor]) -> dict[str, Callable[[Any], Any]]:
        """The functions that F is computed from as functions of x, at the given values."""
        args, kwargs, _ = self.inputs.arguments(values)

        def view(name: str) -> Callable[[Any], Any]:
            hoisted = self.inputs.hoisted(values, name)
            return lambda x: self.functions[name](x, args, kwargs, *hoisted)

        return {name: view(name) for name in self.stating}

    def equations(self, x: Tensor, /, *values: Tensor) -> Tensor:
        return self.optimality(self.views(values), x, values[0])

    def optimality(
        self, functions: Mapping[str, Callable[[Any], Any]], x: Tensor, x0: Tensor
    ) -> Tensor:
        """F at x, found from x0, from the functions that state it."""
        del x0
        (function,) = self.stating.values()
        return optimality(
            self.rule.kind,
            functions,
            self.unknown,
            x,
            has_aux=self._fun_has_aux,
            name=function_name(function),
        )

    def totals(self, x: Tensor, /, *values: Tensor) -> Tensor:
        args, kwargs, _ = self.inputs.arguments(values)
        hoisted = self.inputs.hoisted(values, "conserved")
        found = self.functions["conserved"](self.unknown.unravel(x), args, kwargs, *hoisted)
        leaves = pytree.tree_leaves(found)
        batch = self.unknown.batch
        if not leaves or not all(
            isinstance(t, Tensor) and t.is_floating_point() and t.shape[: len(batch)] == batch
            for t in leaves
        ):
            message = (
                f"{self.rule.name}: conserved= expected a function of x that returns real tensors, "
                f"the totals{' of each problem' if batch else ''}, got "
                f"{', '.join(Structure.shown(t) for t in leaves) or 'nothing'}."
            )
            raise StructureError(message)
        return torch.cat([t.reshape(self.unknown.problems, -1) for t in leaves], 1)

    def numbers(self) -> Iterable[float]:
        return self.inputs.numbers()

    def own_linear_solve(self, values: Sequence[Tensor]) -> LinearSolve | None:
        own = self.rule.linear_solve
        if own is None or isinstance(own, Truncated):
            return own
        inputs = self.inputs  # not this object, which would hold the system in a circle

        def with_values(operator: Any, b: Tensor) -> Tensor:
            with inputs.held_by_solver(values):
                return own(operator, b)

        return with_values

    def _check_result(self) -> None:
        """What `fun` returned on the example, against what the rule needs, before the solver
        runs."""
        name = stated_by(self.rule.kind)
        out = self.functions[name].out_struct
        self._fun_has_aux = False
        if (
            name == "fun" and self.rule.has_aux and isinstance(out, tuple) and len(out) == 2  # noqa: PLR2004
        ):
            try:
                self._check_value(out[0])
            except StructureError:  # a value that is a pair itself, or neither
                pass
            else:
                self._fun_has_aux = True
                return
        self._check_value(out)

    def _check_value(self, out: Any) -> None:
        function = self.functions[stated_by(self.rule.kind)]
        check_value(self.rule.kind, out, self.of_x, function_name(function))

    # --- the solver

    def run(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Runs the user's solver, as it was called: x, and the tensors of aux."""
        args, kwargs, options = self.inputs.arguments(values)
        hoisted = self.inputs.hoisted(values, "fun")

        @functools.wraps(self.converted)
        def fun(x: Any, *args: Any, **kwargs: Any) -> Any:
            user = self._user
            if user is None or _compat.transforms_active() or _wants_history(x, args, kwargs):
                return self.converted(x, args, kwargs, *hoisted)
            with self.converted.replay.replayed():
                out = user(x, *args, **kwargs)
            if type(out) is Tensor:  # no pytree walk for a plain tensor
                return out.detach()
            return pytree.tree_map_only(Tensor, Tensor.detach, out)

        options = self._options(options, values)
        call = SolverCall(fun, self._start(values), args, kwargs, options)
        with preserve_grad(self.inputs.leaves()), self.inputs.held_by_solver(values):
            out = self.signature.call(self.rule.solver, call)
        tensors = []
        if self.rule.has_aux:
            out, aux = split_aux(out, self.rule.name, shown=Structure.shown)
            tensors = self._take_apart(aux)
        return self._found(out, values), *tensors

    def _start(self, values: Sequence[Tensor]) -> Any:
        """What the solver starts from."""
        return self.unknown.unravel(values[0])

    def _options(self, options: dict[str, Any], values: Sequence[Tensor]) -> dict[str, Any]:
        """The solver's options, as it is given them."""
        del values
        return options

    def _found(self, out: Any, values: Sequence[Tensor]) -> Tensor:
        """The unknown, from what the solver returned."""
        del values
        return self.unknown.ravel(out, f"the result of {self.rule.name}")

    def run_many(
        self, size: int, dims: Sequence[int | None], *values: Tensor
    ) -> tuple[Tensor, ...] | None:
        """Runs a solver that takes a batch once for `size` calls, whose values have one more axis
        where `dims` says: as a longer batch. None where more than what `fun` captures differs, and
        with constraints: the multipliers of each are found on their own."""
        alone = self.rule.has_aux or self.constrained or self.inputs.solver_reads_any(dims)
        if not self.rule.batch_dims or alone:
            return None
        args, kwargs, options = self.inputs.arguments(values)
        hoisted = self.inputs.hoisted(values, "fun")

        def split(x: Any) -> Any:
            return pytree.tree_map_only(Tensor, lambda t: t.unflatten(0, (size, -1)), x)

        def join(x: Any) -> Any:
            return pytree.tree_map_only(Tensor, lambda t: t.flatten(0, 1), x)

        @functools.wraps(self.converted)
        def fun(x: Any, *args: Any, **kwargs: Any) -> Any:
            def one(x: Any, *hoisted: Tensor) -> Any:
                return self.converted(x, args, kwargs, *hoisted)

            return join(
                torch.func.vmap(one, (0, *self.inputs.hoisted(dims, "fun")))(split(x), *hoisted)
            )

        start = torch.func.vmap(self.unknown.unravel)(in_front(values[0], dims[0], size))
        call = SolverCall(fun, join(start), args, kwargs, options)
        with preserve_grad(self.inputs.leaves()), self.inputs.held_by_solver(values):
            out = self.signature.call(self.rule.solver, call)
        ravel = functools.partial(self.unknown.ravel, name=f"the result of {self.rule.name}")
        return (torch.func.vmap(ravel)(split(out)),)

    def _take_apart(self, aux: Any) -> list[Tensor]:
        """The tensors of aux, as copies that nobody else writes to. What is no tensor is told
        beside, once for a whole batch."""
        tensors, rest = partition(aux)
        before = rest if self._aux is None else self._aux
        if rest.spec != before.spec or not all(map(same, rest.leaves, before.leaves)):
            message = (
                f"{self.rule.name}: expected an aux that differs in tensors only from one element "
                f"of a batch to the next, got {before} and {rest}. Return what differs as tensors."
            )
            raise StructureError(message)
        self._aux = before
        return [t.clone() for t in tensors]

    def with_aux(self, tensors: Sequence[Tensor]) -> Any:
        """Aux as the solver returned it, of the tensors that came back with `x`."""
        assert self._aux is not None  # noqa: S101 (a solver has run)
        return self._aux.combine(tensors)


def _wants_history(x: Any, args: Any, kwargs: Any) -> bool:
    if type(x) is Tensor and not args and not kwargs:  # no pytree walk for a plain tensor
        return x.requires_grad
    leaves = pytree.tree_leaves((x, args, kwargs))
    return any(isinstance(t, Tensor) and t.requires_grad for t in leaves)
