"""Random functions with random rules: equal programs exactly where their derivatives agree.

`FREEVARS_EXAMPLES=10000 pytest tests/jax/convert/test_rule_programs.py` is the nightly run.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

import freevars.jax as fv
from freevars.errors import CaptureError

EXAMPLES = int(os.environ.get("FREEVARS_EXAMPLES", "20"))
X, W = jnp.float32(0.7), jnp.float32(1.3)

# No two give the same number in any of the derivatives below.
FACTORS = (1.0, 1.17, 0.71, 1.43)


class Rule(NamedTuple):
    """x -> body sin(x) w, with a derivative that need not be the true one."""

    kind: str  # "jvp" or "vjp"
    body: float
    first: float  # a factor of the derivative
    again: bool  # whether the rule calls its own function
    held: bool  # whether body and rule capture w


class Spec(NamedTuple):
    """A function: rules applied one after the other, each in one of JAX's constructions."""

    rules: tuple[Rule, ...]
    places: tuple[str, ...]


PLACES = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "scan": lambda f: lambda x: lax.scan(lambda c, _: (f(c), None), x, length=2)[0],
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 0.9 * x])).sum(),
    "cond": lambda f: lambda x: lax.cond(x > 100.0, jnp.cos, f, x),
    "checkpoint": jax.checkpoint,
}


def ruled(rule, w):
    """The function of a rule, made afresh."""
    scale = (lambda y: y * w) if rule.held else (lambda y: y)
    body = lambda x: scale(rule.body * jnp.sin(x))
    if rule.kind == "jvp":
        f = jax.custom_jvp(body)
        again = f if rule.again else body

        @f.defjvp
        def _(primals, tangents):
            (x,), (dot,) = primals, tangents
            return again(x), scale(rule.first * rule.body * jnp.cos(x) * dot)

        return f
    f = jax.custom_vjp(body)
    again = f if rule.again else body
    f.defvjp(
        lambda x: (again(x), x),
        lambda x, ct: (scale(rule.first * rule.body * jnp.cos(x) * ct),),
    )
    return f


def build(spec, w):
    def fun(x):
        for rule, place in zip(spec.rules, spec.places, strict=True):
            x = PLACES[place](ruled(rule, w))(x)
        return x

    return fun


factors = st.sampled_from(FACTORS)
rules = st.builds(
    Rule, st.sampled_from(["jvp", "vjp"]), factors, factors, st.booleans(), st.booleans()
)


@st.composite
def specs(draw):
    chosen = draw(st.lists(rules, min_size=1, max_size=2))
    places = [draw(st.sampled_from(sorted(PLACES))) for _ in chosen]
    return Spec(tuple(chosen), tuple(places))


@st.composite
def pairs(draw):
    """Two functions: alike, or with one factor changed."""
    one = draw(specs())
    if draw(st.booleans()):
        return one, one
    i = draw(st.integers(0, len(one.rules) - 1))
    name = draw(st.sampled_from(["body", "first"]))
    changed = list(one.rules)
    changed[i] = changed[i]._replace(**{name: draw(factors)})
    return one, one._replace(rules=tuple(changed))


def derivatives(fun):
    first = jax.grad(fun)
    return np.array([fun(X), first(X), jax.grad(first)(X)])


def agree(one, other):
    return np.allclose(one, other, rtol=1e-5, atol=1e-7)


check = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 1000,  # a gate asks the same each time, a nightly run does not
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)


@check
@given(pairs())
def test_programs_are_equal_exactly_where_the_derivatives_agree(pair) -> None:
    one, other = (build(spec, W) for spec in pair)
    same = jax.tree.structure(fv.Closure(one, X)) == jax.tree.structure(fv.Closure(other, X))
    assert same == agree(derivatives(one), derivatives(other))


@settings(check, max_examples=max(EXAMPLES // 20, 10))
@given(specs())
def test_derivatives_are_those_of_the_function(spec) -> None:
    closure = fv.Closure(build(spec, W), X)
    assert agree(derivatives(closure), derivatives(build(spec, W)))
    if closure.values:  # other values for the captured ones
        other = jax.tree.map(lambda w: 0.8 * w, closure)
        assert agree(derivatives(other), derivatives(build(spec, 0.8 * W)))


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.slow
def test_along_what_a_custom_jvp_captures(again, place) -> None:
    """The rule covers the argument; the derivative by a captured value is the body's."""
    spec = Spec((Rule("jvp", 1.0, 1.0, again, held=True),) * 2, ("plain", place))

    def plain(w):
        f = lambda x: jnp.sin(x) * w
        return lambda x: PLACES[place](f)(f(x))

    for of in (lambda f: f(X), lambda f: jax.grad(f)(X)):
        got = derivatives_by(lambda w, of=of: of(fv.Closure(build(spec, w), X)))
        assert agree(got, derivatives_by(lambda w, of=of: of(plain(w))))


def test_along_what_a_custom_vjp_captures() -> None:
    """By an array the derivative is that of the body; a traced value is refused, as by JAX."""
    spec = Spec((Rule("vjp", 1.0, 1.0, again=True, held=True),), ("plain",))
    f = fv.Closure(build(spec, W), X)
    assert f.values == (W,)
    np.testing.assert_allclose(jax.grad(lambda f: f(X))(f).values[0], jnp.sin(X), rtol=1e-6)
    with pytest.raises(CaptureError, match=r"captures the traced value w \(.*as an argument"):
        jax.grad(lambda w: fv.Closure(build(spec, w), X)(X))(W)
    inside = fv.Closure(lambda x: ruled(spec.rules[0], 2.0 * x)(W), X)
    np.testing.assert_allclose(inside(X), jnp.sin(W) * 2.0 * X, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(inside)(X), 2.0 * jnp.sin(W), rtol=1e-6)


def derivatives_by(fun):
    return np.array([fun(W), jax.grad(fun)(W), jax.grad(jax.grad(fun))(W)])
