"""Which results of a program may depend on which of its inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from freevars.jax._convert.dependence import reached


def _swap(a, b, c):
    """b reaches the first result in the second turn, c in the third."""
    return lax.scan(lambda s, _: ((s[1], s[2], s[2]), s[0]), (a, b, c), None, length=3)


def _until(a, b, c):
    """a decides how often b doubles."""
    return lax.while_loop(lambda s: s[0] < a, lambda s: (s[0] + 1.0, 2 * s[1]), (0.0, b))[1], c


def _counted(a, b, c):
    """As often as a, which moves nothing, says."""
    return lax.while_loop(lambda s: s[0] < 3.0, lambda s: (s[0] + 1.0, s[1] * b), (0.0, a))[1], c


def _ruled(a, b, c):
    rule = jax.custom_jvp(lambda a, b: 2 * b)
    rule.defjvp(lambda p, t: (2 * p[1], p[0] * t[1]))
    return rule(a, b), c


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        (lambda a, b, c: (a + b, 1.0), ["ab", ""]),
        (lambda a, b, c: (lax.stop_gradient(a) + b, jnp.sign(c)), ["b", "c"]),
        (jax.jit(lambda a, b, c: (lax.stop_gradient(a) * b, c)), ["b", "c"]),
        (jax.checkpoint(lambda a, b, c: (lax.stop_gradient(a) * b, c)), ["b", "c"]),
        (lambda a, b, c: lax.cond(a > 0, lambda b, c: (b, 1.0), lambda b, c: (c, c), b, c),
         ["abc", "ac"]),
        (lambda a, b, c: lax.cond(True, lambda a, c: a, lambda a, c: lax.stop_gradient(c), a, c),
         ["a"]),
        (_swap, ["abc", "bc", "c", "abc"]),
        (_until, ["ab", "c"]),
        (_counted, ["ab", "c"]),
        (_ruled, ["b", "c"]),
        (lambda a, b, c: (jax.pure_callback(lambda x: x, a, a * b), c), ["ab", "c"]),
    ],
)  # fmt: skip
def test_what_reaches_each_result(fun, expected) -> None:
    jaxpr = jax.make_jaxpr(fun)(1.0, 2.0, 3.0).jaxpr
    each = [reached(jaxpr, [i]) for i in range(3)]
    found = [
        "".join(name for name, on in zip("abc", ons, strict=True) if on)
        for ons in zip(*each, strict=True)
    ]
    assert found == expected
    assert reached(jaxpr, [0, 1, 2]) == [bool(names) for names in expected]
    assert not any(reached(jaxpr, []))
