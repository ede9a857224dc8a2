"""A function of PyTorch as scipy calls it: NumPy vectors in and out, with exact derivatives.

A vector is float64; a complex unknown takes two places for each number. Not here: running scipy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freevars.torch._compat import pytree
from freevars.torch._rules.complex_pairs import as_real
from freevars.torch._rules.constrained import bounds_like
from freevars.torch._rules.ravel import Unknown
from freevars.torch._rules.unsupported import check_not_recorded
from freevars.torch.scipy._result import as_tensors

__all__ = ["HostFunction", "on_tensors"]


def on_tensors(run: Callable[..., Any], *, equations: bool) -> Callable[..., Any]:
    """A function of `scipy_runs` as a solver on tensors, with what scipy said as aux."""

    @functools.wraps(run)
    def solver(fun: Any, x0: Any, args: tuple[Any, ...] = (), **options: Any) -> tuple[Any, Any]:
        host = HostFunction(fun, x0, args, equations=equations)
        as_vectors = {
            "bounds": host.sides,
            "equality": host.constraint,
            "inequality": host.constraint,
        }
        for name in as_vectors.keys() & options.keys():
            options[name] = as_vectors[name](options[name])
        x, said = run(host, host.vector(x0), **options)
        return host.x(x), as_tensors(said)

    return solver


class HostFunction:
    """`fun(x, *args)` on vectors: `fun` gives a number where `equations` is False."""

    def __init__(
        self, fun: Callable[..., Any], x0: Any, args: tuple[Any, ...] = (), *, equations: bool
    ) -> None:
        check_not_recorded()  # numbers that leave PyTorch would be constants of the program
        self._fun, self._args, self._equations = fun, args, equations
        self._unknown = Unknown(x0)
        self._x0 = x0
        self._device = pytree.tree_leaves(x0)[0].device

    def vector(self, x: Any) -> Any:
        """The vector of an x."""
        return self._unknown.ravel(x, "x0")[0].detach().cpu().numpy().astype(np.float64)

    def x(self, v: Any) -> Any:
        """The x of a vector."""
        return self._unknown.unravel(self._tensor(v)[None])

    def sides(self, bounds: Any) -> Any:
        """Two vectors for bounds as `argmin` takes them, or None."""
        if bounds is None:
            return None
        lower, upper = bounds_like(bounds)(self._x0)
        return self.vector(lower), self.vector(upper)

    def constraint(self, fun: Callable[..., Any] | None) -> HostFunction | None:
        """A constraint on the same x, or None."""
        return None if fun is None else HostFunction(fun, self._x0, equations=True)

    def __call__(self, v: Any) -> Any:
        return self._out(self._value(self._tensor(v)).detach())

    def value_and_grad(self, v: Any) -> tuple[Any, Any]:
        """The objective and its gradient."""
        t = self._tensor(v).requires_grad_()
        value = self._value(t)
        return self._out(value.detach()), self._out(_slope(value, t))

    def grad(self, v: Any) -> Any:
        """The gradient of the objective."""
        return self.value_and_grad(v)[1]

    def hessian(self, v: Any) -> Any:
        """The Hessian of the objective."""
        t = self._tensor(v).requires_grad_()
        return self._rows(_slope(self._value(t), t, create_graph=True), t)

    def hvp(self, v: Any, d: Any) -> Any:
        """The Hessian of the objective times d."""
        t = self._tensor(v).requires_grad_()
        along = _slope(self._value(t), t, create_graph=True) @ self._tensor(d)
        return self._out(_slope(along, t))

    def jacobian(self, v: Any) -> Any:
        """The Jacobian of the equations, a row for each."""
        t = self._tensor(v).requires_grad_()
        return self._rows(self._value(t), t)

    def derivatives(self, v: Any, order: int) -> tuple[float, ...]:
        """Of a function of one number: its value and its first derivatives."""
        t = self._tensor(v).requires_grad_()
        found = [self._value(t).reshape(())]
        for _ in range(order):
            found.append(_slope(found[-1], t, create_graph=True).sum())
        return tuple(float(value.detach()) for value in found)

    def _tensor(self, v: Any) -> Tensor:
        # A copy, since solvers work in place.
        array = np.array(v, np.float64).reshape(-1)
        return torch.from_numpy(array).to(self._device, self._unknown.dtype)

    def _value(self, t: Tensor) -> Tensor:
        with torch.enable_grad():
            value = self._fun(self._unknown.unravel(t[None]), *self._args)
            if not self._equations:
                number: Tensor = value
                return number
            parts = [as_real(torch.as_tensor(p)) for p in pytree.tree_leaves(value)]
            return torch.cat([t.new_zeros(0), *(p.reshape(-1) for p in parts)])

    def _rows(self, values: Tensor, t: Tensor) -> Any:
        rows = [_slope(value, t, retain_graph=True) for value in values]
        return self._out(torch.stack(rows) if rows else t.new_zeros(0, t.numel()))

    def _out(self, value: Tensor) -> Any:
        if value.shape == ():
            return float(value)
        return value.detach().cpu().numpy().astype(np.float64)


def _slope(
    value: Tensor, t: Tensor, *, create_graph: bool = False, retain_graph: bool | None = None
) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(t)
    how: Any = {"create_graph": create_graph, "retain_graph": retain_graph}
    slope: Tensor = torch.autograd.grad(value, t, materialize_grads=True, **how)[0]
    return slope
