"""A function of JAX as a solver on the host sees it: NumPy in, NumPy out, with its derivatives.

A solver makes a few kinds of queries about a real vector, each compiled once for all closures of
the same structure. They are answered by a compiled function called on the spot, or by a program
that waits in the middle of its own run. Not here: running the solver.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from freevars.jax._solver.problem import Problem
from freevars.jax._solver.ravel import to_vector

__all__ = ["HostFunction", "Layout", "Oracle", "PytreeForm", "evaluate", "query_compiled", "real"]

# query(kind, v, d) -> a tuple of arrays
Query = Callable[..., tuple[Any, ...]]


class Layout(NamedTuple):
    """How a pytree of unknowns is arranged in one real vector; hashable, so that it can be
    static."""

    tree: Any  # PyTreeDef
    leaves: tuple[tuple[tuple[int, ...], str], ...]  # shape and dtype of each

    @staticmethod
    def of(x: Any) -> Layout:
        """The layout of unknowns like `x`."""
        leaves, tree = tree_util.tree_flatten(x)
        return Layout(tree, tuple((tuple(np.shape(a)), str(jnp.result_type(a))) for a in leaves))

    def to_tree(self, v: Any) -> Any:
        """The pytree that a vector stands for, in a traced function."""
        zeros = self.tree.unflatten([jnp.zeros(shape, dtype) for shape, dtype in self.leaves])
        return to_vector(zeros)[1](v)

    def struct(self) -> Any:
        """The shape and dtype of the vector."""
        structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in self.leaves]
        return jax.eval_shape(lambda x: to_vector(x)[0], self.tree.unflatten(structs))


class Oracle(NamedTuple):
    """The static part of a query: the same for all closures of one structure."""

    layout: Layout
    equations: bool  # a system of equations, not an objective
    has_aux: bool  # the function returns (value, aux)
    constraints: tuple[str, ...] = ()  # functions that are asked beside it

    def kinds(self) -> list[str]:
        """All kinds of queries that a program answers."""
        gradient = () if self.equations else ("value_and_grad",)
        own = ["value", *gradient, "product", "products"]
        beside = ("value", "product", "products")
        return own + [f"{name}:{kind}" for name in self.constraints for kind in beside]

    def is_slope(self, kind: str, place: int) -> bool:
        """Whether an answer, at this place of those to a kind, is a derivative of the objective."""
        return not self.equations and ":" not in kind and (place > 0 or "product" in kind)

    def all_values(self, problem: Problem, v: Any) -> list[Any]:
        """The values of all functions, in a traced function."""
        return [self.function(problem, name)(v) for name in ("", *self.constraints)]

    def function(self, problem: Problem, constraint: str = "") -> Callable[[Any], Any]:
        """The function on vectors: a scalar for an objective, a vector for equations."""
        if constraint:
            return lambda v: to_vector(problem.constraint(constraint)(self.layout.to_tree(v)))[0]

        def f(v: Any) -> Any:
            value = problem.value(self.layout.to_tree(v), has_aux=self.has_aux)
            return to_vector(value)[0] if self.equations else value

        return f


def evaluate(kind: str, oracle: Oracle, problem: Problem, v: Any, d: Any) -> tuple[Any, ...]:
    """The answer to one kind of query at the vector v, in a traced function."""
    constraint, _, kind = kind.rpartition(":")
    f = oracle.function(problem, constraint)
    if kind == "value":
        return (f(v),)
    if kind == "value_and_grad":
        value, gradient = jax.value_and_grad(f)(v)
        return (value, gradient)
    derivative = f if oracle.equations or constraint else jax.grad(f)
    if kind == "product":
        return (jax.jvp(derivative, (v,), (d,))[1],)
    assert kind == "matrix", kind  # noqa: S101 (our own word)
    return (jax.jacfwd(derivative)(v),)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _evaluate_compiled(
    kind: str, oracle: Oracle, tree: Any, leaves: list[Any], v: Any, d: Any
) -> Any:
    dtype = oracle.layout.struct().dtype
    d = d if d is None else d.astype(dtype)
    return evaluate(kind, oracle, tree.unflatten(leaves), v.astype(dtype), d)


def query_compiled(oracle: Oracle, problem: Problem) -> Query:
    """Answer each query by a compiled function, called on the spot."""
    here, x64 = threading.get_ident(), jax.config.jax_enable_x64
    leaves, tree = jax.tree.flatten(problem)  # once, not for each query

    def query(kind: str, v: Any, d: Any = None) -> tuple[Any, ...]:
        if threading.get_ident() != here:  # a thread of the solver's, where the setting is unknown
            with jax.enable_x64(x64):
                return tuple(_evaluate_compiled(kind, oracle, tree, leaves, v, d))
        result: tuple[Any, ...] = _evaluate_compiled(kind, oracle, tree, leaves, v, d)
        return result

    return query


class HostFunction:
    """What a solver on the host is given: a NumPy function with its derivatives.

    For an objective: `fun(v)` and `fun.value_and_grad(v)[0]` are floats, `fun.grad(v)` is like v,
    `fun.hessian(v)` is a matrix, and `fun.hvp(v, d)`, the Hessian times d, is like v. For equations
    (under `root` and `fixed_point`): `fun(v)` is a vector, `fun.jacobian(v)` a matrix with a row
    for each equation, and `fun.hvp(v, d)` the Jacobian times d.

    A vector is float64 of shape (n,); a complex unknown takes two places, real parts before
    imaginary ones for each array. With `flat=False`, v, d and what is like v are pytrees of NumPy
    arrays like `x0`, and matrices are still over the flat vector. With `vmap="whole"` everything
    has a leading axis over the batch.

    Example:
        >>> import jax.numpy as jnp, numpy as np, freevars.jax as fv
        >>> @fv.argmin
        ... @fv.on_host
        ... def newton(fun, x0):  # one step, exact for a quadratic objective
        ...     assert isinstance(fun, fv.HostFunction)
        ...     return x0 - np.linalg.solve(fun.hessian(x0), fun.grad(x0))
        >>> print(newton(lambda x: jnp.sum((x - 3.0) ** 2), jnp.zeros(2)))
        [3. 3.]
    """

    def __init__(
        self,
        query: Query,
        shape: tuple[int, ...],
        *,
        equations: bool,
        pytrees: PytreeForm | None = None,
        told: Callable[[str, Any], None] | None = None,
    ) -> None:
        def asked(kind: str, v: Any, *d: Any) -> tuple[Any, ...]:
            if told is not None:
                told(kind, v)
            return query(kind, v, *d)

        self._query = asked
        self._shape = shape
        self._equations = equations
        self._to_vector = pytrees.to_vector if pytrees else real
        self._out = pytrees.to_tree if pytrees else _copy

    @staticmethod
    def of_constraint(
        query: Query, shape: tuple[int, ...], name: str, pytrees: PytreeForm | None
    ) -> HostFunction:
        """A constraint: a vector of an x, with its Jacobian."""

        def asked(kind: str, v: Any, *d: Any) -> tuple[Any, ...]:
            return query(f"{name}:{kind}", v, *d)

        function = HostFunction(asked, shape, equations=True, pytrees=pytrees)
        function._out = _copy
        return function

    def _in(self, v: Any) -> Any:
        v = self._to_vector(v)
        if v.shape != self._shape:
            message = f"the function takes a vector of shape {self._shape}, got shape {v.shape}."
            raise TypeError(message)
        return v

    def __call__(self, v: Any) -> Any:
        (value,) = self._query("value", self._in(v))
        if not self._equations:
            return _number(value)
        return self._out(value) if np.shape(value) == self._shape else _copy(value)

    def value_and_grad(self, v: Any) -> tuple[Any, Any]:
        """The objective and its gradient at `v`: what scipy's `minimize(jac=True)` takes."""
        self._need_objective("value_and_grad")
        value, gradient = self._query("value_and_grad", self._in(v))
        return _number(value), self._out(gradient)

    def grad(self, v: Any) -> Any:
        """The gradient of the objective at `v`."""
        self._need_objective("grad")
        return self._out(self._query("value_and_grad", self._in(v))[1])

    def hessian(self, v: Any) -> Any:
        """The Hessian of the objective at `v`."""
        self._need_objective("hessian")
        return _copy(self._query("matrix", self._in(v))[0])

    def jacobian(self, v: Any) -> Any:
        """The Jacobian of the equations at `v`; of an objective, its gradient."""
        if not self._equations:
            return self.grad(v)
        return _copy(self._query("matrix", self._in(v))[0])

    def hvp(self, v: Any, d: Any) -> Any:
        """The Hessian of the objective, or the Jacobian of the equations, at `v`, times `d`."""
        return self._out(self._query("product", self._in(v), self._in(d))[0])

    def _need_objective(self, name: str) -> None:
        if self._equations:
            message = (
                f"fun.{name} is for an objective, and this is a system of equations: use fun(v),"
                " fun.jacobian(v) or fun.hvp(v, d)."
            )
            raise TypeError(message)


class PytreeForm(NamedTuple):
    """A vector of a layout as a pytree of NumPy arrays, and back, without JAX."""

    layout: Layout

    def to_vector(self, x: Any) -> Any:
        """A float64 vector."""
        leaves, tree = tree_util.tree_flatten(x)
        if tree != self.layout.tree:
            message = f"expected a pytree like x0, {self.layout.tree}, got {tree}."
            raise TypeError(message)
        parts: list[Any] = [np.zeros(0)]
        for leaf, (shape, name) in zip(leaves, self.layout.leaves, strict=True):
            a = np.asarray(leaf)
            if a.shape != shape:
                message = f"expected an array of shape {shape}, like the one in x0, got {a.shape}."
                raise TypeError(message)
            is_complex = np.issubdtype(jnp.dtype(name), np.complexfloating)
            parts += [a.real.ravel(), a.imag.ravel()] if is_complex else [real(a).ravel()]
        return np.concatenate([np.asarray(p, np.float64) for p in parts])

    def to_tree(self, v: Any) -> Any:
        """Arrays of the shapes and dtypes of the layout."""
        v, leaves, i = np.asarray(v), [], 0
        for shape, name in self.layout.leaves:
            dtype = jnp.dtype(name)
            n = int(np.prod(shape))
            flat = v[i : i + n]
            if np.issubdtype(dtype, np.complexfloating):
                i += n
                flat = flat + 1j * v[i : i + n]
            leaves.append(flat.astype(dtype).reshape(shape))
            i += n
        return self.layout.tree.unflatten(leaves)


def real(a: Any) -> Any:
    """A float64 array."""
    a = np.asarray(a)
    if a.dtype.kind == "c":
        message = (
            "complex numbers where real ones are expected: a complex unknown is two real ones here,"
            " and no function can be asked at a complex point (by complex steps, say)."
        )
        raise TypeError(message)
    return a.astype(np.float64, copy=False)


def _copy(a: Any) -> Any:
    # JAX lends its memory for reading only, and many solvers change what they are given.
    return np.array(a, dtype=np.float64)


def _number(value: Any) -> Any:
    # By way of NumPy: float() of an array of JAX takes as long as a tenth of a short objective.
    return float(np.asarray(value)) if np.ndim(value) == 0 else _copy(value)
