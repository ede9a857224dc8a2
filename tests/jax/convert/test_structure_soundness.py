"""Two functions that differ only in what a rule of theirs reads later never share a program.

The primal function is traced anew in each conversion; a custom derivative rule is not, and reads
its classes, modules and containers when it runs. Each attack below changes one thing that a rule
reads, and makes the closure again: a compiled gradient and a decorated solver have to see the
change.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freevars.jax as fv

X = jnp.array([0.5, -0.25, 2.0])


def rule(read):
    """A sine whose derivative is `read()` cosines."""

    @jax.custom_jvp
    def sine(x):
        return jnp.sin(x)

    sine.defjvp(lambda p, t: (jnp.sin(p[0]), read() * jnp.cos(p[0]) * t[0]))
    return sine


@jax.jit
def gradient(f, x):
    return jax.grad(lambda x: jnp.sum(f(x)))(x)


@fv.root
def explicit(fun, x0):
    return x0 - fun(x0)  # for functions x - a


def check(*makers):
    """Each maker gives a function and the factor of its derivative; all closures are kept."""
    kept = []
    for make in makers:
        fun, factor = make()
        kept.append(fv.Closure(fun, X))
        np.testing.assert_allclose(gradient(kept[-1], X), factor * jnp.cos(X), rtol=1e-6)

        def solve(a, fun=fun):
            return explicit(lambda x: x - fun(a * X), jnp.zeros(3)).sum()

        got = jax.grad(solve)(1.0)
        np.testing.assert_allclose(got, jnp.sum(factor * jnp.cos(X) * X), rtol=1e-5)


class Config:
    scale = 1.0
    hidden = 1.0

    @property
    def seen(self):
        return type(self).hidden

    def method(self):
        return 1.0

    @classmethod
    def of_class(cls):
        return cls.scale

    @staticmethod
    def static():
        return 1.0


class Derived(Config):
    pass


class Slots:
    __slots__ = ("scale",)


class Late:
    def __getattr__(self, name):
        return Config.scale


class Kind(enum.Enum):
    ONE = 1

    def scale(self):
        return Config.scale


class DictOfUser(dict):
    pass


class ListOfUser(list):
    pass


def _module(name, **values):
    made = types.ModuleType(name)
    vars(made).update(values)
    return made


package = _module("package", part=_module("package.part", scale=1.0))
config, derived, slots, late = Config(), Derived(), Slots(), Late()
ordered, default = collections.OrderedDict(c=1.0), collections.defaultdict(float)
queue, octets, of_user, listed = (
    collections.deque([1.0]),
    bytearray(1),
    DictOfUser(),
    ListOfUser([1]),
)
array, objects = np.array([1.0]), np.array([[1.0]], object)
nested = ([[1.0]],)
partial = functools.partial(functools.partial(lambda a, b, c: a[0][0] * b * c, nested[0]), 1.0)
GLOBAL = 1.0


def with_default(c=1.0, *, d=1.0):
    return c * d


def one():
    return 1.0


def two():
    return 2.0


def replaced():
    return 1.0


def _imports():
    from imported_by_a_rule.part import scale

    return scale


def _imports_as():
    import imported_by_a_rule.part as p

    return p.scale


def _held_module():
    held = package
    return lambda: held.part.scale


def _in_cell():
    value = 1.0

    def change(c):
        nonlocal value
        value = c

    return (lambda: value), change


def _set(thing, name):
    return lambda c: setattr(thing, name, c)


def _put(thing, key):
    return lambda c: thing.__setitem__(key, c)


# What a rule reads, and how that changes.
CHANGES = {
    "class attribute": (lambda: Config.scale, _set(Config, "scale")),
    "inherited class attribute": (lambda: Derived.scale, _set(Config, "scale")),
    "class attribute by an instance": (lambda: derived.scale, _set(Config, "scale")),
    "property": (lambda: config.seen, _set(Config, "hidden")),
    "method": (lambda: config.method(), lambda c: setattr(Config, "method", lambda _: c)),
    "class method": (lambda: Config.of_class(), _set(Config, "scale")),
    "static method": (
        lambda: Config.static(),
        lambda c: setattr(Config, "static", staticmethod(lambda: c)),
    ),
    "__getattr__": (lambda: late.anything, _set(Config, "scale")),
    "method of an enum member": (lambda: Kind.ONE.scale(), _set(Config, "scale")),
    "slot": (lambda: slots.scale, _set(slots, "scale")),
    "attribute of a module in a module": (
        lambda: package.part.scale,
        _set(package.part, "scale"),
    ),
    "module in a module": (
        lambda: package.part.scale,
        lambda c: setattr(package, "part", _module("package.part", scale=c)),
    ),
    "module in a cell": (_held_module(), lambda c: setattr(package.part, "scale", c)),
    "import inside": (_imports, lambda c: _import_again(c)),
    "import inside, renamed": (_imports_as, lambda c: _import_again(c)),
    "globals()": (lambda: globals()["GLOBAL"], lambda c: globals().update(GLOBAL=c)),
    "global": (lambda: GLOBAL, lambda c: globals().update(GLOBAL=c)),
    "OrderedDict": (lambda: ordered["c"], _put(ordered, "c")),
    "defaultdict": (lambda: default["c"], _put(default, "c")),
    "deque": (lambda: queue[0], _put(queue, 0)),
    "bytearray": (lambda: float(octets[0]), lambda c: octets.__setitem__(0, int(c))),
    "dict of the user's": (lambda: of_user["c"], _put(of_user, "c")),
    "list of the user's": (lambda: listed[0], _put(listed, 0)),
    "NumPy array": (lambda: float(array[0]), _put(array, 0)),
    "NumPy array of objects": (lambda: objects[0, 0], _put(objects, (0, 0))),
    "list in a list in a tuple": (lambda: nested[0][0][0], _put(nested[0][0], 0)),
    "partial of a partial": (lambda: partial(1.0), lambda c: nested[0].__setitem__(0, [c])),
    "cell": _in_cell(),
    "default": (lambda: with_default(), lambda c: setattr(with_default, "__defaults__", (c,))),
    "keyword default": (lambda: with_default(1.0), _put(with_default.__kwdefaults__, "d")),
    "code": (
        lambda: replaced(),
        lambda c: setattr(replaced, "__code__", {1: one, 2: two}[c].__code__),
    ),
}


def _import_again(c):
    sys.modules["imported_by_a_rule"] = _module("imported_by_a_rule")
    sys.modules["imported_by_a_rule.part"] = _module("imported_by_a_rule.part", scale=c)
    sys.modules["imported_by_a_rule"].part = sys.modules["imported_by_a_rule.part"]


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.slow
def test_what_a_rule_reads_later_counts(name) -> None:
    read, change = CHANGES[name]
    sine = rule(read)

    def at(c):
        change(c)
        return (lambda x: sine(x)), c

    check(*(functools.partial(at, c) for c in (1.0, 2.0, 1.0)))


class Equal:
    """Equal to every other."""

    def __init__(self, c):
        self.c = c

    def __eq__(self, other):
        return isinstance(other, Equal)

    def __hash__(self):
        return 1

    def get(self):
        return self.c


class Pair(NamedTuple):
    c: float

    def get(self):
        return self.c


@dataclasses.dataclass(frozen=True)
class Frozen:
    c: float
    other: float = dataclasses.field(default=1.0, compare=False)

    def get(self):
        return self.other


def _type(x):
    return {"int": 1.0, "float": 2.0, "bool": 3.0, "float64": 4.0, "float32": 5.0, "Colour": 6.0}[
        type(x).__name__
    ]


class Colour(enum.IntEnum):
    RED = 1


def _sign(x):
    return 2.0 if np.signbit(x) else 1.0


ONES = [1, 1.0, True, np.float64(1), np.float32(1), Colour.RED]
# What a rule holds, and what it makes of it; the members are equal for Python, or alike.
HELD = {
    "types of one": (ONES, _type),
    "types of one in a tuple": ([(one,) for one in ONES], lambda held: _type(held[0])),
    "types of one in a set": ([frozenset([o]) for o in ONES], lambda held: _type(next(iter(held)))),
    "sign of zero": ([0.0, -0.0], _sign),
    "sign of zero, NumPy": ([np.float32(0.0), np.float32(-0.0)], _sign),
    "sign of zero, imaginary": ([0j, complex(0.0, -0.0)], lambda z: _sign(z.imag)),
    "string": (["a", "bb"], lambda s: float(len(s))),
    "dtype": ([jnp.float16, jnp.dtype("float16"), np.float64, "float32"], lambda d: _size(d)),
    "bound method of equal objects": ([Equal(1.0).get, Equal(2.0).get], lambda get: get()),
    "bound method of named tuples": ([Pair(1.0).get, Pair(2.0).get], lambda get: get()),
    "field that is not compared": ([Frozen(1.0).get, Frozen(1.0, 2.0).get], lambda get: get()),
}


def _size(dtype):
    return float(jnp.dtype(dtype).itemsize)


@pytest.mark.parametrize("name", HELD)
@pytest.mark.slow
def test_what_a_rule_holds_counts_by_more_than_equality(name) -> None:
    members, factor = HELD[name]
    make = lambda m: lambda: (rule(lambda: factor(m)), factor(m))
    check(*(make(m) for m in members), make(members[0]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def with_option(x, option):
    return jnp.sin(x)


with_option.defjvp(lambda o, p, t: (jnp.sin(p[0]), _told(o) * jnp.cos(p[0]) * t[0]))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["x"], meta_fields=["option"])
@dataclasses.dataclass
class Leaf:
    x: object
    option: object


@jax.custom_vjp
def of_tree(tree):
    return jnp.sin(tree.x)


of_tree.defvjp(
    lambda tree: (jnp.sin(tree.x), tree),
    lambda tree, ct: (Leaf(_told(tree.option) * jnp.cos(tree.x) * ct, tree.option),),
)


def _told(option):
    if isinstance(option, Frozen):
        option = option.c
    return _type(option) + 10 * np.signbit(option)


@pytest.mark.parametrize("wrap", [lambda o: o, pytest.param(Frozen, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "function", [with_option, lambda x, option: of_tree(Leaf(x, option))], ids=["option", "tree"]
)
def test_static_numbers_count_by_type_and_bits(function, wrap) -> None:
    make = lambda o: lambda: ((lambda x: function(x, o)), _told(o))
    check(*(make(wrap(o)) for o in (1, 1.0, True, 0.0, -0.0, 1)))


@pytest.mark.parametrize("member", [1, 1.0, True, 0.0, -0.0, "a", np.float32(1), Colour.RED])
def test_metadata_of_a_result_comes_back_as_it_is(member) -> None:
    others = [1.0, 1, True, -0.0, 0.0, np.float64(1), Colour.RED]
    wrappers = [lambda o: o, Frozen, lambda o: (o,), lambda o: frozenset([o])]
    make = lambda o: fv.Closure(lambda x: [Leaf(x * 2, w(o)) for w in wrappers], X)
    kept = [make(other) for other in others]
    for got, wrap in zip(make(member)(X), wrappers, strict=True):
        assert repr(got.option) == repr(wrap(member))
    assert len({jax.tree.structure(f) for f in kept}) == len(others)


def test_a_rule_that_is_replaced_counts() -> None:
    @jax.custom_jvp
    def forward(x):
        return jnp.sin(x)

    @jax.custom_vjp
    def reverse(x):
        return jnp.sin(x)

    def replace_jvp(c):
        forward.defjvp(lambda p, t: (jnp.sin(p[0]), c * jnp.cos(p[0]) * t[0]))
        return (lambda x: forward(x)), c

    def replace_vjp(c):
        reverse.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (c * jnp.cos(x) * ct,))
        return (lambda x: reverse(x)), c

    for replace in (replace_jvp, replace_vjp):
        check(*(functools.partial(replace, c) for c in (1.0, 2.0, 1.0)))


def identity(x):
    return x


identity.jvp = identity.fun = identity.fwd = identity.bwd = "an attribute of the function's own"


def _identity_jvp(c):
    # The attribute `jvp` is copied by JAX and then replaced by the rule.
    scaled = jax.custom_jvp(identity)
    scaled.fun = identity
    scaled.defjvp(lambda p, t: (p[0], c * t[0]))
    return lambda x, ct: jax.jvp(scaled, (x,), (ct,))[1]


def _identity_vjp(c):
    scaled = jax.custom_vjp(identity)
    scaled.fun = identity
    scaled.defvjp(lambda x: (x, None), lambda _, ct: (c * ct,))
    return lambda x, ct: jax.vjp(scaled, x)[1](ct)[0]


@pytest.mark.parametrize("scaled", [_identity_jvp, _identity_vjp])
def test_a_function_may_carry_attributes_named_like_those_of_a_rule(scaled) -> None:
    def make(c):
        scale = scaled(c)

        @jax.custom_vjp
        def sine(x):
            return jnp.sin(x)

        sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (scale(x, jnp.cos(x) * ct),))
        return sine, c

    check(*(functools.partial(make, c) for c in (1.0, 2.0, 1.0)))


def test_an_unchanged_rule_is_the_same_program() -> None:
    """The other half: what counts by content does not count by more than that."""
    sine = rule(lambda: config.seen * derived.of_class() * package.part.scale * Kind.ONE.scale())
    first, second = (fv.Closure(lambda x: sine(x) + 1.0, X) for _ in range(2))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    fresh = [fv.Closure(lambda x: Leaf(x, Frozen(o)), X) for o in (1.0, 1.0)]
    assert jax.tree.structure(fresh[0]) == jax.tree.structure(fresh[1])
