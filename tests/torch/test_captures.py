"""Reports of what a function captures: every name and fact, in every transform, nothing kept."""

import dataclasses
import functools
import gc
import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import freevars.torch as fv
from freevars.report import CapturedValue, CaptureReport
from freevars.torch import CaptureError, StructureError, _modes
from freevars.torch import _describe as _names
from tests.torch import other_module
from tests.torch.convert.test_convert_errors import scripted
from tests.torch.explicit import fresh

HERE = Path(__file__).name
LAM = torch.tensor(0.1, requires_grad=True)
GLOBAL = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
X = torch.ones(3)


def by_name(report: CaptureReport) -> dict[str, CapturedValue]:
    return {value.name: value for value in report.values}


def names(fun: Any, *args: Any, **options: Any) -> list[str]:
    return [value.name for value in fv.captures(fun, *(args or (X,)), **options).values]


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class Model:
    def __init__(self) -> None:
        self.scale = torch.ones(3, requires_grad=True)

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * x

    def loss(self, x: Tensor) -> Tensor:
        return (self.scale * x * GLOBAL).sum()

    @property
    def forbidden(self) -> Tensor:
        raise AssertionError("property called")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.bias = param(3)
        self.register_buffer("mean", torch.zeros(3))
        self.table = torch.ones(3)  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return (x - self.mean) * self.table + self.bias * GLOBAL

    @property
    def forbidden(self) -> Tensor:
        raise AssertionError("property called")


OF_NET = [
    "layers[0].weight",
    "layers[0].bias",
    "layers[1].weight",
    "layers[1].bias",
    "mean",
    "table",
    "bias",
]


# Names


def test_names_however_a_tensor_is_reached() -> None:
    params = {"dense": {"kernel": fresh(3, 3).float(), "bias": [fresh(3).float()]}}
    model = Model()
    index = torch.tensor([2, 1, 0])

    def objective(x: Tensor, lam: Tensor = LAM, *, mu: Tensor = GLOBAL) -> Tensor:
        h = x @ params["dense"]["kernel"] + params["dense"]["bias"][0]
        h = torch.func.vmap(lambda h: model(h))(h[None])[0]
        return (h[index] * GLOBAL * mu).sum() * lam

    for hoist in ("differentiable", "floating", "all"):
        found = by_name(fv.captures(objective, X, hoist=hoist))  # type: ignore[arg-type]
        assert set(found) == {
            "params['dense']['kernel']",
            "params['dense']['bias'][0]",
            "model.scale",
            "index",
            "objective.<default mu>",
            "objective.<default lam>",
        }
        assert found["objective.<default mu>"].names == ("objective.<default mu>", "GLOBAL")
        assert all(v.hoisted == (hoist == "all" or k != "index") for k, v in found.items())
    assert found["params['dense']['bias'][0]"].paths == (
        "objective.__closure__['params']['dense']['bias'][0]",
    )


def test_partial_bound_method_and_callable_object() -> None:
    model = Model()
    w, b = fresh(3), fresh(3)
    partial = functools.partial(lambda w, x, *, b: w * x + b, w, b=b)
    assert names(partial) == ["w", "b"]
    assert names(lambda x: partial(x)) == ["partial.<partial w>", "partial.<partial b>"]
    assert fv.captures(partial, X).values[0].paths[0] == "partial(<lambda>).args[0]"
    assert names(model) == ["self.scale"]
    assert names(model.__call__) == ["self.scale"]
    assert names(model.loss) == ["self.scale", "GLOBAL"]
    step = model.loss
    assert names(lambda x: step(x)) == ["step.__self__.scale", "GLOBAL"]


def test_a_module_is_named_as_it_is_written() -> None:
    net = Net()
    assert names(lambda x: net(x)) == [*(f"net.{name}" for name in OF_NET), "GLOBAL"]
    assert names(net) == [*(f"self.{name}" for name in OF_NET), "GLOBAL"]
    assert names(net.forward) == [*(f"self.{name}" for name in OF_NET), "GLOBAL"]
    value = fv.captures(lambda x: net(x), X).values[0]
    assert value.paths == ("<lambda>.__closure__['net'].layers[0].weight",)


def test_a_module_is_told_by_its_forward_method() -> None:
    hidden = fresh(3).float()

    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * hidden

    line = Local.forward.__code__.co_firstlineno
    report = fv.captures(Local(), X)
    assert [v.name for v in report.values] == ["hidden"]
    assert str(report.where) == f"{HERE}:{line}"
    assert report.source is not None
    assert report.source.text.startswith("def forward")
    assert report.values[0].captured_by == f"<Local object> at {HERE}:{line}"
    local = Local()
    assert names(lambda x: local(x)) == ["hidden"]


@pytest.mark.parametrize("how", ["module", "function", "method"])
def test_compiled_callables_go_by_the_names_of_what_they_compile(how: str) -> None:
    net = Net()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_ = functools.partial(torch.compile, backend=backend)
    if how == "module":
        compiled = compile_(net)
        assert names(lambda x: compiled(x)) == [*(f"compiled.{name}" for name in OF_NET), "GLOBAL"]
        assert names(compiled) == [*(f"self.{name}" for name in OF_NET), "GLOBAL"]
        assert fv.captures(compiled, X).fun == "<Net object>"
        # Reachable by both: the shorter name comes first.
        both = fv.captures(lambda x: compiled(x) + net.bias, X)
        assert set(by_name(both)["net.bias"].names) == {"net.bias", "compiled.bias"}
    elif how == "function":
        compiled = compile_(lambda x: net.bias * x)
        assert names(compiled) == ["net.bias"]
        assert names(lambda x: compiled(x)) == ["net.bias"]
    else:
        compiled = compile_(net.forward)
        assert names(compiled) == [*(f"self.{name}" for name in OF_NET), "GLOBAL"]
    assert graphs == []  # it was run, not compiled


def test_containers_of_modules_and_parameters() -> None:
    class Zoo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.Sequential(nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3)])[0])
            self.named = nn.ModuleDict({"up": nn.Linear(3, 3, bias=False), "0": nn.Identity()})
            self.named["0"].w = param(3)
            self.plist = nn.ParameterList([param(3)])
            self.pdict = nn.ParameterDict({"gain": param(3), "1": param(3)})
            self.register_parameter("log_scale", param(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.named["up"](self.steps(x)) * self.named["0"].w
            return x * self.plist[0] * self.pdict["gain"] * self.pdict["1"] * self.log_scale

    net = Zoo()
    expected = [
        "net.steps[0].weight",
        "net.steps[0].bias",
        "net.steps[1].weight",
        "net.steps[1].bias",
        "net.named['up'].weight",
        "net.named['0'].w",
        "net.plist[0]",
        "net.pdict['gain']",
        "net.pdict['1']",
        "net.log_scale",
    ]
    assert names(lambda x: net(x)) == expected
    for name, value in zip(expected, fv.captures(lambda x: net(x), X).values, strict=True):
        evaluated = eval(name, {"net": net})  # noqa: S307 (the name is the Python for the value)
        assert value.shape == tuple(evaluated.shape)
    tensors = {id(eval(name, {"net": net})) for name in expected}  # noqa: S307
    assert tensors == {id(p) for p in net.parameters()}


def test_parametrized_modules() -> None:
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    assert names(lambda x: linear(x)) == [
        "linear.parametrizations['weight'].original1",
        "linear.parametrizations['weight'].original0",
        "linear.bias",
    ]


def test_tied_weights_list_their_names() -> None:
    net = nn.ModuleDict({"encoder": nn.Linear(3, 3, bias=False), "decoder": nn.Linear(3, 3)})
    net["decoder"].weight = net["encoder"].weight
    tied, bias = fv.captures(lambda x: net["decoder"](net["encoder"](x)), X).values
    assert tied.names == ("net['encoder'].weight", "net['decoder'].weight")
    assert tied.reads == 2
    assert bias.names == ("net['decoder'].bias",)
    w = fresh(3)
    alias = [w]
    (value,) = fv.captures(lambda x: w * x + alias[0], X).values
    assert (value.names, value.reads) == (("w", "alias[0]"), 2)


def test_views_and_tensors_derived_outside() -> None:
    w = fresh(3)
    row, double = w[1:], 2 * w
    found = by_name(fv.captures(lambda x: (x[1:] * row, x * double, x * w), X))
    assert set(found) == {"row", "double", "w"}
    assert {name: value.kind for name, value in found.items()} == {
        "row": "derived",
        "double": "derived",
        "w": "leaf",
    }

    hidden = iter([2 * w])  # nobody looks into an iterator
    fun = lambda x: x * next(hidden)
    (value,) = fv.captures(fun, X).values
    assert value.names == ()
    assert value.name == f"value read at {HERE}:{fun.__code__.co_firstlineno}"
    assert (value.kind, value.differentiable, value.hoisted) == ("derived", True, True)


class Slotted:
    __slots__ = ("unset", "weight")

    def __init__(self) -> None:
        self.weight = fresh(3)


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclasses.dataclass
class State:
    mean: Tensor


def test_attributes_slots_records_and_library_objects() -> None:
    slotted, pair, state = Slotted(), Pair(fresh(3), fresh(3)), State(fresh(3))
    normal = torch.distributions.Normal(fresh(3), torch.ones(3))
    data = torch.utils.data.TensorDataset(fresh(3))

    class Own(torch.utils.data.Dataset[Tensor]):
        def __init__(self) -> None:
            self.rows = fresh(3)

    own = Own()

    def fun(x: Tensor) -> Tensor:
        return (
            x * slotted.weight * pair.right * state.mean * normal.loc * data.tensors[0] * own.rows
        )

    expected = ["slotted.weight", "pair.right", "state.mean", "normal.loc", "data.tensors[0]"]
    assert names(fun) == [*expected, "own.rows"]


def test_a_callee_in_another_module() -> None:
    report = fv.captures(lambda x: other_module.scaled(x) + GLOBAL, X)
    module, ours = report.values
    assert module.names == ("tests.torch.other_module.SCALE", "other_module.SCALE")
    assert str(module.sites[0]) == "other_module.py:10"
    assert module.sites[0].text == "return x * SCALE"
    assert ours.name == "GLOBAL"
    scaled = other_module.scaled
    assert names(lambda x: scaled(x)) == ["tests.torch.other_module.SCALE"]


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * g * ctx.saved_tensors[0] ** 2 * GLOBAL


def test_a_tensor_that_only_a_backward_body_reads() -> None:
    (value,) = fv.captures(lambda x: Cube.apply(x), X.clone().requires_grad_()).values
    assert value.name == "GLOBAL"
    assert value.paths[0] == "<lambda>.__globals__['Cube'].backward.__globals__['GLOBAL']"
    assert (value.reads, value.sites) == (0, ())  # it did not run


def test_values_of_a_captured_closure() -> None:
    w = fresh(3)
    inner = fv.Closure(lambda y: y * w, X)
    assert names(lambda x: inner(x)) == ["inner.values[0]"]


def test_no_property_runs_and_no_user_code() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = param(3)

        def named_parameters(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("asked for its parameters")

        def named_modules(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("asked for its modules")

        def __getattr__(self, name: str) -> Any:
            if not running:
                raise AssertionError(name)
            return super().__getattr__(name)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w

    running = True
    net, model, plain = Odd(), Model(), Net()
    w = net.w
    running = False
    shown = _names.names_of(lambda: (net, model, plain), [w, model.scale, plain.bias])
    assert [[n.name for n in found] for found in shown] == [
        ["net.w"],
        ["model.scale"],
        ["plain.bias"],
    ]


# Facts


def test_types_sizes_and_devices() -> None:
    z = torch.ones(2, 3, dtype=torch.complex64)
    k = torch.arange(4)
    half = torch.ones((), dtype=torch.bfloat16)
    sparse = torch.eye(3).to_sparse()
    found = by_name(fv.captures(lambda x: (x * half, z.sum(), k * 2, sparse @ x), X))
    assert (found["z"].type_text, found["z"].nbytes) == ("complex64[2,3]", 48)
    assert (found["k"].type_text, found["k"].nbytes) == ("int64[4]", 32)
    assert (found["half"].type_text, found["half"].nbytes) == ("bfloat16[]", 2)
    assert (found["sparse"].type_text, found["sparse"].nbytes) == ("float32[3,3]", 3 * 4 + 6 * 8)
    assert {value.device for value in found.values()} == {"cpu"}


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(layout: torch.layout) -> None:
    rows = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    (value,) = fv.captures(lambda _: rows * 2, X).values
    assert (value.name, value.type_text) == ("rows", "float32[2,-1]")
    assert value.nbytes >= 20
    (refused,) = fv.captures(lambda _: rows * 2, X, hoist="all").values
    assert (refused.hoisted, refused.policy) == (False, "refused: a nested tensor")
    json.dumps(dataclasses.asdict(value))


def test_subclasses_hooks_and_library_wrappers() -> None:
    class Own(Tensor):
        pass

    own = torch.ones(3).as_subclass(Own).requires_grad_()
    net = nn.Linear(3, 3)
    params = {k: v.detach().requires_grad_() for k, v in net.named_parameters()}
    optimizer = torch.optim.SGD([param(3)])
    assert names(lambda x: x @ optimizer.param_groups[0]["params"][0]) == [
        "optimizer.param_groups[0]['params'][0]"
    ]
    net.register_forward_hook(lambda module, args, out: out * own)
    assert names(lambda x: net(x)) == ["net.weight", "net.bias", "own"]
    call = functools.partial(torch.func.functional_call, net)
    assert names(lambda x: call(params, (x,))) == ["params['weight']", "params['bias']", "own"]


def test_which_are_hoisted_and_by_which_rule() -> None:
    w, plain, k = fresh(3).float(), torch.ones(3), torch.arange(3)

    def fun(x: Tensor) -> Tensor:
        return x * w * plain * k

    def captured_value(hoist: Any) -> dict[str, tuple[bool, bool, str]]:
        found = by_name(fv.captures(fun, X, hoist=hoist))
        return {n: (v.hoisted, v.differentiable, v.policy) for n, v in found.items()}

    left = (False, False, "")
    assert captured_value("differentiable") == {
        "w": (True, True, "differentiable"),
        "plain": left,
        "k": left,
    }
    assert captured_value("floating") == {
        "w": (True, True, "floating"),
        "plain": (True, True, "floating"),
        "k": left,
    }
    assert captured_value("all") == {
        "w": (True, True, "all"),
        "plain": (True, True, "all"),
        "k": (True, False, "all"),
    }

    def only_plain(t: Tensor) -> bool:
        return t is plain

    assert captured_value(only_plain) == {
        "w": (False, True, "constant: declared by hoist"),
        "plain": (True, True, only_plain.__name__),
        "k": left,
    }
    assert "kept  constant: declared by hoist" in str(fv.captures(fun, X, hoist=only_plain))


def test_the_report_lists_what_the_conversion_hoists() -> None:
    net = Net()
    for hoist in ("differentiable", "floating", "all"):
        _, hoisted = fv.closure_convert(net, X, hoist=hoist)  # type: ignore[arg-type]
        reported = [v for v in fv.captures(net, X, hoist=hoist).values if v.hoisted]  # type: ignore[arg-type]
        assert [v.shape for v in reported] == [tuple(t.shape) for t in hoisted]


def facts_in(transform: Any, w: Any) -> CapturedValue:
    """The one captured value of `lambda x: x * w` while `transform` handles `w`."""
    found: list[CapturedValue] = []

    def run(w: Tensor) -> Tensor:
        found.append(fv.captures(lambda x: x * w, torch.ones(())).values[0])
        return (w * 1.0).sum()

    transform(run)(w)
    return found[-1]


f = torch.func


def jvp(run: Any) -> Any:
    return lambda w: f.jvp(run, (w,), (w,))


def dual(run: Any) -> Any:
    def call(w: Tensor) -> None:
        with forward_ad.dual_level():
            run(forward_ad.make_dual(w, w))

    return call


ONE, THREE = torch.ones(()), torch.ones(3)


@pytest.mark.parametrize(
    ("transform", "value", "traced_by", "flows"),
    [
        (f.grad, ONE, ("grad",), True),
        (f.vmap, THREE, ("vmap",), True),
        (jvp, ONE, ("jvp",), True),
        (dual, ONE, ("jvp",), True),
        (lambda run: f.vmap(f.grad(run)), THREE, ("vmap", "grad"), True),
        (lambda run: f.grad(lambda w: f.vmap(run)(w).sum()), THREE, ("grad", "vmap"), True),
        (f.hessian, ONE, ("jvp", "grad"), True),
        (lambda run: f.grad(f.grad(run)), ONE, ("grad", "grad"), True),
        (lambda run: run, ONE.clone().requires_grad_(), ("autograd",), True),
        (f.grad, ONE.clone().requires_grad_(), ("autograd", "grad"), True),
        (f.vmap, torch.arange(3), ("vmap",), False),
        (lambda run: run, ONE, (), False),
    ],
)
def test_transforms(transform: Any, value: Tensor, traced_by: Any, flows: bool) -> None:  # noqa: FBT001
    found = facts_in(transform, value)
    assert found.name == "w"
    assert found.differentiable is flows
    assert found.kind == "leaf"
    assert found.shape == ()
    assert found.hoisted is bool(traced_by)
    assert found.traced_by == traced_by


def test_derived_tensors_and_their_source() -> None:
    found: list[CaptureReport] = []

    def loss(w: Tensor) -> Tensor:
        twice = 2 * w
        found.append(fv.captures(lambda x: x * twice + w, ONE))
        return twice.sum()

    for transform in (f.grad, lambda loss: loss):
        transform(loss)(ONE.clone().requires_grad_())
        values = by_name(found.pop())
        assert (values["twice"].kind, values["w"].kind) == ("derived", "leaf")


def test_what_a_derivative_was_stopped_at_takes_none() -> None:
    found: list[CaptureReport] = []

    def loss(w: Tensor) -> Tensor:
        stopped = w.detach()
        found.append(fv.captures(lambda x: x * stopped + w, ONE))
        return w.sum()

    for transform in (f.grad, jvp, lambda loss: loss):
        transform(loss)(ONE.clone().requires_grad_(transform not in (f.grad, jvp)))
        values = by_name(found.pop())
        assert (values["w"].differentiable, values["stopped"].differentiable) == (True, False)


# Reads


def reads_of(fun: Any, *args: Any) -> dict[str, tuple[int, list[int]]]:
    """Name to (number of reads, lines, counted from the line that defines `fun`)."""
    start = fun.__code__.co_firstlineno
    values = fv.captures(fun, *args).values
    return {v.name: (v.reads, [site.line - start for site in v.sites]) for v in values}


def test_reads_and_their_lines() -> None:
    w, c, k = fresh(3), fresh(3), fresh(3)

    def fun(x: Tensor) -> Any:
        y = x * w
        y = y + w * w
        for _ in range(3):
            y = torch.addcmul(
                y,
                c,
                c,
            )
        y = f.grad(lambda z: (z * w).sum())(y)
        return y, k

    found = reads_of(fun, X.double())
    assert found["w"] == (3, [1, 2, 9])  # two reads by one operation are one
    assert found["c"] == (3, [4])
    assert found["k"] == (0, [])  # returned, and read by no operation


def test_metadata_is_no_read() -> None:
    w, v = fresh(3), fresh(3)

    def fun(x: Tensor) -> Tensor:
        return x * v.shape[0] * w if w.requires_grad and w.dtype == v.dtype else x

    assert reads_of(fun, X) == {"w": (1, [1])}


def test_transforms_and_custom_functions_read_what_they_are_given() -> None:
    w = fresh(3)

    def fun(x: Tensor) -> Any:
        y = f.grad(lambda z: (z**2).sum())(w)
        return Cube.apply(w) + y

    (value,) = (v for v in fv.captures(fun, X).values if v.name == "w")
    start = fun.__code__.co_firstlineno
    of_forward = Cube.forward.__code__.co_firstlineno + 3  # which is handed `w` itself
    assert [site.line for site in value.sites] == [start + 1, start + 2, of_forward]
    assert value.reads == 3


def test_text_of_the_lines() -> None:
    (value,) = fv.captures(lambda x: x * GLOBAL, X).values
    assert [site.text for site in value.sites] == [
        "(value,) = fv.captures(lambda x: x * GLOBAL, X).values"
    ]
    assert value.captured_by == f"<lambda> at {HERE}:{value.sites[0].line}"


# What a conversion refuses


def test_a_read_below_the_python_api_is_listed_with_the_reason() -> None:
    module = scripted(nn.Linear(3, 3))
    tensors = {"weight": module.weight, "bias": module.bias}

    def fun(x: Tensor) -> Tensor:
        return module(x) * GLOBAL * len(tensors)

    with pytest.raises(CaptureError, match="below it"):
        fv.closure_convert(fun, X)
    report = fv.captures(fun, X)
    found = by_name(report)
    assert list(found) == ["tensors['weight']", "tensors['bias']", "GLOBAL"]
    weight = found["tensors['weight']"]
    assert (weight.hoisted, weight.policy) == (
        False,
        "refused: read below PyTorch's Python API",
    )
    assert [site.line for site in weight.sites] == [fun.__code__.co_firstlineno + 1]
    assert found["GLOBAL"].hoisted
    assert "kept  refused: read below" in str(report)


@pytest.mark.parametrize(
    "write", [lambda w: w.data.add_(1), lambda w: w.sum().backward()], ids=["write", "backward"]
)
def test_what_would_change_a_captured_tensor_is_refused(write: Callable[[Tensor], Any]) -> None:
    w = fresh(3)
    before = w.detach().clone()

    def fun(x: Tensor) -> Tensor:
        write(w)
        return x * w

    with pytest.raises(CaptureError):
        fv.captures(fun, X)
    assert torch.equal(w, before)
    assert w.grad is None


def test_randomness_is_left_as_it_was() -> None:
    state = torch.get_rng_state()
    assert names(lambda x: torch.randn(3) * GLOBAL) == ["GLOBAL"]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(CaptureError, match="rng='error'"):
        fv.captures(lambda x: torch.randn(3) * GLOBAL, X, rng="error")


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="needs a callable, got int: 3"):
        fv.captures(3, X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hoist: expected"):
        fv.captures(lambda x: x, X, hoist="some")  # type: ignore[arg-type]
    assert fv.captures(lambda x: x, X).values == ()
    assert str(fv.captures(lambda x: x, X)).endswith("captures nothing")


# Errors


def test_errors_name_the_tensor_its_path_and_its_first_read() -> None:
    net = Net()

    def loss(x: Tensor) -> Tensor:
        return net(x).sum()

    line = loss.__code__.co_firstlineno
    converted, hoisted = fv.closure_convert(loss, X)
    with pytest.raises(StructureError) as caught:
        converted(X, torch.ones(4), *hoisted[1:])
    message = str(caught.value)
    assert message.startswith(
        "hoisted value 0 expected like net.layers[0].weight (float32[3,3] at "
        "loss.__closure__['net'].layers[0].weight, captured by loss at "
        f"{HERE}:{line}, first read at {HERE}:"
    )
    assert message.endswith("'x = layer(x)'), got float32[4].")

    def writes(x: Tensor) -> Tensor:
        net.layers[0].weight.data.zero_()
        return x

    line = writes.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError) as refused:
        fv.closure_convert(writes, X)
    assert (
        "net.layers[0].weight (float32[3,3] at writes.__closure__['net'].layers[0].weight, "
        f"captured by writes at {HERE}:{line - 1}, first read at {HERE}:{line}: "
        "'net.layers[0].weight.data.zero_()')"
    ) in str(refused.value)


# Closures


def test_a_closure_reports_its_own_values() -> None:
    params = {"w": torch.ones(3), "k": torch.arange(3)}
    closure = fv.Closure(lambda x: x * params["w"] * params["k"] + GLOBAL, X)
    found = by_name(closure.captures)
    assert {n: (v.hoisted, v.policy, v.kind) for n, v in found.items()} == {
        "params['w']": (True, "floating", "leaf"),
        "params['k']": (False, "", "leaf"),
        "GLOBAL": (True, "floating", "leaf"),
    }
    assert fv.captures(closure, X) == closure.captures
    line = found["GLOBAL"].sites[0].line
    params["w"] = torch.zeros(2, 3)  # what was captured stays, and has no name any more
    first, second = (v for v in closure.captures.values if v.hoisted)
    assert (first.names, first.type_text) == ((), "float32[3]")
    assert first.name == f"value read at {HERE}:{line}"
    assert second.name == "GLOBAL"


def test_a_closure_from_a_transform_has_the_names_and_its_own_types() -> None:
    w = torch.ones(3)
    closure = fv.Closure(lambda x: (x * w).sum(), X)
    (value,) = torch.utils._pytree.tree_map(lambda t: t[:2].double(), closure).captures.values
    assert (value.name, value.type_text, value.reads) == ("w", "float64[2]", 1)
    (value,) = f.grad(lambda c: c(X))(closure).captures.values
    assert (value.name, value.type_text, value.traced_by) == ("w", "float32[3]", ())
    found: list[CapturedValue] = []

    def inside(c: fv.Closure) -> Tensor:
        found.extend(c.captures.values)
        return c(X)

    f.grad(inside)(closure)
    assert (found[0].name, found[0].traced_by) == ("w", ("grad",))


def test_a_closure_outlives_its_transform() -> None:
    kept = []

    def loss(w: Tensor) -> Tensor:
        kept.append(fv.Closure(lambda x: x * w, ONE))
        return w * 1

    f.grad(loss)(ONE)
    (value,) = kept[0].captures.values
    assert value.name == "w"


def test_a_closure_whose_function_fails_now_reports_what_it_noted() -> None:
    fail = False

    def fun(x: Tensor) -> Tensor:
        if fail:
            raise ValueError
        return x * GLOBAL * GLOBAL

    closure = fv.Closure(fun, X)
    fail = True
    (value,) = closure.captures.values
    assert value.name == "GLOBAL"
    assert [site.line for site in value.sites] == [fun.__code__.co_firstlineno + 3]


def test_a_closure_from_a_module() -> None:
    net = Net()
    report = fv.Closure.from_module(net).captures
    expected = [f"self.{n}" for n in ("bias", *OF_NET[:4])]
    assert [v.name for v in report.values] == expected
    assert {(v.hoisted, v.policy, v.reads, v.sites) for v in report.values} == {
        (True, "parameters", 0, ())
    }


# How it looks


def objective(x: Tensor, data: Tensor = THREE) -> Tensor:
    return (x * GLOBAL * data).sum() + LAM


def test_text() -> None:
    start = objective.__code__.co_firstlineno
    summary, table = str(fv.captures(objective, X)).split("\n\n")
    assert " ".join(summary.split()) == (
        f"objective ({HERE}:{start}) captures 3 values, 28 B: 2 hoisted, 2 differentiable, "
        "1 concrete, on cpu"
    )
    read = f"    read  {HERE}:{start + 1}  return (x * GLOBAL * data).sum() + LAM\n"
    assert table + "\n" == (
        "name                      type        size  kind            grad  hoisted         reads\n"
        "GLOBAL                    float32[3]  12 B  leaf, autograd  yes   differentiable      1\n"
        "    path  objective.__globals__['GLOBAL']\n"
        f"{read}"
        "objective.<default data>  float32[3]  12 B  leaf, concrete  no    no                  1\n"
        "    path  objective.__defaults__['data']\n"
        f"{read}"
        "LAM                       float32[]    4 B  leaf, autograd  yes   differentiable      1\n"
        "    path  objective.__globals__['LAM']\n"
        f"{read}"
    )


def test_html(tmp_path: Path) -> None:
    report = fv.captures(objective, X)
    report.save(tmp_path / "closure.html")
    for html in (report._repr_html_(), (tmp_path / "closure.html").read_text()):
        marked = re.findall(r"<mark[^>]*>(.*?)</mark>", html)
        assert [re.sub("<[^>]*>", "", mark) for mark in marked] == ["GLOBAL", "data", "LAM"]
        assert 'title="GLOBAL: float32[3]"' in html
        assert "autograd" in html
        assert "differentiable" in html
        assert "<script" not in html


def test_the_report_is_plain_data() -> None:
    report = fv.captures(objective, X)
    assert json.loads(json.dumps(report.to_dict()))["count"] == 3
    for value in report.values:
        assert all(
            isinstance(part, str | int | bool | tuple | type(None))
            for part in dataclasses.asdict(value).values()
        )


def test_large_constants_give_no_warning_for_nothing_is_compiled() -> None:
    big = torch.ones(512, 1024)
    report = fv.captures(lambda x: (x.sum() * big).sum(), X)
    assert report.nbytes == 2 << 20
    assert report.warnings == ()


# Manners


def test_names_cost_nothing_until_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("named")

    for part in ("name_values", "ReachableLeaves", "read_site"):
        monkeypatch.setattr(_names, part, asked)
    net = Net()
    closure = fv.Closure(lambda x: net(x), X)
    converted, hoisted = fv.closure_convert(lambda x: net(x), X)
    converted(X, *hoisted).sum().backward()
    with torch.no_grad():
        closure(X)
    with pytest.raises(AssertionError, match="named"):
        _ = closure.captures


def test_nothing_is_kept() -> None:
    def one() -> tuple[CaptureReport, CaptureReport, list[weakref.ref[Any]]]:
        w, x = fresh(1000), fresh(1000)

        def fun(x: Tensor) -> Tensor:
            return x * w

        closure = fv.Closure(fun, x)
        refs = [weakref.ref(o) for o in (w, x, fun, closure)]
        return fv.captures(fun, x), closure.captures, refs

    gc.disable()
    try:
        report, of_closure, refs = one()
        assert [ref() for ref in refs] == [None] * 4
        assert report.values[0].nbytes == of_closure.values[0].nbytes == 8000
    finally:
        gc.enable()


def test_it_leaves_no_mode_and_changes_nothing() -> None:
    net = Net()
    state = {name: t.detach().clone() for name, t in net.state_dict().items()}
    depths = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    autocast = torch.is_autocast_cache_enabled()
    report = fv.captures(net, X)
    str(report)
    report._repr_html_()
    with pytest.raises(ZeroDivisionError):
        fv.captures(lambda x: net(x) / (1 // 0), X)
    assert (
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    ) == depths
    assert _modes.active() == []
    assert torch.is_autocast_cache_enabled() is autocast
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    assert not any(p._backward_hooks for p in net.parameters())
    assert not any((m._forward_hooks or m._forward_pre_hooks) for m in net.modules())


def test_inside_a_converted_call() -> None:
    """The report of a function that runs within another converted call tells of what that gives."""
    w = torch.ones(3)
    found: list[CapturedValue] = []

    def outer(x: Tensor) -> Tensor:
        found[:] = fv.captures(lambda x: x * w, torch.ones(3)).values
        return x * w

    converted, hoisted = fv.closure_convert(outer, X, hoist="all")
    assert [(v.name, v.hoisted) for v in found] == [("w", False)]
    converted(X, hoisted[0].requires_grad_())
    assert [(v.name, v.hoisted, v.differentiable) for v in found] == [("w", True, True)]


def test_a_thousand_tensors_are_all_named() -> None:
    tree = {f"layer{i}": [param() for _ in range(10)] for i in range(100)}

    def fun(x: Tensor) -> Tensor:
        for layer in tree.values():
            for w in layer:
                x = x * w
        return x

    report = fv.captures(fun, ONE)
    assert report.count == 1000
    assert report.values[-1].name == "tree['layer99'][9]"
    assert all(value.names for value in report.values)
