"""Names of captured values: every way to reach one, and objects that do not like visits."""

import dataclasses
import enum
import functools
import gc
import sys
import types
import weakref
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest

from freevars._names.search import Name, ReachableLeaves, function_name, name_values


class Value:
    """Stands for an array: found by identity, never entered."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise AssertionError("truth taken")


def is_leaf(obj: object) -> bool:
    return type(obj) is Value


def names(fun: Any, *values: object) -> list[list[str]]:
    return [[name.name for name in found] for found in name_values(fun, values, is_leaf=is_leaf)]


def only(fun: Any, value: object) -> Name:
    (found,) = name_values(fun, [value], is_leaf=is_leaf)
    (name,) = found
    return name


GLOBAL = Value()
TABLE = {"a": [Value()]}


# Each way to reach a value


def test_closure_cell() -> None:
    params = {"dense": {"kernel": Value()}}

    def objective(x: object) -> object:
        return x, params

    assert only(objective, params["dense"]["kernel"]) == Name(
        "params['dense']['kernel']", "objective.__closure__['params']['dense']['kernel']"
    )


def test_global_that_the_code_mentions() -> None:
    def objective(x: object) -> object:
        return x, [TABLE for _ in "nested code"]

    assert only(objective, TABLE["a"][0]) == Name(
        "TABLE['a'][0]", "objective.__globals__['TABLE']['a'][0]"
    )
    assert names(objective, GLOBAL) == [[]], "a global that the code does not mention"


def test_default_and_keyword_default() -> None:
    lam, mu = Value(), Value()

    def objective(x: object, lam: object = lam, *, mu: object = mu) -> object:
        return x, lam, mu

    assert only(objective, lam) == Name("objective.<default lam>", "objective.__defaults__['lam']")
    assert only(objective, mu) == Name("objective.<default mu>", "objective.__kwdefaults__['mu']")


class Model:
    shared = Value()
    unread = Value()

    def __init__(self) -> None:
        self.scale = Value()

    def loss(self, x: object) -> object:
        return self.scale, self.shared, self.predict(x)

    def predict(self, x: object) -> object:
        return x, GLOBAL

    @property
    def bias(self) -> object:
        raise AssertionError("property called")


def test_bound_self_its_attributes_and_the_methods_it_calls() -> None:
    model = Model()
    assert only(model.loss, model.scale) == Name("self.scale", "Model.loss.__self__.scale")
    assert names(model.loss, Model.shared, Model.unread, GLOBAL) == [
        ["self.shared"],
        [],
        ["GLOBAL"],
    ]
    step = model.loss
    assert names(lambda: step, model.scale) == [["step.__self__.scale"]]
    assert names(lambda x: model.loss(x), model.scale) == [["model.scale"]]


def test_property_code_is_read_and_not_run() -> None:
    class Lazy:
        @property
        def weight(self) -> object:
            raise AssertionError(GLOBAL)

        @functools.cached_property
        def table(self) -> object:
            return TABLE

    lazy = Lazy()
    assert names(lambda: (lazy.weight, lazy.table), GLOBAL, TABLE["a"][0]) == [
        ["GLOBAL"],
        ["TABLE['a'][0]"],
    ]


def test_callable_object() -> None:
    class Affine:
        def __init__(self) -> None:
            self.weight = Value()

        def __call__(self, x: object) -> object:
            return x, self.weight, GLOBAL

    affine = Affine()
    assert only(affine, affine.weight) == Name("self.weight", "<Affine object>.weight")
    assert names(affine, GLOBAL) == [["GLOBAL"]]
    assert names(lambda x: affine(x), affine.weight) == [["affine.weight"]]


def test_partial_names_the_parameter_it_fills() -> None:
    w, b, extra, lam = Value(), Value(), Value(), Value()

    def loss(w: object, b: object, *rest: object, lam: object) -> object:
        return w, b, rest, lam

    fun = functools.partial(functools.partial(loss, w), b, extra, lam=lam)
    assert names(fun, w, b, extra, lam) == [["w"], ["b"], ["args[2]"], ["lam"]]
    assert only(fun, b).path == "partial(loss).args[1]"
    assert only(fun, lam).path == "partial(loss).keywords['lam']"
    assert names(lambda: fun(), w) == [["fun.<partial w>"]]
    model = Model()
    assert names(functools.partial(model.predict, w), w, model.scale) == [["x"], ["self.scale"]]


def test_functions_that_it_calls() -> None:
    w = Value()

    def predict(x: object) -> object:
        return x, w

    def objective(x: object) -> object:
        return predict(x)

    # Written in the same function, so a person calls the variable by its bare name.
    assert only(objective, w) == Name("w", "objective.__closure__['predict'].__closure__['w']")


def layer(weight: object) -> Callable[[object], object]:
    return lambda x: (x, weight)


def test_two_variables_of_one_name_are_told_apart() -> None:
    w, v = Value(), Value()
    first, second = layer(w), layer(v)
    assert names(lambda x: first(second(x)), w, v) == [
        ["first.<closure weight>"],
        ["second.<closure weight>"],
    ]


def test_one_display_name_for_two_values_becomes_the_path() -> None:
    def scope(value: object, inner: Any) -> Callable[[], object]:
        return lambda: (value, inner)

    a, b = Value(), Value()
    fun = scope(a, scope(b, None))
    shown = names(fun, a, b)
    assert shown == [
        ["<lambda>.__closure__['value']"],
        ["<lambda>.__closure__['inner'].__closure__['value']"],
    ]


def test_wrappers_are_looked_through() -> None:
    w, lam = Value(), Value()

    def traced(fun: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(fun)
        def wrapper(*args: object) -> object:
            return fun(*args)

        return wrapper

    @traced
    def objective(x: object, lam: object = lam) -> object:
        return x, w, lam

    assert names(objective, w, lam) == [["w"], ["objective.<default lam>"]]
    assert only(objective, w).path == "objective.__wrapped__.__closure__['w']"


def test_another_module_is_named_and_read_where_code_mentions_it() -> None:
    config = types.ModuleType("config")
    config.W = Value()  # type: ignore[attr-defined]
    config.V = Value()  # type: ignore[attr-defined]
    exec("def scaled(x): return x, V", config.__dict__)  # noqa: S102
    assert names(lambda x: (x, config.W), config.W, config.V) == [["config.W"], []]
    assert names(lambda x: config.scaled(x), config.V) == [["config.V"]]
    os_like = sys.modules["os"]
    assert names(lambda: os_like.environ, os_like.environ) == [[]], (
        "a standard module is not entered"
    )


def test_function_attributes_and_builtin_methods() -> None:
    def objective(x: object) -> object:
        return x

    objective.scale = Value()  # type: ignore[attr-defined]
    assert names(objective, objective.scale) == [["objective.scale"]]  # type: ignore[attr-defined]
    table = {"k": Value()}
    lookup = table.get
    assert names(lambda: lookup("k"), table["k"]) == [["lookup.__self__['k']"]]


class Pair(NamedTuple):
    left: object
    right: object


@dataclasses.dataclass
class State:
    mean: object
    history: list[object]


@dataclasses.dataclass(slots=True, frozen=True)
class Slotted:
    mean: object


class Colour(enum.Enum):
    RED = 1


class Frozen(Mapping[str, object]):
    """A mapping around one dict, as parameter trees of libraries are."""

    def __init__(self, **items: object) -> None:
        self._dict = items

    def __getitem__(self, key: str) -> object:
        raise AssertionError("entered")

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("iterated")

    def __len__(self) -> int:
        raise AssertionError("measured")


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda v: {"w": v}, "tree['w']"),
        (lambda v: {0: [1, v]}, "tree[0][1]"),
        (lambda v: {("a", 1): (v,)}, "tree[('a', 1)][0]"),
        (lambda v: {Colour.RED: v}, "tree[Colour.RED]"),
        (lambda v: {object(): v}, "tree[<object object>]"),
        (lambda v: {"x" * 100: v}, f"tree['{'x' * 79}…']"),
        (lambda v: Pair(0, v), "tree.right"),
        (lambda v: State(v, []), "tree.mean"),
        (lambda v: State(0, [v]), "tree.history[0]"),
        (lambda v: Slotted(v), "tree.mean"),
        (lambda v: types.SimpleNamespace(a=v), "tree.a"),
        (lambda v: OrderedDict(a=deque([v])), "tree['a'][0]"),
        (lambda v: Frozen(a=v), "tree['a']"),
        (lambda v: UserDict(a=v), "tree['a']"),
    ],
)
def test_containers(build: Callable[[object], object], expected: str) -> None:
    value = Value()
    tree = build(value)
    assert names(lambda: tree, value) == [[expected]]


def test_sets_are_not_entered() -> None:
    value = object()
    tree = {value}
    assert names(lambda: tree, value) == [[]]


def test_modules_of_layers() -> None:
    class Layer:
        def __init__(self, **children: object) -> None:
            self._parameters = {k: v for k, v in children.items() if type(v) is Value}
            self._buffers: dict[str, object] = {"none": None}
            self._modules = {k: v for k, v in children.items() if type(v) is Layer}
            self._hooks: dict[str, object] = {}

        def __getattr__(self, name: str) -> object:
            raise AssertionError(name)

    weight, scale = Value(), Value()
    layers = Layer(**{"0": Layer(), "1": Layer(weight=weight)})
    model = Layer(layers=layers, **{"log scale": scale})
    assert names(lambda: model, weight, scale) == [
        ["model.layers[1].weight"],
        ["model['log scale']"],
    ]
    assert names(model, weight) == [["self.layers[1].weight"]]


class Layers:
    """A module of layers as PyTorch builds it; its `forward` runs when it is called."""

    def __init__(self, **children: object) -> None:
        self._parameters = {k: v for k, v in children.items() if type(v) is Value}
        self._buffers: dict[str, object] = {}
        self._modules = {k: v for k, v in children.items() if isinstance(v, Layers)}

    def forward(self, x: object) -> object:
        return x, GLOBAL


class LayerDict(Layers):
    def keys(self) -> object:
        raise AssertionError("keys taken")

    def __getitem__(self, key: str) -> object:
        raise AssertionError("entered")


def test_a_mapping_of_layers_is_named_by_its_keys() -> None:
    up, first = Value(), Value()
    layers = LayerDict(**{"up": Layers(w=up), "0": first})
    assert names(lambda: layers, up, first) == [["layers['up'].w"], ["layers['0']"]]


def test_a_compiled_module_goes_by_its_own_name_and_is_looked_through() -> None:
    w = Value()
    compiled = Layers(_orig_mod=Layers(w=w))
    assert only(lambda: compiled, w) == Name(
        "compiled.w", "<lambda>.__closure__['compiled']._orig_mod.w"
    )
    assert names(compiled, w) == [["self.w"]]
    assert function_name(compiled) == "<Layers object>"


def test_methods_that_only_the_framework_calls() -> None:
    model = Layers()
    implicit = frozenset({"forward"})
    for fun in (model, lambda x: model(x)):  # type: ignore[operator]
        assert name_values(fun, [GLOBAL], is_leaf=is_leaf) == [()]
        (found,) = name_values(fun, [GLOBAL], is_leaf=is_leaf, implicit=implicit)
        assert [name.name for name in found] == ["GLOBAL"]
    hidden = Value()

    class Local(Layers):
        def forward(self, x: object) -> object:
            return x, hidden

    (found,) = name_values(Local(), [hidden], is_leaf=is_leaf, implicit=implicit)
    assert [name.name for name in found] == ["hidden"]


def test_classes_of_a_framework_whose_instances_are_entered() -> None:
    class Distribution:
        def __init__(self, loc: object) -> None:
            self.loc = loc

    Distribution.__module__ = "torch.distributions"
    normal = Distribution(Value())

    def found(enters: Any) -> list[str]:
        (names,) = name_values(lambda: normal, [normal.loc], is_leaf=is_leaf, enters=enters)
        return [name.name for name in names]

    assert found(None) == []
    assert found(lambda cls: cls is not Distribution) == []
    assert found(lambda cls: cls is Distribution) == ["normal.loc"]


def test_every_leaf_that_is_reachable_sets_included() -> None:
    a, b = Value(), object()
    params = {"a": [a, a], "b": {b}, "c": frozenset({b})}
    leaves = ReachableLeaves(lambda obj: type(obj) is Value or type(obj) is object)
    found = leaves.of(lambda: (params, a))
    assert [(id(value), name.name) for value, name in found] == [
        (id(a), "a"),
        (id(b), "params['b']{…}"),
    ]


def test_a_second_function_opens_only_what_the_first_did_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b, c = Value(), Value(), Value()
    shared = {"many": [a, *map(float, range(1000))]}
    looked: list[object] = []

    def is_leaf(obj: object) -> bool:
        looked.append(obj)
        return type(obj) is Value

    leaves = ReachableLeaves(is_leaf)
    current = b

    def read() -> object:
        return shared, current

    assert [name.name for _, name in leaves.of(read)] == ["current", "shared['many'][0]"]
    looked.clear()
    assert leaves.of(lambda: (shared, b)) == []
    assert len(looked) < 20
    current = c  # a variable may be bound again between two walks
    assert [value for value, _ in leaves.of(read)] == [c]
    monkeypatch.setattr("freevars._names.search._BUDGET", 10)
    deep = [[[Value()]] for _ in range(8)]
    leaves = ReachableLeaves(is_leaf)
    counts = [len(leaves.of(lambda: deep)) for _ in range(9)]
    assert counts[0] < 8  # out of its budget, and the next goes on
    assert sum(counts) == 8


def test_a_member_that_only_a_second_function_mentions() -> None:
    class Held:
        table = Value()

    held = Held()
    leaves = ReachableLeaves(lambda obj: type(obj) is Value)
    assert leaves.of(lambda: held) == []
    assert [value for value, _ in leaves.of(lambda: held.table)] == [Held.table]


# The rules of the walk


def test_the_shortest_path_comes_first_and_other_names_follow() -> None:
    w = Value()
    deep = {"a": {"b": w}}
    model = types.SimpleNamespace(w=w)
    assert names(lambda: (deep, model, w), w) == [["w", "model.w", "deep['a']['b']"]]


def test_a_shared_container_gives_its_values_two_names() -> None:
    params = {"w": Value()}
    model = types.SimpleNamespace(params=params)
    assert names(lambda: (params, model), params["w"]) == [["params['w']", "model.params['w']"]]


def test_names_of_one_value_are_few() -> None:
    w = Value()
    tree = [w] * 100
    assert names(lambda: tree, w) == [[f"tree[{i}]" for i in range(4)]]


def test_order_repeats_and_unreachable_values() -> None:
    a, b, nowhere = Value(), Value(), Value()
    assert names(lambda: (a, b), b, nowhere, a, b) == [["b"], [], ["a"], ["b"]]
    assert names(lambda: (a, b)) == []


def test_small_constants_have_no_identity() -> None:
    one, text = 1, "text"
    assert names(lambda: (one, text), 1, "text", None, True) == [[], [], [], []]


def test_an_identity_that_sees_through_a_wrapper() -> None:
    class View(Value):
        def __init__(self, memory: int) -> None:
            self.memory = memory

    def address(obj: object) -> object:
        return ("memory", obj.memory) if type(obj) is View else id(obj)

    data, other, plain = View(1), View(2), Value()

    def objective(x: object) -> object:
        return x, data, other, plain

    found = name_values(
        objective,
        [View(2), plain, View(1), View(3)],
        is_leaf=lambda obj: type(obj) in (View, Value),
        identity=address,
    )
    assert [[name.name for name in names] for names in found] == [
        ["other"],
        ["plain"],
        ["data"],
        [],
    ]


def test_framework_internals_are_not_entered_but_wrappers_are() -> None:
    w, secret = Value(), Value()
    framework = types.ModuleType("jax")
    exec(  # noqa: S102
        "class Jitted:\n"
        "    def __init__(self, fun, cache): self.__wrapped__, self.cache = fun, cache\n"
        "    def __call__(self, *args): return GLOBALS\n"
        "def jit(fun, cache): return Jitted(fun, cache)\n",
        framework.__dict__,
    )
    framework.GLOBALS = secret  # type: ignore[attr-defined]

    def objective(x: object) -> object:
        return x, w

    jitted = framework.jit(objective, [secret])
    assert name_values(jitted, [w, secret]) == [
        (Name("w", "objective.__wrapped__.__closure__['w']"),),
        (),
    ]
    assert name_values(framework.jit, [secret]) == [()]
    assert name_values(lambda: framework.jit, [secret]) == [()]


def test_cycles() -> None:
    w = Value()
    tree: dict[str, Any] = {"a": {}}
    tree["a"]["up"] = tree
    tree["a"]["list"] = [tree["a"], tree, w]
    node = types.SimpleNamespace()
    node.me, node.tree = node, tree

    def objective(x: object) -> object:
        return objective, tree, node

    assert names(objective, w)[0][0] == "tree['a']['list'][2]"
    assert not any(".me" in name or "'up'" in name for name in names(objective, w)[0])


def test_callables_in_cycles() -> None:
    w = Value()
    fun = functools.partial(lambda x: x)
    fun.__setstate__((fun, (w,), {}, None))  # type: ignore[attr-defined]
    assert names(fun, w) == [["args[0]"]]

    def first() -> object:
        return w

    first.__wrapped__ = first  # type: ignore[attr-defined]
    assert names(first, w) == [["w"]]
    looped = Model()
    looped.__wrapped__ = looped  # type: ignore[attr-defined]
    assert function_name(looped) == "<Model object>"
    assert names(looped, looped.scale) == [["self.scale"]]


class Hostile(Value):
    """Whatever is done to it, but looking at what it stores, is an error."""

    def __init__(self, payload: object) -> None:
        object.__setattr__(self, "payload", payload)

    def __getattribute__(self, name: str) -> object:
        raise AssertionError(f"attribute {name} read")

    def __iter__(self) -> Iterator[object]:
        raise AssertionError("iterated")

    def __len__(self) -> int:
        raise AssertionError("measured")

    def __repr__(self) -> str:
        raise AssertionError("shown")


class HostileList(list[object]):
    def __iter__(self) -> Iterator[object]:
        raise AssertionError("iterated")

    def __len__(self) -> int:
        raise AssertionError("measured")


class HostileDict(dict[object, object]):
    def items(self) -> Any:
        raise AssertionError("items taken")

    def __getitem__(self, key: object) -> object:
        raise AssertionError("entered")


class HostileKey:
    def __repr__(self) -> str:
        raise AssertionError("shown")

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")


class Liar:
    """Says that it is a dict, and has a property for a ``__dict__``."""

    payload: object

    @property
    def __class__(self) -> Any:
        raise AssertionError("class asked")

    @property
    def __dict__(self) -> Any:
        raise AssertionError("dict asked")


class Meta(type):
    def __getattribute__(cls, name: str) -> Any:
        raise AssertionError(f"class attribute {name} read")

    def __eq__(cls, other: object) -> bool:
        raise AssertionError("classes compared")

    __hash__ = type.__hash__


class OfMeta(metaclass=Meta):
    pass


def test_hostile_objects() -> None:
    value = Value()
    hostile = Hostile(value)
    liar = Liar()
    tree = HostileList([HostileDict({HostileKey(): hostile}), liar, object.__new__(OfMeta), OfMeta])
    assert names(lambda: (tree, liar, hostile), value) == [
        ["hostile.payload", "tree[0][<HostileKey object>].payload"]
    ]


def test_empty_cells_and_odd_classes() -> None:
    value = Value()

    def objective(x: object) -> object:
        return x, late, early, odd

    early = value
    odd = type("Odd", (), {"__module__": 3, "__slots__": ("unset",)})()
    assert names(objective, value) == [["early"]]
    late = value
    assert names(objective, value) == [["early", "late"]]


# Large inputs, and what it keeps


def test_a_thousand_leaves() -> None:
    tree = {f"layer{i}": {"w": [Value() for _ in range(10)]} for i in range(100)}
    values = [v for part in tree.values() for v in part["w"]]
    shown = names(lambda: tree, *values)
    assert shown[-1] == ["tree['layer99']['w'][9]"]


def test_the_walk_is_bounded() -> None:
    value = Value()
    numbers = [[float(i + j) for i in range(1000)] for j in range(1000)]
    chain: list[Any] = []
    for _ in range(200_000):
        chain = [chain]
    assert names(lambda: (numbers, chain, value), value) == [["value"]]
    assert names(lambda: (numbers, chain), Value()) == [[]]
    while chain:  # a deep list is taken apart by hand: its destructor would recurse
        chain = chain.pop()


def test_one_huge_container_does_not_hide_what_comes_after() -> None:
    numbers, value = list(map(float, range(200_000))), Value()
    holder = {"a": {"b": value}}
    assert names(lambda: (numbers, holder), value) == [["holder['a']['b']"]]


def test_nothing_is_kept() -> None:
    value = Value()
    model = Model()
    gone = weakref.ref(value), weakref.ref(model)
    model.scale = value
    assert names(lambda: model, value) == [["model.scale"]]  # noqa: F821 (deleted below)
    del value, model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        (layer, "layer"),
        (layer(0), "<lambda>"),
        (Model().loss, "Model.loss"),
        (functools.partial(layer, 0), "partial(layer)"),
        (Model(), "<Model object>"),
        (Model, "Model"),
        (len, "len"),
        (functools.lru_cache(Model().loss), "Model.loss"),
    ],
)
def test_function_names(fun: object, expected: str) -> None:
    assert function_name(fun) == expected


def test_jax_wrappers() -> None:
    jax = pytest.importorskip("jax")
    w = jax.numpy.ones(3)

    @jax.custom_vjp
    def rule(x: Any) -> Any:
        return x * w

    rule.defvjp(lambda x: (rule(x), w), lambda w, g: (g * w,))

    def objective(x: Any) -> Any:
        return rule(x) + w

    jitted = jax.jit(jax.checkpoint(jax.grad(objective)))
    assert names(jitted, w)[0][0] == "w"
    assert names(lambda x: jitted(x), w) == [["w"]]
    assert names(jax.tree_util.Partial(objective, w), w)[0][0] == "x"


def test_equinox_modules() -> None:
    eqx = pytest.importorskip("equinox")
    jax = pytest.importorskip("jax")
    mlp = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    weight = mlp.layers[1].weight
    assert names(mlp, weight) == [["self.layers[1].weight"]]
    assert names(lambda x: mlp(x), weight) == [["mlp.layers[1].weight"]]
    assert names(mlp.__call__, weight) == [["self.layers[1].weight"]]
