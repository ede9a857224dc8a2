"""What a solver of scipy says of its own run: arrays, so that it crosses `jit` and `vmap`.

A host solver returns it as its aux, of the types of an example. The message crosses as bytes, and
is text again where values are known. Not here: derivatives; of all this only x and what is computed
from it has any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from freevars.jax import _compat

__all__ = ["OptimizeResult", "RootResults", "decode", "encode", "root_status", "solver_status"]

_BYTES = 256  # of a message; what is longer is cut
_COUNTS = ("nit", "nfev", "njev", "nhev")


def solver_status(result: Any = None) -> dict[str, Any]:
    """What a result of scipy tells beside x; of None: the example for `on_host(aux=...)`."""
    counts = {name: _count(getattr(result, name, None)) for name in _COUNTS}
    return {
        "success": np.bool_(getattr(result, "success", False)),
        "status": np.int32(getattr(result, "status", 0)),
        **counts,
        "_message": encode(str(getattr(result, "message", ""))),
    }


def root_status(result: Any = None) -> dict[str, Any]:
    """The same for a result of `root_scalar`."""
    return {
        "converged": np.bool_(getattr(result, "converged", False)),
        "iterations": _count(getattr(result, "iterations", None)),
        "function_calls": _count(getattr(result, "function_calls", None)),
        "_message": encode(str(getattr(result, "flag", ""))),
    }


def _count(n: Any) -> Any:
    return np.int32(-1 if n is None or not np.isfinite(n) else n)


def encode(text: str) -> Any:
    """A text as bytes of a fixed length."""
    data = text.encode()[:_BYTES]
    return np.frombuffer(data.ljust(_BYTES, b"\0"), np.uint8).copy()


def decode(data: Any) -> Any:
    """A text, or lists of texts over the axes of a batch; None where it is not known."""
    if isinstance(data, _compat.Tracer):
        return None
    array = np.asarray(data)
    if array.ndim > 1:
        return [decode(row) for row in array]
    return array.tobytes().rstrip(b"\0").decode(errors="ignore")


@dataclass(frozen=True)
class OptimizeResult:
    """What `minimize`, `root` and `least_squares` return: a pytree with scipy's names.

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
        return decode(self._message)


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
        return decode(self._message)


for _cls in (OptimizeResult, RootResults):
    _names = [f.name for f in _cls.__dataclass_fields__.values()]
    jax.tree_util.register_dataclass(_cls, data_fields=_names, meta_fields=[])
