"""What a solver of scipy says of its own run: tensors, so that it crosses `torch.func.vmap`.

Not here: derivatives; of all this only x, y and what is computed from them has any.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from freevars._solvers.scipy_results import Said, as_bytes, as_text
from freevars.torch import _compat

__all__ = ["OdeResult", "OptimizeResult", "RootResults", "as_tensors"]


def as_tensors(said: Said) -> dict[str, Tensor]:
    """What scipy said, by the names of the fields below."""
    numbers, text = said
    dtypes = {k: torch.bool if isinstance(n, bool) else torch.int32 for k, n in numbers.items()}
    tensors = {k: torch.tensor(n, dtype=dtypes[k]) for k, n in numbers.items()}
    return {**tensors, "text": torch.frombuffer(bytearray(as_bytes(text)), dtype=torch.uint8)}


def _text(data: Tensor) -> Any:
    return None if _compat.transforms_active() else as_text(data.tolist())


def _shown(result: Any, **said: Any) -> str:
    fields = {name: value for name, value in result._asdict().items() if name != "text"} | said
    shown = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    return f"{type(result).__name__}({shown})"


class OptimizeResult(NamedTuple):
    """What `minimize`, `root`, `least_squares` and `linprog` return, with scipy's names.

    Derivatives flow into `x`, and into `fun` and `cost`, which are computed from it; everything
    else is what the solver said of its own run, before x was polished.

    Attributes:
        x: the solution, a pytree like x0.
        fun: the value of the function at x.
        success: bool, whether the solver stopped as it should.
        status: int32, the solver's own code of `message`.
        nit: int32, iterations; this and the next three are -1 where a method does not count it.
        nfev: int32, evaluations of the function.
        njev: int32, evaluations of its derivative.
        nhev: int32, evaluations of its second derivative.
        text: `message` as bytes.
        cost: of `least_squares`, half the sum of the squares of the residuals; else None.

    Example:
        >>> import torch, freevars.torch.scipy
        >>> result = freevars.torch.scipy.minimize(lambda x: (x - 2.0) ** 2, 0.0)
        >>> print(float(result.x), bool(result.success), result.message)
        2.0 True Optimization terminated successfully.
    """

    x: Any
    fun: Any
    success: Any
    status: Any
    nit: Any
    nfev: Any
    njev: Any
    nhev: Any
    text: Any
    cost: Any = None

    def __repr__(self) -> str:
        return _shown(self, message=self.message)

    @property
    def message(self) -> Any:
        """Why the solver stopped: a str, a list of them for a batch; None inside a transform."""
        return _text(self.text)


class RootResults(NamedTuple):
    """What `root_scalar` returns, with scipy's names.

    Attributes:
        root: the solution, a tensor of shape (). Derivatives flow into this alone.
        converged: bool, whether the solver stopped as it should.
        iterations: int32.
        function_calls: int32, evaluations of the function.
        text: `flag` as bytes.

    Example:
        >>> import freevars.torch.scipy
        >>> result = freevars.torch.scipy.root_scalar(lambda x: x**2 - 4.0, bracket=(0.0, 5.0))
        >>> print(float(result.root), bool(result.converged), result.flag)
        2.0 True converged
    """

    root: Any
    converged: Any
    iterations: Any
    function_calls: Any
    text: Any

    def __repr__(self) -> str:
        return _shown(self, flag=self.flag)

    @property
    def flag(self) -> Any:
        """Why the solver stopped: a str, a list of them for a batch; None inside a transform."""
        return _text(self.text)


class OdeResult(NamedTuple):
    """What `solve_ivp` returns, with scipy's names.

    Derivatives flow into `y` alone; everything else is what the solver said of its own run.

    Attributes:
        t: the times, of shape (n_points,).
        y: the states, a pytree like y0, each tensor with a last axis over the times. NaN from where
            the solver stopped short.
        success: bool, whether it reached the last time.
        status: int32, as in scipy.
        nfev: int32, evaluations of the function.
        njev: int32, evaluations of the Jacobian.
        nlu: int32, factorisations.
        text: `message` as bytes.

    Example:
        >>> import torch, freevars.torch.scipy
        >>> ts = torch.tensor([0.0, 1.0])
        >>> decay = lambda t, y: {"a": -y["a"]}
        >>> start = {"a": torch.tensor(2.0)}
        >>> result = freevars.torch.scipy.solve_ivp(decay, (0.0, 1.0), start, t_eval=ts)
        >>> print(tuple(result.y["a"].shape), bool(result.success), f"{result.y['a'][-1]:.3f}")
        (2,) True 0.736
    """

    t: Any
    y: Any
    success: Any
    status: Any
    nfev: Any
    njev: Any
    nlu: Any
    text: Any

    def __repr__(self) -> str:
        return _shown(self, message=self.message)

    @property
    def message(self) -> Any:
        """Why the solver stopped: a str, a list of them for a batch; None inside a transform."""
        return _text(self.text)
