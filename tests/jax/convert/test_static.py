"""Static leaves and options: what counts as equal, and that a change in place is never missed."""

from __future__ import annotations

import dataclasses
import functools
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freevars.jax as fv
from freevars.errors import StructureError
from freevars.jax._convert.static import Static

X = jnp.array([0.5, -0.25, 2.0])


@dataclasses.dataclass
class Config:
    power: int


class Plain:
    def __init__(self, power):
        self.power = power

    def __call__(self, x):
        return x**self.power

    @functools.cached_property
    def squared(self):
        return self.power**2


class Comparable:
    """Equality without a hash."""

    def __init__(self, power):
        self.power = power

    def __eq__(self, other):
        return self.power == other.power

    __hash__ = None


class Locked(Plain):
    """With a part that has no pickled form."""

    def __init__(self, power):
        super().__init__(power)
        self.lock = threading.Lock()
        self.inner = lambda: power


class Unpicklable(Comparable):
    def __reduce__(self):
        msg = "not this one"
        raise TypeError(msg)


def set_power(x, power):
    x.power = power


def replace_item(x, power):
    x.clear()
    x.add(power)


# How each is made, how its power is read, and how it is changed in place.
MUTABLE = {
    "dataclass": (Config, lambda x: x.power, set_power),
    "plain object": (Plain, lambda x: x.power, set_power),
    "with a lock": (Locked, lambda x: x.power, set_power),
    "equality without a hash": (Comparable, lambda x: x.power, set_power),
    "namespace": (lambda n: types.SimpleNamespace(power=n), lambda x: x.power, set_power),
    "set": (lambda n: {n}, lambda x: next(iter(x)), replace_item),
    "bytearray": (lambda n: bytearray([n]), lambda x: x[0], lambda x, n: x.__setitem__(0, n)),
    "array of strings": (
        lambda n: np.array([str(n)]),
        lambda x: int(x[0]),
        lambda x, n: x.__setitem__(0, str(n)),
    ),
    "method": (
        lambda n: Plain(n).__call__,
        lambda x: x.__self__.power,
        lambda x, n: set_power(x.__self__, n),
    ),
    "partial": (
        lambda n: functools.partial(len, Config(n)),
        lambda x: x.args[0].power,
        lambda x, n: set_power(x.args[0], n),
    ),
    "dataclass in a dataclass": (
        lambda n: Config(Config(n)),
        lambda x: x.power.power,
        lambda x, n: set_power(x.power, n),
    ),
}
KINDS = pytest.mark.parametrize("kind", MUTABLE)


@KINDS
@pytest.mark.parametrize("jit", [True, False])
def test_an_option_changed_in_place_is_seen(kind, jit) -> None:
    make, power, change = MUTABLE[kind]

    @functools.partial(fv.root, jit=jit)
    def newton(fun, x0, option):
        for _ in range(power(option)):
            x0 = x0 - fun(x0) / jax.grad(fun)(x0)
        return x0

    option = make(1)
    fun = lambda x: x**2 - 4.0
    np.testing.assert_allclose(newton(fun, 10.0, option), 5.2, rtol=1e-6)
    change(option, 2)
    np.testing.assert_allclose(newton(fun, 10.0, option), 5.2 - (5.2**2 - 4) / 10.4, rtol=1e-6)


@KINDS
def test_a_static_leaf_changed_in_place_is_refused_by_what_was_converted(kind) -> None:
    make, power, change = MUTABLE[kind]
    leaf = make(2)
    fun = lambda x, s: x ** power(s)
    f = fv.Closure(fun, X, leaf)
    np.testing.assert_array_equal(f(X, leaf), X**2)
    change(leaf, 3)
    with pytest.raises(StructureError, match=r"args\[1\].*which was changed in place since"):
        f(X, leaf)
    np.testing.assert_array_equal(fv.Closure(fun, X, leaf)(X, leaf), X**3)


@pytest.mark.parametrize("kind", ["dataclass", "set", "equality without a hash", "namespace"])
def test_another_object_of_the_same_content_is_the_same(kind) -> None:
    make, power, _ = MUTABLE[kind]
    fun = lambda x, s: x ** power(s)
    f = fv.Closure(fun, X, make(2))
    np.testing.assert_array_equal(f(X, make(2)), X**2)
    assert jax.tree.structure(f) == jax.tree.structure(fv.Closure(fun, X, make(2)))
    with pytest.raises(StructureError, match=r"args\[1\].*expected the static leaf"):
        f(X, make(3))


def test_numbers_in_what_is_static_differ_by_type_and_sign() -> None:
    numbers = [1, 1.0, True, 0.0, -0.0, 1 + 0j]
    for wrap in (lambda x: (x,), lambda x: {x}, Config, lambda x: {"a": x}):
        statics = [Static(wrap(n)) for n in numbers]
        for i, a in enumerate(statics):
            assert [a == b for b in statics] == [i == j for j in range(len(numbers))]


def test_a_static_leaf_that_fills_a_cache_did_not_change() -> None:
    leaf = Plain(2)
    f = fv.Closure(lambda x, s: x * s.squared, X, leaf)
    np.testing.assert_array_equal(f(X, leaf), 4 * X)


def test_what_has_neither_a_hash_nor_a_pickled_form_is_refused() -> None:
    bad = Unpicklable(2)
    with pytest.raises(TypeError, match=r"can neither be hashed nor pickled.*frozen dataclass"):
        fv.Closure(lambda x, s: x**s.power, X, bad)
    solver = fv.root(lambda fun, x0, option: x0)
    with pytest.raises(TypeError, match="can neither be hashed nor pickled"):
        solver(lambda x: x, 1.0, bad)


def test_an_object_that_only_hashes_by_its_place_is_itself() -> None:
    class Local:
        power = 2

    one, two = Local(), Local()
    f = fv.Closure(lambda x, s: x**s.power, X, one)
    np.testing.assert_array_equal(f(X, one), X**2)
    with pytest.raises(StructureError, match=r"args\[1\]"):
        f(X, two)
