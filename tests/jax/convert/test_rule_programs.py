"""Random functions with random rules: equal programs exactly where their derivatives agree.

What the derivatives are is known in closed form, so that a pair costs no more than its conversions;
that it is what JAX computes is looked at for some of the functions. Each example compares six
pairs. `make nightly` draws 10,000 examples.
"""

from __future__ import annotations

import itertools
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

EXAMPLES = int(os.environ.get("FREEVARS_EXAMPLES", "50"))
X, W = jnp.float32(0.7), jnp.float32(1.3)

# No two give the same number in any of the derivatives below.
FACTORS = (1.0, 1.17, 0.71, 1.43)

# Each with its derivatives of first and second order, for NumPy and for JAX.
FUNCTIONS = {
    "sin": (lambda n, x: n.sin(x), lambda n, x: n.cos(x), lambda n, x: -n.sin(x)),
    "cos": (lambda n, x: n.cos(x), lambda n, x: -n.sin(x), lambda n, x: -n.cos(x)),
    "tanh": (
        lambda n, x: n.tanh(x),
        lambda n, x: 1 - n.tanh(x) ** 2,
        lambda n, x: -2 * n.tanh(x) * (1 - n.tanh(x) ** 2),
    ),
    "rational": (
        lambda _, x: x / (1 + x * x),
        lambda _, x: (1 - x * x) / (1 + x * x) ** 2,
        lambda _, x: 2 * x * (x * x - 3) / (1 + x * x) ** 3,
    ),
}


class Rule(NamedTuple):
    """x -> body function(x) w, with a derivative that need not be the true one."""

    kind: str  # "jvp" or "vjp"
    body: float
    first: float  # a factor of the derivative
    again: bool  # whether the rule calls its own function
    held: bool  # whether body and rule capture w
    function: str = "sin"


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
    function, derivative, _ = FUNCTIONS[rule.function]
    body = lambda x: scale(rule.body * function(jnp, x))
    along = lambda x, dot: scale(rule.first * rule.body * derivative(jnp, x) * dot)
    if rule.kind == "jvp":
        f = jax.custom_jvp(body)
        again = f if rule.again else body

        @f.defjvp
        def _(primals, tangents):
            return again(*primals), along(*primals, *tangents)

        return f
    f = jax.custom_vjp(body)
    again = f if rule.again else body
    f.defvjp(lambda x: (again(x), x), lambda x, ct: (along(x, ct),))
    return f


def build(spec, w):
    def fun(x):
        for rule, place in zip(spec.rules, spec.places, strict=True):
            x = PLACES[place](ruled(rule, w))(x)
        return x

    return fun


class Jet(NamedTuple):
    """A function at a point, to second order, as far as rules decide it.

    What a rule returns beside a tangent is the function once more, and a second derivative
    differentiates it: by the rule if that calls its own function again, otherwise as the body.
    """

    value: float
    first: float
    first_of_value: float  # the derivative of the value that the rule returns
    second: float

    def then(self, f):
        """The composition g(f), of f's jet with the function from a point to the jet of g."""
        g = f(self.value)
        return Jet(
            g.value,
            g.first * self.first,
            g.first_of_value * self.first_of_value,
            g.second * self.first_of_value * self.first + g.first * self.second,
        )


def jet_of(rule, place, w):
    """The function from a point to the jet of one step."""
    scale = rule.body * (w if rule.held else 1.0)

    def step(x):
        value, first, second = (scale * d(np, x) for d in FUNCTIONS[rule.function])
        by_rule = rule.first * first
        return Jet(value, by_rule, by_rule if rule.again else first, rule.first * second)

    if place == "scan":
        return lambda x: step(x).then(step)
    if place == "vmap":
        return lambda x: Jet(*np.add(step(x), Jet(0.9 * x, 0.9, 0.9, 0.0).then(step)))
    return step


def derivatives_of(spec, w=float(W), x=float(X)):
    """The value and two derivatives in closed form."""
    jet = Jet(x, 1.0, 1.0, 0.0)
    for rule, place in zip(spec.rules, spec.places, strict=True):
        jet = jet.then(jet_of(rule, place, w))
    return np.array([jet.value, jet.first, jet.second])


factors, functions = st.sampled_from(FACTORS), st.sampled_from(sorted(FUNCTIONS))
rules = st.builds(
    Rule, st.sampled_from(["jvp", "vjp"]), factors, factors, st.booleans(), st.booleans(), functions
)


@st.composite
def specs(draw):
    chosen = draw(st.lists(rules, min_size=1, max_size=2))
    places = [draw(st.sampled_from(sorted(PLACES))) for _ in chosen]
    return Spec(tuple(chosen), tuple(places))


@st.composite
def families(draw):
    """Four functions that differ in one thing at most. In two, they might be one and the same by
    the rules of algebra, as where a factor moves from one derivative to the next."""
    one = draw(specs())
    i = draw(st.integers(0, len(one.rules) - 1))
    name, values = draw(
        st.sampled_from([("body", factors), ("first", factors), ("function", functions)])
    )

    def with_value(value):
        changed = one.rules[i]._replace(**{name: value})
        return one._replace(rules=(*one.rules[:i], changed, *one.rules[i + 1 :]))

    return [one, *map(with_value, draw(st.lists(values, min_size=3, max_size=3)))]


@jax.disable_jit()
def derivatives(fun):
    first = jax.grad(fun)
    return np.array([fun(X), first(X), jax.grad(first)(X)])


def agree(one, other, tolerance=1e-5):
    return np.allclose(one, other, rtol=tolerance, atol=tolerance / 100)


check = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 1000,  # a gate asks the same each time, a nightly run does not
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)


@check
@given(families())
def test_programs_are_equal_exactly_where_the_derivatives_agree(family) -> None:
    made = [fv.Closure(build(spec, W + i), X) for i, spec in enumerate(family)]
    pairs = zip(made, map(derivatives_of, family), strict=True)
    for (one, by_one), (other, by_other) in itertools.combinations(pairs, 2):
        same = jax.tree.structure(one) == jax.tree.structure(other)
        assert same == agree(by_one, by_other, 1e-9)


@settings(check, max_examples=min(max(EXAMPLES // 20, 6), 200))
@given(specs().filter(lambda spec: "scan" not in spec.places))
def test_derivatives_are_those_of_the_function(spec) -> None:
    """Without `scan`: JAX's own second derivative through it depends on `jit`, where a rule is not
    that of its body."""
    closure = fv.Closure(build(spec, W), X)
    expected = derivatives(build(spec, W))
    assert agree(expected, derivatives_of(spec), 1e-4)
    assert agree(derivatives(closure), expected)
    if closure.values:  # other values for the captured ones
        other = jax.tree.map(lambda w: 0.8 * w, closure)
        assert agree(derivatives(other), derivatives_of(spec, w=0.8 * float(W)), 1e-4)


@pytest.mark.parametrize("kind", ["jvp", "vjp"])
def test_derivatives_without_jit(kind) -> None:
    """What stands for a rule is one equation, also where `jit` makes none."""
    spec = Spec((Rule(kind, 1.0, 1.17, again=True, held=True),), ("plain",))
    with jax.disable_jit():
        closure = fv.Closure(build(spec, W), X)
        assert agree(derivatives(closure), derivatives_of(spec), 1e-4)
        by_value = jax.grad(lambda f: f(X))(closure).values[0]
        np.testing.assert_allclose(by_value, jnp.sin(X), rtol=1e-6)


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
