"""What a solver of scipy says of its own run: arrays, so that it crosses `jit` and `vmap`.

A host solver returns it as its aux, of the types of an example. The message is text again where
values are known. Not here: derivatives; of all this only x, y and what is computed from them has
any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from freevars._solvers.scipy_results import Said, as_bytes, as_text
from freevars.jax import _compat

__all__ = ["OdeResult", "OptimizeResult", "RootResults", "as_arrays"]


def as_arrays(said: Said) -> dict[str, Any]:
    """What scipy said, by the names of the fields below."""
    numbers, text = said
    arrays = {k: np.bool_(n) if isinstance(n, bool) else np.int32(n) for k, n in numbers.items()}
    return {**arrays, "_message": np.frombuffer(as_bytes(text), np.uint8).copy()}


def _text(data: Any) -> Any:
    return None if isinstance(data, _compat.Tracer) else as_text(np.asarray(data).tolist())


@dataclass(frozen=True)
class OptimizeResult:
    """What `minimize`, `root`, `least_squares` and `linprog` return: a pytree with scipy's names.

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
        cost: of `least_squares`, half the sum of the squares of the residuals; else None.

    Example:
        >>> import jax.numpy as jnp, freevars.jax.scipy
        >>> result = freevars.jax.scipy.minimize(lambda x: (x - 2.0) ** 2, 0.0)
        >>> print(result.x, bool(result.success), result.message)
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
    _message: Any = field(repr=False)
    cost: Any = None

    @property
    def message(self) -> Any:
        """Why the solver stopped: a str, a list of them for a batch; None where it is traced."""
        return _text(self._message)


@dataclass(frozen=True)
class RootResults:
    """What `root_scalar` returns: a pytree with scipy's names.

    Attributes:
        root: the solution, an array of shape (). Derivatives flow into this alone.
        converged: bool, whether the solver stopped as it should.
        iterations: int32.
        function_calls: int32, evaluations of the function.

    Example:
        >>> import freevars.jax.scipy
        >>> result = freevars.jax.scipy.root_scalar(lambda x: x**2 - 4.0, bracket=(0.0, 5.0))
        >>> print(result.root, bool(result.converged), result.flag)
        2.0 True converged
    """

    root: Any
    converged: Any
    iterations: Any
    function_calls: Any
    _message: Any = field(repr=False)

    @property
    def flag(self) -> Any:
        """Why the solver stopped: a str, a list of them for a batch; None where it is traced."""
        return _text(self._message)


@dataclass(frozen=True)
class OdeResult:
    """What `solve_ivp` returns: a pytree with scipy's names.

    Derivatives flow into `y` alone; everything else is what the solver said of its own run.

    Attributes:
        t: the times, of shape (n_points,).
        y: the states, a pytree like y0, each array with a last axis over the times. NaN from where
            the solver stopped short.
        success: bool, whether it reached the last time.
        status: int32, as in scipy.
        nfev: int32, evaluations of the function.
        njev: int32, evaluations of the Jacobian.
        nlu: int32, factorisations.

    Example:
        >>> import jax.numpy as jnp, freevars.jax.scipy
        >>> ts = jnp.array([0.0, 1.0])
        >>> decay = lambda t, y: {"a": -y["a"]}
        >>> result = freevars.jax.scipy.solve_ivp(decay, (0.0, 1.0), {"a": 2.0}, t_eval=ts)
        >>> print(result.y["a"].shape, bool(result.success), f"{result.y['a'][-1]:.3f}")
        (2,) True 0.736
    """

    t: Any
    y: Any
    success: Any
    status: Any
    nfev: Any
    njev: Any
    nlu: Any
    _message: Any = field(repr=False)

    @property
    def message(self) -> Any:
        """Why the solver stopped: a str, a list of them for a batch; None where it is traced."""
        return _text(self._message)


for _cls in (OptimizeResult, RootResults, OdeResult):
    _names = [f.name for f in _cls.__dataclass_fields__.values()]
    jax.tree_util.register_dataclass(_cls, data_fields=_names, meta_fields=[])
