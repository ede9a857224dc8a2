"""Derivatives for solvers of ordinary differential equations: `odeint`.

Not here: the mathematics (`adjoint`), and what makes a call a differentiable operation
(`integrator`).
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor

from freevars._contract import check_callable
from freevars._solvers.integration import ODE, OdeOptions, OdeRule
from freevars._solvers.signature import SolverCall
from freevars.errors import StructureError
from freevars.torch._compat import pytree
from freevars.torch._convert.convert import closure_convert
from freevars.torch._rules.adjoint import Trajectory
from freevars.torch._rules.forms import is_smooth, shape_of
from freevars.torch._rules.integrator import Integrator, operate
from freevars.torch._rules.partition import partition
from freevars.torch._rules.unsupported import check_not_of_a_program

__all__ = ["OdeintSolver"]

P = ParamSpec("P")
R = TypeVar("R")


class OdeintSolver(Integrator[P, R]):
    """A solver with the derivatives of a differential equation; made by `odeint`.

    It is called like the solver itself, which is `__wrapped__`, and may be a method.

    Example:
        >>> import torch, freevars.torch as fv
        >>> def euler(field, y0, ts):  # one step to each time
        ...     ys = [y0]
        ...     for t, following in zip(ts[:-1], ts[1:]):
        ...         ys.append(ys[-1] + (following - t) * field(t, ys[-1]))
        ...     return torch.stack(ys)
        >>> solver = fv.odeint(euler)
        >>> isinstance(solver, fv.OdeintSolver), solver.__wrapped__ is euler
        (True, True)
    """

    kind: ClassVar[str] = "odeint"
    leads: ClassVar[tuple[str, ...]] = ODE
    options = OdeOptions
    stated = OdeRule

    def _solve(self, call: SolverCall) -> Any:
        check_callable(call.fun)
        y0, ts = call.x0
        states, spec = self._states(y0)
        if not isinstance(ts, Tensor) or ts.dim() != 1 or not len(ts) or ts.is_complex():
            message = f"{self.__name__}: ts: expected a vector of one or more times, got {ts!r}."
            raise StructureError(message)
        ts = ts if ts.is_floating_point() else ts.to(torch.get_default_dtype())
        rule = self.rule

        def field(t: Tensor, y: Any, args: Any, kwargs: Any) -> Any:
            return call.fun(*rule.t_and_y(t, y), *args, **kwargs)

        extra = (call.args, call.kwargs)
        example = torch.zeros((), dtype=ts.dtype)
        converted, hoisted = closure_convert(field, example, y0, *extra, rng="replay")
        self.like(converted.out_struct, y0, "field")
        given, around = partition(extra)
        of_options, options = partition(call.options)
        n = len(given)

        def pack(leaves: list[Tensor]) -> Any:
            return pytree.tree_unflatten(leaves, spec)

        def fun(t: Tensor, y: list[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
            args, kwargs = around.combine(values[:n]) if n else extra
            state = pack(y)
            value = converted(t.to(ts.dtype), state, args, kwargs, *values[n:])
            return self.like(value, state, "field")

        is_leaf = spec == pytree.tree_structure(0)
        takes = rule.form([tuple(y.shape) for y in states], is_leaf=is_leaf)
        operation = Trajectory(self, fun, pack, takes, options, len(states))
        tensors = [ts, *of_options, *states, *given, *hoisted]
        check_not_of_a_program([*tensors, *converted.constants], self.__name__)
        ys = operate(operation, tensors)
        converted.replay.advance()
        return (pack(ys), operation.aux) if rule.has_aux else pack(ys)

    def _states(self, y0: Any) -> tuple[list[Tensor], Any]:
        for path, leaf in pytree.tree_flatten_with_path(y0)[0]:
            if not isinstance(leaf, Tensor) or not is_smooth(leaf):
                message = (
                    f"{self.__name__}: y0{pytree.keystr(path)}: expected a real or complex tensor,"
                    f" got {leaf!r}."
                )
                raise StructureError(message)
        leaves, spec = pytree.tree_flatten(y0)
        return list(leaves), spec

    def like(self, value: Any, y: Any, what: str) -> list[Tensor]:
        """The leaves of a state or of what a field returns, like y."""
        plain = type(value) is Tensor and type(y) is Tensor  # then no pytree walk
        if plain and value.shape == y.shape and value.dtype is y.dtype:
            return [value]
        shapes = [pytree.tree_map(shape_of, x) for x in (y, value)]
        leaves = pytree.tree_leaves(value)
        expected = pytree.tree_leaves(y)
        if shapes[0] != shapes[1] or any(
            isinstance(a, Tensor) and a.is_complex() and not b.is_complex()
            for a, b in zip(leaves, expected, strict=True)
        ):
            message = (
                f"{self.__name__}: the {what}: expected a value like y0, with the shapes"
                f" {shapes[0]}, got {shapes[1]}. {self.rule.order}"
            )
            raise StructureError(message)
        return [torch.as_tensor(a).to(b.dtype) for a, b in zip(leaves, expected, strict=True)]

    # What `Trajectory` needs: the solver's own call, and what it is given and returns.

    def solved(self, field: Callable[[Tensor, Any], Any], call: SolverCall) -> tuple[Any, Any]:
        """Call the user's solver."""
        ts = call.x0[1]

        def as_called(first: Any, second: Any, *_: Any, **__: Any) -> Any:
            t, y = self.rule.t_and_y(first, second)
            t = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=ts.dtype)
            if t.dim():
                message = (
                    f"{self.__name__}: the field: expected a time of shape (), got"
                    f" {list(t.shape)}. {self.rule.order}"
                )
                raise StructureError(message)
            return field(t, y)

        return self.call_solver(as_called, call.x0, call, "ys")

    def states_of(self, ys: Any, start: Any, spec: Any, n: int) -> list[Tensor]:
        """The leaves of what the solver returns."""
        leaves, found = pytree.tree_flatten(ys)
        expected = [(n, *y.shape) for y in pytree.tree_leaves(start)]
        shapes = [*map(shape_of, leaves)]
        if found != spec or shapes != expected:
            message = (
                f"{self.__name__}: the returned ys: expected the states at all times, like y0 with"
                f" a leading axis over ts, of shapes {expected}, got {shapes} in"
                f" {type(ys).__name__}."
            )
            raise StructureError(message)
        dtypes = [[y.dtype for y in of] for of in (pytree.tree_leaves(start), leaves)]
        if dtypes[0] != dtypes[1]:
            message = (
                f"{self.__name__}: the returned ys: expected the states at all times in the dtypes"
                f" of y0, {dtypes[0]}, got {dtypes[1]}."
            )
            raise StructureError(message)
        return list(leaves)
