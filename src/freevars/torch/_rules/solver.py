"""A solver with a derivative rule: what each call of it does.

It converts the function that it is given, runs the user's solver on tensors without history, and
attaches the implicit function theorem at the solution (`record.py`, `implicit.py`). Not here: the
decorators (`rules.py`), one call of a solver as a problem (`problem.py`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, Self, TypedDict, TypeVar, Unpack, overload

from torch import Tensor

from freevars._contract import check_callable
from freevars._solvers import kkt
from freevars._solvers.options import check_options
from freevars._solvers.signature import SolverCall
from freevars._solvers.stated import States, kind_of
from freevars.torch import _compat, _modes
from freevars.torch._compat import pytree
from freevars.torch._convert.convert import closure_convert
from freevars.torch._describe import function_name
from freevars.torch._rules import implicit as operation
from freevars.torch._rules.constrained import ConstrainedProblem, bounds_like, unknown_of
from freevars.torch._rules.eager import EagerSolver
from freevars.torch._rules.inputs import Inputs
from freevars.torch._rules.problem import Problem
from freevars.torch._rules.ravel import Unknown
from freevars.torch._rules.record import solve_and_attach
from freevars.torch._rules.rule import OnFailure, Rng, Rule
from freevars.torch._rules.system import LinearSolve, check_linear_solve
from freevars.torch._rules.unsupported import check_not_of_a_program

__all__ = ["ImplicitSolver", "Options"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")


class Options(TypedDict, total=False):
    """The keyword arguments of all decorators; see `root`."""

    has_aux: bool  # False
    linear_solve: LinearSolve | None  # None
    on_failure: OnFailure  # "raise"
    check: bool  # True
    tol: float | None  # None
    polish: bool  # False
    conserved: Callable[[Any], Any] | None  # None
    batch_dims: int  # 0
    rng: Rng  # "replay"
    one_sided: bool  # False


class ImplicitSolver(EagerSolver[P, R]):
    """A solver with a derivative rule; made by `implicit`, `root`, `argmin` and the like.

    It is called like the solver itself, which is `__wrapped__`, and may be a method.

    Example:
        >>> import torch, freevars.torch as fv
        >>> def newton(fun, x0):
        ...     for _ in range(20):
        ...         x0 = x0 - fun(x0) / torch.func.grad(fun)(x0)
        ...     return x0
        >>> solver = fv.root(newton)
        >>> isinstance(solver, fv.ImplicitSolver), solver.__wrapped__ is newton
        (True, True)
    """

    def __init__(
        self,
        solver: Callable[P, R],
        states: States = "root",
        /,
        **options: Unpack[Options],
    ) -> None:
        check_options(kind_of(states), options, Options)
        check_linear_solve(options.get("linear_solve"))
        super().__init__(solver, states, **options)

    def _use(self, solver: Callable[P, R]) -> None:
        super()._use(solver)
        _, (states,), options = self._made_from()
        stated = (None, None) if isinstance(states, str) else states
        name = function_name(solver)
        self._rule = Rule(kind_of(states), solver, name, stated=stated, **options)

    @overload
    def __get__(self, instance: None, owner: Any = None, /) -> Self: ...
    @overload
    def __get__(
        self: "ImplicitSolver[Concatenate[Any, Q], S]", instance: object, owner: Any = None, /
    ) -> "ImplicitSolver[Q, S]": ...
    def __get__(self, instance: Any, owner: Any = None, /) -> Any:
        return super().__get__(instance, owner)

    def __repr__(self) -> str:
        return f"<{self._rule.name} with the derivative rule of {self._rule.kind}>"

    def _solve(self, call: SolverCall) -> Any:
        fun, x0, fun_args, fun_kwargs, options = call
        check_callable(fun)

        @functools.wraps(fun, updated=())
        def extended(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return fun(x, *args, **kwargs)

        rule = self._rule
        # No value of x0 counts, so it need not be one that can be saved for a backward pass.
        x0 = pytree.tree_map_only(Tensor, _compat.not_inference, x0)
        unknown = Unknown(x0, rule.batch_dims)
        condition, argument = rule.stated
        example = x0 if argument is None else argument(x0)
        converted, of_fun = closure_convert(extended, example, fun_args, fun_kwargs, rng=rule.rng)
        functions, hoisted = {"fun": converted}, {"fun": of_fun}
        as_given: dict[str, Callable[..., Any]] = {"fun": extended}
        constraints = kkt.take_constraints(rule.kind, options, conserved=rule.conserved is not None)
        if condition is not None:
            as_given["condition"] = _stated(condition, extended)
        if rule.conserved is not None:
            as_given["conserved"] = _as_function("conserved", rule.conserved)
        as_given |= {name: _as_function(name, value) for name, value in constraints.items()}
        for name, function in list(as_given.items())[1:]:
            with converted.replay.replayed():
                functions[name], hoisted[name] = closure_convert(
                    function, x0, fun_args, fun_kwargs, rng=rule.rng
                )
        start, of_x = x0, unknown
        if constraints:
            start = unknown_of(x0, functions, of_x)
            unknown = Unknown(start, rule.batch_dims)
        inputs = Inputs(
            rule.solver,
            # What the functions among the constraints capture is hoisted from them.
            call._replace(options=_without_functions(options, constraints)),
            unknown.ravel(start, "x0"),
            hoisted,
            captured=[t for function in functions.values() for t in function.captured],
            linear_solve=rule.linear_solve,
            x0_matters=rule.conserved is not None,
        )
        kind = ConstrainedProblem if constraints else Problem
        problem = kind(rule, functions, unknown, self._signature, inputs, of_x)
        constants = [t for function in functions.values() for t in function.constants]
        check_not_of_a_program([*problem.moving, *constants], rule.name)
        if _compat.transforms_active():
            problem.watched = bool(_modes.active())
            v, _, _, *aux = operation.implicit(problem, *inputs.values)
        else:
            v, *aux = solve_and_attach(problem, call, as_given, inputs.values)
        converted.replay.advance()
        x = unknown.unravel(v.clone())  # the caller may write to it, not to what is saved
        x = x[0] if constraints else x
        return (x, problem.with_aux(aux)) if rule.has_aux else x


def _without_functions(options: dict[str, Any], constraints: Mapping[str, Any]) -> dict[str, Any]:
    taken = constraints.keys() - {"bounds"}
    return {name: value for name, value in options.items() if name not in taken}


def _as_function(name: str, constraint: Any) -> Callable[..., Any]:
    """A constraint, or totals, as a function of what the extended `fun` takes."""
    if name == "bounds":
        return bounds_like(constraint)

    @functools.wraps(constraint, updated=())
    def extended(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del args, kwargs
        return constraint(x)

    return extended


def _stated(condition: Callable[..., Any], extended: Callable[..., Any]) -> Callable[..., Any]:
    """The user's condition as a function of what `extended` takes."""

    @functools.wraps(condition, updated=())
    def stated(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return condition(lambda x: extended(x, args, kwargs), x)

    return stated
