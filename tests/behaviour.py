"""The cases of the behaviour table: every way in which a function can come by a captured value.

Each case states one function twice: as a user writes it, a closure over its values, and with every
value handed down explicitly, which is the oracle. Nothing here names a host: a host brings its
array functions as `xp` and its `vmap`, and its own tests bring the transformations and the
conversions (`test_behaviour_table.py` of each host).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Converts `fun` with the example arguments and calls the result on them: `via(fun, *args)`.
Via = Callable[..., Any]


class Host(NamedTuple):
    """What the cases need of an array library."""

    xp: Any
    vmap: Callable[..., Any]


class Case(NamedTuple):
    """One function of `x` (floats, shape (2,)) that captures values and returns a real scalar."""

    name: str
    values: tuple[Any, ...]  # NumPy arrays
    program: Callable[..., Any]  # (host, via, x, *values), converts a closure and calls it at x
    explicit: Callable[..., Any]  # (host, x, *values), the same number with nothing captured


W = np.array([0.7, -1.2])
V = np.array([1.5, 0.4])


def _float(host: Host, via: Via, x: Any, w: Any) -> Any:
    return via(lambda x: host.xp.sum(host.xp.sin(w * x) * w), x)


def _float_explicit(host: Host, x: Any, w: Any) -> Any:
    return host.xp.sum(host.xp.sin(w * x) * w)


def _complex(host: Host, via: Via, x: Any, re: Any, im: Any) -> Any:
    z = re + 1j * im
    return via(lambda x: host.xp.sum(host.xp.real(host.xp.exp(1j * x * z) * z)), x)


def _complex_explicit(host: Host, x: Any, re: Any, im: Any) -> Any:
    # exp(i x (re + i im)) (re + i im), its real part written out.
    xp = host.xp
    return xp.sum(xp.exp(-x * im) * (re * xp.cos(x * re) - im * xp.sin(x * re)))


def _int(host: Host, via: Via, x: Any, n: Any, i: Any) -> Any:
    return via(lambda x: host.xp.sum(x**n * host.xp.cos(x[i])), x)


def _int_explicit(host: Host, x: Any, n: Any, i: Any) -> Any:
    return host.xp.sum(x**n * host.xp.cos(x[i]))


def _bool(host: Host, via: Via, x: Any, b: Any) -> Any:
    return via(lambda x: host.xp.sum(host.xp.where(b, host.xp.sin(x), x**2)), x)


def _bool_explicit(host: Host, x: Any, b: Any) -> Any:
    return host.xp.sum(host.xp.where(b, host.xp.sin(x), x**2))


def _batched(host: Host, via: Via, x: Any, ws: Any) -> Any:
    # The captured value is batched, the argument is not.
    one = lambda w: via(lambda x: host.xp.sum(host.xp.sin(w * x) * w), x)
    return host.xp.sum(host.vmap(one)(ws))


def _batched_explicit(host: Host, x: Any, ws: Any) -> Any:
    return host.xp.sum(host.xp.sin(ws * x) * ws)


def _numpy(host: Host, via: Via, x: Any, w: Any) -> Any:
    def fun(x: Any) -> Any:
        return host.xp.sum(host.xp.sin(w * x) * host.xp.asarray(V))

    return via(fun, x)


def _numpy_explicit(host: Host, x: Any, w: Any) -> Any:
    sines = host.xp.sin(w * x)
    return sines[0] * 1.5 + sines[1] * 0.4


def _repeated(host: Host, via: Via, x: Any, w: Any) -> Any:
    again, held = w, {"w": w, "pair": (w, w)}
    return via(lambda x: host.xp.sum(host.xp.sin(w * x) * again * held["pair"][1] + held["w"]), x)


def _repeated_explicit(host: Host, x: Any, w: Any) -> Any:
    return host.xp.sum(host.xp.sin(w * x) * w * w + w)


def _unused(host: Host, via: Via, x: Any, w: Any, v: Any) -> Any:
    def fun(x: Any) -> Any:
        host.xp.sin(v)  # dead code
        return host.xp.sum(host.xp.sin(w * x))

    return via(fun, x) + 0 * host.xp.sum(v)


def _unused_explicit(host: Host, x: Any, w: Any, v: Any) -> Any:
    return host.xp.sum(host.xp.sin(w * x)) + 0 * host.xp.sum(v)


def _default_argument(host: Host, via: Via, x: Any, w: Any, v: Any) -> Any:
    def fun(x: Any, w: Any = w, *, v: Any = v) -> Any:
        return host.xp.sum(host.xp.sin(w * x) * v)

    return via(fun, x)


def _two_explicit(host: Host, x: Any, w: Any, v: Any) -> Any:
    return host.xp.sum(host.xp.sin(w * x) * v)


class _Model:
    def __init__(self, host: Host, w: Any, v: Any) -> None:
        self.host = host
        self.w = w
        self.inner = {"v": v}

    def apply(self, x: Any) -> Any:
        return self.host.xp.sum(self.host.xp.sin(self.w * x) * self.inner["v"])


def _attribute(host: Host, via: Via, x: Any, w: Any, v: Any) -> Any:
    return via(_Model(host, w, v).apply, x)


_GLOBAL: Any = None


def _global_fun(host: Host, x: Any) -> Any:
    return host.xp.sum(host.xp.sin(_GLOBAL[0] * x) * _GLOBAL[1])


def _global(host: Host, via: Via, x: Any, w: Any, v: Any) -> Any:
    # Each program has a module of its own: a host may run the function again in its backward pass.
    fun = types.FunctionType(_global_fun.__code__, {**globals(), "_GLOBAL": (w, v)})
    return via(functools.partial(fun, host), x)


def _nested_function(host: Host, via: Via, x: Any, w: Any, v: Any) -> Any:
    def inner(y: Any) -> Any:
        def innermost(z: Any) -> Any:
            return z * v

        return innermost(host.xp.sin(y))

    def fun(x: Any) -> Any:
        return host.xp.sum(inner(w * x))

    return via(fun, x)


def _derived_outside(host: Host, via: Via, x: Any, w: Any) -> Any:
    derived = host.xp.exp(w) * x  # depends on the argument of the whole, too
    return via(lambda y: host.xp.sum(host.xp.sin(derived * y) * w), x)


def _derived_explicit(host: Host, x: Any, w: Any) -> Any:
    return host.xp.sum(host.xp.sin(host.xp.exp(w) * x * x) * w)


def _row(m: Any, x: Any, host: Host) -> Any:
    return host.xp.sum(host.xp.matmul(m, host.xp.sin(x)) * m[0])


def _matrix(host: Host, via: Via, x: Any, m: Any) -> Any:
    # Held by a partial, read whole and in part.
    return via(functools.partial(_row, m, host=host), x)


def _matrix_explicit(host: Host, x: Any, m: Any) -> Any:
    return _row(m, x, host)


def _related(host: Host, via: Via, x: Any, w: Any) -> Any:
    held = [2 * w, w[1]]  # captured beside the value that they come from
    return via(lambda x: host.xp.sum(host.xp.sin(w * x) * held[0] ** 2 + held[1] * w), x)


def _related_explicit(host: Host, x: Any, w: Any) -> Any:
    return host.xp.sum(host.xp.sin(w * x) * 4 * w * w + w[1] * w)


X = np.array([0.3, 0.9])

CASES = [
    Case("float", (W,), _float, _float_explicit),
    Case("complex", (W, V), _complex, _complex_explicit),
    Case("int", (np.array(3), np.array([1, 0])), _int, _int_explicit),
    Case("bool", (np.array([True, False]),), _bool, _bool_explicit),
    Case("batched", (np.stack([W, V, W + V]),), _batched, _batched_explicit),
    Case("numpy", (W,), _numpy, _numpy_explicit),
    Case("repeated", (W,), _repeated, _repeated_explicit),
    Case("unused", (W, V), _unused, _unused_explicit),
    Case("default_argument", (W, V), _default_argument, _two_explicit),
    Case("attribute", (W, V), _attribute, _two_explicit),
    Case("global", (W, V), _global, _two_explicit),
    Case("nested_function", (W, V), _nested_function, _two_explicit),
    Case("derived_outside", (W,), _derived_outside, _derived_explicit),
    Case("matrix", (np.stack([W, V]),), _matrix, _matrix_explicit),
    Case("related", (W,), _related, _related_explicit),
]
