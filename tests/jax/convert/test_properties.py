"""Random small programs: a closure equals the explicit function, and structures are equal exactly
where programs are.

A program is a list of steps over a stack of vectors; captured values enter by any of several doors.
The explicit version runs the same steps with the values handed down.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import freevars.jax as fv

N_VALUES = 3
VALUES = [jnp.array([0.7, -0.4]), jnp.array([0.2, 1.1]), jnp.array([-0.6, 0.5])]
X = jnp.array([0.3, 0.9])

UNARY = {
    "sin": jnp.sin,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "cumsum": jnp.cumsum,
    "flip": lambda y: y[::-1],
    "cumprod": jnp.cumprod,
}
WRAPPERS = {
    "none": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda y: jax.lax.scan(lambda c, _: (f(c), None), y, length=2)[0],
    "cond": lambda f: lambda y: jax.lax.cond(y[0] > 0, f, lambda y: y - 1, y),
    "vmap": lambda f: lambda y: jax.vmap(f)(y[None])[0],
    "grad": lambda f: jax.grad(lambda y: jnp.sum(f(y) ** 2)),
}
DOORS = ("cell", "default", "list", "partial", "inner jit")

step = st.one_of(
    st.tuples(
        st.just("unary"), st.sampled_from(["cumsum", "flip", "relu", "sin", "softplus", "tanh"])
    ),
    st.tuples(st.just("capture"), st.integers(0, N_VALUES - 1), st.sampled_from(DOORS)),
    st.tuples(st.just("number"), st.sampled_from([0.5, 2.0, -0.0, 1.0])),
    st.tuples(st.just("dead"), st.integers(0, N_VALUES - 1)),
)
block = st.tuples(st.sampled_from(sorted(WRAPPERS)), st.lists(step, min_size=1, max_size=3))
programs = st.lists(block, min_size=1, max_size=3)


def through(door, w):
    """A function that multiplies by `w`, which comes in by a door."""
    if door == "default":
        return lambda y, w=w: y * w
    if door == "list":
        held = [None, {"w": w}]
        return lambda y: y * held[1]["w"]
    if door == "partial":
        return functools.partial(lambda w, y: y * w, w)
    if door == "inner jit":
        return jax.jit(lambda y: y * w)
    return lambda y: y * w


def run(program, values, y, multiply):
    for wrapper, steps in program:

        def body(y, steps=steps):
            for kind, *what in steps:
                if kind == "unary":
                    y = UNARY[what[0]](y)
                elif kind == "number":
                    y = y + what[0]
                elif kind == "dead":
                    jnp.sin(values[what[0]])
                else:
                    y = multiply(what[1], values[what[0]])(y)
            return y

        y = WRAPPERS[wrapper](body)(y)
    return jnp.sum(y)


def closed(program, values):
    return lambda x: run(program, values, x, through)


def explicit(program, values, x):
    return run(program, values, x, lambda _, w: lambda y: y * w)


quick = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def captured(program):
    return {s[1] for _, steps in program for s in steps if s[0] == "capture"}


@quick
@given(programs)
def test_a_closure_equals_the_explicit_function(program) -> None:
    expected = jax.jit(jax.value_and_grad(functools.partial(explicit, program), (0, 1)))(VALUES, X)

    def converted(values, x):
        f, hoisted = fv.closure_convert(closed(program, values), x)
        assert len(hoisted) <= len(captured(program))
        return f(x, *hoisted)

    got = jax.jit(jax.value_and_grad(converted, (0, 1)))(VALUES, X)
    by_closure = jax.jit(
        jax.value_and_grad(lambda v, x: fv.Closure(closed(program, v), x)(x), (0, 1))
    )(VALUES, X)
    for result in (got, by_closure):
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@quick
@given(programs)
def test_the_same_program_has_the_same_structure(program) -> None:
    others = [v + 1 for v in VALUES]
    one, other = (fv.Closure(closed(program, v), X) for v in (VALUES, others))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert len(one.values) <= len(captured(program))
    found = []

    @jax.jit
    def inside(values):
        found.append(fv.Closure(closed(program, values), X)._program)
        return X

    inside(VALUES)
    assert found[0] is one._program
    # The values of one in the structure of the other give the one's number.
    moved = jax.tree.unflatten(jax.tree.structure(other), one.values)
    np.testing.assert_allclose(moved(X), explicit(program, VALUES, X), rtol=1e-4, atol=1e-5)


@quick
@given(programs, programs)
def test_programs_that_differ_in_their_numbers_are_unequal(one, other) -> None:
    """Unequal numbers for equal values: then the structures must not be equal."""
    points = [X, -X, X + 1]
    f, g = (fv.Closure(closed(p, VALUES), X) for p in (one, other))
    if len(f.values) == len(g.values) and jax.tree.structure(f) == jax.tree.structure(g):
        for x in points:
            moved = jax.tree.unflatten(jax.tree.structure(f), g.values)
            np.testing.assert_allclose(moved(x), explicit(other, VALUES, x), rtol=1e-4, atol=1e-5)


@quick
@given(programs, st.data())
def test_one_changed_step_is_another_structure(program, data) -> None:
    flat = [(i, j) for i, (_, steps) in enumerate(program) for j, s in enumerate(steps)]
    i, j = data.draw(st.sampled_from(flat))
    kind, *_ = program[i][1][j]
    assume(kind in ("unary", "number"))
    new = ("unary", "cumprod") if kind == "unary" else ("number", 0.25)
    changed = [(w, [*steps]) for w, steps in program]
    changed[i][1][j] = new
    structures = [jax.tree.structure(fv.Closure(closed(p, VALUES), X)) for p in (program, changed)]
    assert structures[0] != structures[1]
