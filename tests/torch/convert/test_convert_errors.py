"""Never silent: every way to lose a derivative is refused with an error that names the value."""

import copy
import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freevars.torch import CaptureError, Closure, StructureError, closure_convert
from tests.torch import other_module
from tests.torch.explicit import fresh, same

f = torch.func
ones = torch.ones(2, dtype=torch.float64)


def scripted(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another class from release to release
        return torch.jit.script(module)


OTHERWISE = [(ones, [], {}), (ones, (), []), (ones, (0,), {}), (ones, (), {"k": 1}), ((), ones, {})]


@pytest.mark.parametrize("given", OTHERWISE)
def test_containers_that_were_empty_in_the_example(given: tuple[Any, ...]) -> None:
    w = fresh(2)
    converted, hoisted = closure_convert(lambda x, args, kwargs: w * x, ones, (), {})
    torch.testing.assert_close(converted(ones, (), {}, *hoisted), w)
    with pytest.raises(StructureError, match=r"args\[\d\].* expected .*, got "):
        converted(*given, *hoisted)


# --- a later call reads what was not hoisted


def branching() -> tuple[Any, Tensor, Tensor]:
    w, hidden = fresh(3), fresh(3)

    def fun(x: Tensor) -> Tensor:
        return x * w * hidden if x.sum() > 0 else x * w

    return fun, w, hidden


def test_a_branch_that_the_example_did_not_take() -> None:
    fun, *_ = branching()
    converted, hoisted = closure_convert(fun, -torch.ones(3, dtype=torch.float64))
    named = r"hidden \(float64\[3\] at fun.__closure__\['hidden'\], captured by fun at"
    with pytest.raises(CaptureError, match=named + r" test_convert_errors.py:\d+\)"):
        converted(torch.ones(3, dtype=torch.float64), *hoisted)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), pytest.raises(CaptureError, match="hidden"):
            converted(torch.ones(3, dtype=torch.float64), *hoisted)
    with pytest.raises(CaptureError, match="hidden"):
        f.vmap(lambda w: converted(torch.ones(3, dtype=torch.float64), w))(fresh(2, 3))


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "dual"])
def test_a_branch_inside_a_transform(transform: str) -> None:
    x, w = fresh(3, grad=False), fresh(3, grad=False)

    def run(hidden: Tensor) -> Tensor:
        take = False
        fun: Callable[[Tensor], Tensor] = lambda x: x * w * hidden if take else x * w
        converted, hoisted = closure_convert(fun, x)
        assert hoisted == []
        take = True
        return converted(x).sum()

    def dual(run: Any) -> None:
        with torch.autograd.forward_ad.dual_level():
            run(torch.autograd.forward_ad.make_dual(w, x))

    apply: dict[str, Any] = {
        "grad": lambda run: f.grad(run)(w),
        "jvp": lambda run: f.jvp(run, (w,), (w,)),
        "vmap": lambda run: f.vmap(run)(torch.stack([w, w])),
        "dual": dual,
    }
    with pytest.raises(CaptureError, match="hidden"):
        apply[transform](run)


class Table:
    """Holds a tensor on the class itself."""

    held: Tensor

    def get(self) -> Tensor:
        return self.held


FAR: dict[str, Callable[[Tensor], Tensor]] = {
    "class": lambda x: x * Table.held,
    "class of an instance": lambda x: x * TABLE.held,
    "method": lambda x: x * TABLE.get(),
    "module": lambda x: x * other_module.SCALE,
    "callee in a module": lambda x: other_module.scaled(x),
    "set": lambda x: x * next(iter(HELD)),
}
TABLE = Table()
HELD: set[Tensor] = set()


@pytest.mark.parametrize("transform", ["jvp", "vmap", "dual", "no_grad", "grad"])
@pytest.mark.parametrize("where", FAR)
def test_a_branch_that_reads_far_away(
    where: str, transform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a tape, only a look at what the function can reach tells."""
    w, x = fresh(3, grad=False), fresh(3, grad=False)

    def run(hidden: Tensor) -> Tensor:
        monkeypatch.setattr(Table, "held", hidden, raising=False)
        monkeypatch.setattr(other_module, "SCALE", hidden)
        monkeypatch.setitem(globals(), "HELD", {hidden})
        take, far = False, FAR[where]
        converted, hoisted = closure_convert(lambda x: far(x) if take else x * 2, x)
        assert hoisted == []
        take = True
        return converted(x).sum()

    def dual(run: Any) -> None:
        with torch.autograd.forward_ad.dual_level():
            run(torch.autograd.forward_ad.make_dual(w, x))

    apply: dict[str, Any] = {
        "grad": lambda run: f.grad(run)(w),
        "jvp": lambda run: f.jvp(run, (w,), (w,)),
        "vmap": lambda run: f.vmap(run)(torch.stack([w, w])),
        "dual": dual,
        "no_grad": lambda run: torch.no_grad()(run)(fresh(3)),
    }
    with pytest.raises(CaptureError, match=r"not hoisted: .*(held|SCALE|HELD)"):
        apply[transform](run)


def test_a_branch_that_reads_a_derived_tensor() -> None:
    w = fresh(3)
    derived = {"v": 2 * w}

    def fun(x: Tensor) -> Tensor:
        return x * derived["v"] if x.sum() > 0 else x * 2

    converted, hoisted = closure_convert(fun, -torch.ones(3, dtype=torch.float64))
    assert hoisted == []
    with pytest.raises(CaptureError, match="not hoisted"):
        converted(torch.ones(3, dtype=torch.float64))


# --- writes


def writers() -> dict[str, Callable[[Tensor, Tensor], Any]]:
    def data(x: Tensor, w: Tensor) -> None:
        w.data.add_(x)

    def item(x: Tensor, w: Tensor) -> None:
        with torch.no_grad():
            w[0] = x[0]

    def augmented(x: Tensor, w: Tensor) -> None:
        with torch.no_grad():
            w += x

    def out(x: Tensor, w: Tensor) -> None:
        with torch.no_grad():
            torch.add(x, x, out=w)

    def view(x: Tensor, w: Tensor) -> None:
        w.detach()[1:].mul_(2)

    def foreach(x: Tensor, w: Tensor) -> None:
        with torch.no_grad():
            torch._foreach_add_([w], [x])

    def argument(x: Tensor, w: Tensor) -> None:
        x.mul_(2)

    def optimizer(x: Tensor, w: Tensor) -> None:
        w.grad = x
        torch.optim.SGD([w], lr=0.1).step()

    return {g.__name__: g for g in (data, item, augmented, out, view, foreach, argument, optimizer)}


@pytest.mark.parametrize("name", writers())
def test_writing_in_place_is_refused_before_the_write(name: str) -> None:
    write = writers()[name]
    w, x = fresh(3), fresh(3, grad=False)
    before, before_x = w.detach().clone(), x.clone()

    def fun(x: Tensor) -> Tensor:
        write(x, w)
        return x * w

    expected = "its argument" if name == "argument" else r"\bw \(float64\[3\] at "
    with pytest.raises(CaptureError, match=expected) as caught:
        closure_convert(fun, x)
    assert "Nothing was written" in str(caught.value)
    assert torch.equal(w, before)
    assert torch.equal(x, before_x)


@pytest.mark.parametrize("name", sorted(writers()))
def test_writing_in_a_later_call_is_refused_before_the_write(name: str) -> None:
    write = writers()[name]
    w, x = fresh(3), fresh(3, grad=False)
    now = False

    def fun(x: Tensor) -> Tensor:
        if now:
            write(x, w)
        return x * w

    converted, hoisted = closure_convert(fun, x)
    now = True
    before = w.detach().clone()
    with pytest.raises(CaptureError, match="in place"):
        converted(x, *hoisted)
    assert torch.equal(w, before)


@pytest.mark.parametrize("kind", ["module", "function", "instance"])
def test_running_statistics(kind: str) -> None:
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    x = fresh(5, 4, 2)
    module = nn.BatchNorm1d(4).double()
    functional = nn.functional
    fun: Any = {
        "module": module,
        "function": lambda x: functional.batch_norm(x, mean, var, training=now),
        "instance": lambda x: functional.instance_norm(x, mean, var, use_input_stats=now),
    }[kind]
    now = True
    with pytest.raises(CaptureError, match=r"running statistic|in place"):
        closure_convert(fun, x)
    assert torch.equal(mean, torch.zeros_like(mean))
    assert module.num_batches_tracked == 0
    assert torch.equal(module.running_mean, torch.zeros_like(mean))
    # A later call in train mode.
    now = False
    module.eval()
    converted, hoisted = closure_convert(fun, x)
    converted(x, *hoisted)
    now = True
    module.train()
    name = "num_batches_tracked" if kind == "module" else r"in place: mean \(float64"
    with pytest.raises(CaptureError, match=rf"{name}.*running|{name}.*running_mean=None"):
        converted(x, *hoisted)
    assert torch.equal(mean, torch.zeros_like(mean))
    assert torch.equal(module.running_mean, torch.zeros_like(mean))


def _ways_out() -> dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]]:
    """A module that updates its buffers in train mode, and what the refusal says to do."""
    return {
        "batch norm": (lambda: nn.BatchNorm1d(4), lambda m: m.eval()),
        "batch norm, of the batch": (
            lambda: nn.BatchNorm1d(4),
            lambda m: setattr(m, "track_running_stats", False),
        ),
        "instance norm": (
            lambda: nn.InstanceNorm1d(4, track_running_stats=True),
            lambda m: m.eval(),
        ),
        "spectral norm": (
            lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
            lambda m: m.eval(),
        ),
    }


@pytest.mark.parametrize("name", sorted(_ways_out()))
def test_a_module_that_updates_its_buffers_works_as_the_refusal_says(name: str) -> None:
    make, follow = _ways_out()[name]
    module = make()
    buffers = {k: t.clone() for k, t in module.named_buffers()}
    x, w = torch.randn(4, 4), torch.ones(4, requires_grad=True)
    with pytest.raises(
        CaptureError, match=r"got .* in place.*module\.[\w.\[\]']+ \(.*module\.eval\(\)"
    ):
        closure_convert(lambda x: module(x * w), x)
    follow(module)
    converted, hoisted = closure_convert(lambda x: module(x * w), x)
    torch.testing.assert_close(converted(x, *hoisted), module(x * w))
    for k, t in module.named_buffers():
        assert torch.equal(t, buffers[k])


class Masked(nn.Module):
    """Reads a constant buffer, and in `late` calls writes to what is not its own."""

    mask: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(0))  # which the example does not read
        self.late: Callable[[Tensor], Any] = lambda _: None

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.late(x)
        return self.linear(x * self.mask)


@pytest.mark.parametrize("what", ["mask", "calls", "argument", "parameter"])
def test_a_module_at_its_own_parameters_that_writes_in_a_later_call(what: str) -> None:
    module, x = Masked(), fresh(2, 3, grad=False)
    converted, hoisted = closure_convert(module, x)
    assert [*map(id, hoisted)] == [*map(id, module.parameters())]
    expected = torch.autograd.grad(module(x).sum(), hoisted)
    same(torch.autograd.grad(converted(x, *hoisted).sum(), hoisted), expected)
    module.late = {
        "mask": lambda _: module.mask.mul_(2),
        "calls": lambda _: module.calls.add_(1),
        "argument": lambda x: x.mul_(2),
        "parameter": lambda _: module.linear.weight.mul_(2),
    }[what]
    with pytest.raises(CaptureError, match=r"has written in place to .*Write to a clone"):
        converted(x, *hoisted)


class Centred(nn.Module):
    """Subtracts a mean that it updates in train mode, by a way that counts no version."""

    mean: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("var", torch.ones(3, dtype=torch.float64))
        self.way, self.updates = way, False

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "batch norm":
            x = nn.functional.batch_norm(x, self.mean, self.var, training=self.updates)
        elif self.training:
            self.mean.data.lerp_(x.mean(0), 0.1)
        return self.linear(x - self.mean)


@pytest.mark.parametrize("way", ["batch norm", "data"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_write_without_a_version_is_refused_before_it_is_done(way: str, copied: bool) -> None:  # noqa: FBT001
    module, x = Centred(way).eval(), fresh(4, 3, grad=False)
    converted, hoisted = closure_convert(module, x)
    same(converted(x, *hoisted), module(x))
    module.train(way == "data")
    module.updates = True
    if copied:
        converted = copy.deepcopy(converted)
        module = converted.__wrapped__
    with pytest.raises(CaptureError, match=r"in place to.*module\.eval\(\)|in place: .*mean"):
        converted(x, *converted.hoisted)
    assert torch.equal(module.mean, torch.zeros_like(module.mean))


def test_a_module_with_a_batch_norm_is_watched_at_its_own_parameters() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    x = torch.randn(4, 3)
    converted, hoisted = closure_convert(module, x)
    torch.testing.assert_close(converted(x, *hoisted), module(x))
    module.train()
    for call in (lambda: converted(x, *hoisted), lambda: Closure.from_module(module)(x)):
        with pytest.raises(CaptureError, match=r"running statistics"):
            call()
    assert torch.equal(module[1].running_mean, torch.zeros(3))


def test_statistics_of_its_own_are_no_capture() -> None:
    w, x = fresh(4), fresh(5, 4)

    def fun(x: Tensor) -> Tensor:
        mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        return nn.functional.batch_norm(x * w, mean, var, training=True) + mean

    converted, hoisted = closure_convert(fun, x)
    same(converted(x, *hoisted), fun(x))


def test_making_a_captured_tensor_differentiable() -> None:
    w = fresh(3, grad=False)
    with pytest.raises(CaptureError, match=r"requires_grad_.*w \(float64"):
        closure_convert(lambda x: x * w.requires_grad_(), fresh(3))
    assert not w.requires_grad


def constant_writers() -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """Writes to a captured constant `c`, by every kind of call."""

    def grad(x: Tensor, c: Tensor) -> None:
        assert c.grad is not None
        c.grad.zero_()

    return {
        "method": lambda x, c: c.add_(x),
        "item": lambda x, c: c.__setitem__(0, x[0]),
        "view": lambda x, c: c[1:].mul_(2),
        "detached": lambda x, c: c.detach().mul_(2),
        "inplace=": lambda x, c: nn.functional.relu(c, inplace=True),
        "out=": lambda x, c: torch.add(x, x, out=c),
        "overload": lambda x, c: torch.ops.aten.add_.Tensor(c, x),
        "packet": lambda x, c: torch.ops.aten.add_(c, x),
        "custom operator": lambda x, c: _add_to(c, x),
        "embedding": lambda x, c: nn.functional.embedding(
            torch.tensor(0), c[:, None], max_norm=0.1
        ),
        "data": lambda x, c: type(c).data.__set__(c, x),  # type: ignore[attr-defined]
        "shape": lambda x, c: c.unsqueeze_(0),
        "grad": grad,
        "new grad": lambda x, c: type(c).grad.__set__(c, None),  # type: ignore[attr-defined]
        "requires_grad_": lambda x, c: c.requires_grad_(),
    }


@torch.library.custom_op("freevars_tests::add_to", mutates_args={"a"})
def _add_to(a: Tensor, b: Tensor) -> None:
    a.add_(b)


@pytest.mark.parametrize("read_before", [True, False])
@pytest.mark.parametrize(
    "name",
    # What only reads an attribute's descriptor is looked for in all that the process has loaded.
    [
        pytest.param(n, marks=pytest.mark.slow if n == "grad" else ())
        for n in sorted(constant_writers())
    ],
)
def test_writing_to_a_constant_in_a_later_call(name: str, read_before: bool) -> None:  # noqa: FBT001
    write = constant_writers()[name]
    w, c, x = fresh(3), fresh(3, grad=False), fresh(3, grad=False)
    c.grad = torch.ones_like(c)
    now = False

    def fun(x: Tensor) -> Tensor:
        if now:
            with torch.no_grad():
                write(x, c)
        return x * w + c if read_before else x * w

    converted, hoisted = closure_convert(fun, x)
    assert len(hoisted) == 1
    now = True
    before = c.clone()
    for context in (torch.enable_grad, torch.no_grad):
        with context(), pytest.raises(CaptureError, match="Nothing was written"):
            converted(x, *hoisted)
    with pytest.raises(CaptureError, match="Nothing was written"):
        closure_convert(fun, x)
    assert torch.equal(c, before)
    assert torch.equal(c.grad, torch.ones_like(c))
    assert not c.requires_grad


def test_writing_to_its_own_is_no_write_to_a_constant() -> None:
    """Also where the function keeps what it made, and memory of freed constants is used again."""
    w, x, kept = fresh(3), fresh(3, grad=False), []

    def fun(x: Tensor) -> Tensor:
        y = (x * w).relu_()
        kept.append(y)
        z = torch.zeros(3, dtype=torch.float64)
        z[0] = 1.0
        return y.add_(z) + nn.functional.relu(x * 2, inplace=True)

    converted, hoisted = closure_convert(fun, x)
    for _ in range(3):
        same(converted(x, *hoisted), fun(x))


def test_changing_a_captured_tensor_itself() -> None:
    x = fresh(3, grad=False)
    changes: list[Callable[[Tensor], Any]] = [
        lambda w: w.requires_grad_(False),
        lambda w: type(w).requires_grad.__set__(w, False),  # type: ignore[attr-defined]
        lambda w: type(w).grad.__set__(w, x),  # type: ignore[attr-defined]
        lambda w: type(w).data.__set__(w, x),  # type: ignore[attr-defined]
        lambda w: w.register_hook(lambda g: g * 3),
        lambda w: w.register_post_accumulate_grad_hook(lambda _: None),
    ]
    for change in changes:
        w = fresh(3)
        before, now = w.detach().clone(), True

        def fun(x: Tensor, change: Any = change, w: Tensor = w) -> Tensor:
            if now:
                change(w)
            return x * w

        with pytest.raises(CaptureError, match="Nothing was written"):
            closure_convert(fun, x)
        now = False
        converted, hoisted = closure_convert(fun, x)
        now = True
        with pytest.raises(CaptureError, match="Nothing was written"):
            converted(x, *hoisted)
        assert w.requires_grad
        assert w.grad is None
        assert not w._backward_hooks
        assert torch.equal(w, before)


def test_the_given_value_does_not_become_a_leaf() -> None:
    w, x = fresh(3), fresh(3, grad=False)
    converted, hoisted = closure_convert(lambda x: x * w.requires_grad_(), x)  # changes nothing
    same(converted(x, *hoisted), x * w)
    other = fresh(3, grad=False)
    with pytest.raises(CaptureError, match="requires_grad_"):
        converted(x, other)
    assert not other.requires_grad


def test_a_lazy_module() -> None:
    net = nn.LazyLinear(3)
    converted, hoisted = closure_convert(net, torch.ones(2, 4))
    assert torch.equal(converted(torch.ones(2, 4), *hoisted), net(torch.ones(2, 4)))
    assert len(hoisted) == 2


# --- reads that cannot be replaced


def test_an_inner_derivative_whose_path_runs_outside() -> None:
    """Hoisted, the two are independent: the inner derivative would have another value."""
    w, x = fresh(3), fresh(3, grad=False)
    v = 2 * w
    inner = torch.autograd.grad

    def fun(x: Tensor) -> Any:
        return inner((v * w * x).sum(), [w, v], create_graph=True)

    with pytest.raises(CaptureError, match=r"derivative with respect to w .*got v .*computed"):
        closure_convert(fun, x)
    with pytest.raises(CaptureError, match=r"derivative with respect to w .*got v .*computed"):
        closure_convert(lambda x: x * inner((v**2).sum(), inputs=w, create_graph=True)[0], x)
    u = fresh(3)
    independent: list[Any] = [
        lambda x: inner((v * u * x).sum(), [u, v], create_graph=True),
        lambda x: inner((v.detach() * w * x).sum(), w, create_graph=True),
        lambda x: inner(((2 * w) ** 2 * w * x).sum(), w, create_graph=True),
    ]
    for g in independent:
        converted, hoisted = closure_convert(g, x)
        same(converted(x, *hoisted), g(x))


def test_a_pullback_from_outside() -> None:
    """It is a path from one captured tensor to another."""
    w, x = fresh(3), fresh(3, grad=False)
    _, pullback = f.vjp(lambda z: (z * w).sin(), x)
    with pytest.raises(CaptureError, match=r"call torch\.func\.vjp inside"):
        closure_convert(lambda x: pullback(x)[0], x)
    inside = lambda x: f.vjp(lambda z: (z * w).sin(), x)[1](x)[0]
    converted, hoisted = closure_convert(inside, x)
    same(converted(x, *hoisted), pullback(x)[0])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(layout: torch.layout) -> None:
    nested, w, x = torch.nested, fresh(3), fresh(3, grad=False)

    def total(rows: Tensor) -> Tensor:
        return nested.to_padded_tensor(rows, 0.0).sum()

    def make(x: Tensor) -> Tensor:
        return nested.as_nested_tensor([w * x, w[:2]], layout=layout)

    rows, derived = nested.nested_tensor([[1.0, 2.0], [3.0]], layout=layout), make(x)
    leaf = nested.nested_tensor([[1.0, 2.0], [3.0]], layout=layout, requires_grad=True)
    for held in (leaf, derived):
        with pytest.raises(CaptureError, match=r"a nested tensor: held .*t\.unbind\(\)"):
            closure_convert(lambda x: total(held * 2) * x.sum(), x)
    with pytest.raises(CaptureError, match="a nested tensor: rows"):
        closure_convert(lambda x: total(rows * 2) * x.sum(), x, hoist="all")
    with pytest.raises(StructureError, match="nested tensor of 2 parts"):
        closure_convert(lambda rows: total(rows) * w.sum(), rows)
    with pytest.raises(StructureError, match="nested tensor of 2 parts"):
        closure_convert(make, x)
    # What is nested inside, and constants, are no trouble.
    fun = lambda x: total(make(x)) * total(rows * 2)
    converted, hoisted = closure_convert(fun, x)
    same(torch.autograd.grad(converted(x, *hoisted), hoisted), torch.autograd.grad(fun(x), w))
    for args in ((x, rows), (rows, w)):
        with pytest.raises(StructureError, match=r"expected .*float64\[3\].*, got a nested tensor"):
            converted(*args)


async def _product(x: Tensor, w: Tensor) -> Tensor:
    return x * w


def test_what_runs_after_the_call() -> None:
    w, x = fresh(3), fresh(3)
    later: list[Callable[[Tensor], Any]] = [
        lambda x: (x * w for _ in range(2)),
        lambda x: [map(w.mul, [x])],
    ]
    for fun in later:
        with pytest.raises(CaptureError, match=r"has run when it returns, got a (generator|map)"):
            closure_convert(fun, x)
    coroutine = _product(x, w)
    with pytest.raises(CaptureError, match="got a coroutine"):
        closure_convert(lambda x: coroutine, x)
    coroutine.close()


def test_torchscript() -> None:
    net = scripted(nn.Linear(3, 3).double())
    x = fresh(3)
    with pytest.raises(CaptureError, match="below it"):
        closure_convert(lambda x: net(x), x)
    # Also where the same tensor is read through the Python API too.
    with pytest.raises(CaptureError, match="below it"):
        closure_convert(lambda x: net(x) + net.weight.sum(), x)
    # And on a branch that only a later call takes.
    converted, _ = closure_convert(
        lambda x: net(x) if x.sum() > 0 else x, -torch.ones(3, dtype=torch.float64)
    )
    with pytest.raises(CaptureError, match="not hoisted"):
        converted(torch.ones(3, dtype=torch.float64))
    for p in net.parameters():
        p.requires_grad_(False)
    converted, hoisted = closure_convert(lambda x: net(x), x)  # constants
    same(converted(x, *hoisted), net(x))


@dataclasses.dataclass
class Result:
    value: Any


def test_returned_where_it_cannot_be_replaced() -> None:
    w, x = fresh(3), fresh(3)
    with pytest.raises(
        CaptureError, match=r"w \(float64\[3\] at .*\) inside a Result \(at self.value\['w'\]\)"
    ):
        closure_convert(lambda x: Result({"w": w}), x)
    with pytest.raises(CaptureError, match="inside a function"):
        closure_convert(lambda x: lambda: x * w, x)
    late = False
    converted, hoisted = closure_convert(lambda x: (x * w, Result(w if late else x * w)), x)
    assert isinstance(converted(x, *hoisted)[1], Result)
    late = True
    with pytest.raises(CaptureError, match="inside a Result"):
        converted(x, *hoisted)


READ_BELOW = torch.ones(3, dtype=torch.float64, requires_grad=True)
TABLE_BELOW = torch.ones(3, dtype=torch.float64)


@torch.library.custom_op("freevars_tests::scale", mutates_args=())
def _scale(x: Tensor) -> Tensor:
    return x * READ_BELOW.detach()


@torch.library.custom_op("freevars_tests::shift", mutates_args=())
def _shift(x: Tensor) -> Tensor:
    return x + TABLE_BELOW


def test_custom_operators() -> None:
    """Their functions run below every mode."""
    w, x = fresh(3), fresh(3, grad=False)
    named = r"custom operator freevars_tests.scale.*can read READ_BELOW .*as an argument"
    for call in (_scale, torch.ops.freevars_tests.scale, torch.ops.freevars_tests.scale.default):
        with pytest.raises(CaptureError, match=named):
            closure_convert(lambda x: call(x) * w, x)
    late = False
    converted, hoisted = closure_convert(lambda x: _scale(x) if late else _shift(x) * w, x)
    for _ in range(2):
        same(converted(x, *hoisted), (x + 1) * w)
    late = True
    with pytest.raises(CaptureError, match=named):
        converted(x, *hoisted)
    with pytest.raises(CaptureError, match="TABLE_BELOW"):
        closure_convert(lambda x: _shift(x) * w, x, hoist="all")


def test_higher_order_operators() -> None:
    w, x = fresh(3), fresh(3)

    def fun(x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x * w, lambda x: x - w, (x,))

    with pytest.raises(CaptureError, match=r"cond.*Use Python's own if"):
        closure_convert(fun, x)
    late = False
    converted, hoisted = closure_convert(lambda x: fun(x) if late else x * w, x)
    late = True
    with pytest.raises(CaptureError, match="cond"):
        converted(x, *hoisted)


@pytest.mark.parametrize("call", [lambda t: t.backward(), torch.autograd.backward])
def test_backward_inside(call: Any) -> None:
    w, x = fresh(3), fresh(3)

    def fun(x: Tensor) -> Tensor:
        call((x * w).sum())
        return x

    with pytest.raises(CaptureError, match=r"\.backward\(\).*torch\.autograd\.grad"):
        closure_convert(fun, x)
    assert w.grad is None
    late = False
    converted, hoisted = closure_convert(lambda x: fun(x) if late else x * w, x)
    late = True
    with pytest.raises(CaptureError, match=r"\.backward\(\)"):
        converted(x, *hoisted)
    assert w.grad is None


def test_randomness_refused() -> None:
    with pytest.raises(CaptureError, match=r"rng='error'.*test_convert_errors"):
        closure_convert(lambda x: x + torch.randn(3), torch.zeros(3), rng="error")
    with pytest.raises(CaptureError, match=r"dropout|bernoulli"):
        closure_convert(lambda x: nn.functional.dropout(x), torch.zeros(3), rng="error")


def test_a_refusal_cannot_be_swallowed() -> None:
    w, x = fresh(3), fresh(3)

    def fun(x: Tensor) -> Tensor:
        try:
            w.data.add_(1.0)
        except TypeError:
            return x
        return x

    with pytest.raises(CaptureError, match="in place"):
        closure_convert(fun, x)


def test_a_failing_function_leaves_nothing_behind() -> None:
    w, x = fresh(3), fresh(3)

    def fun(x: Tensor) -> Tensor:
        torch.randn(3)
        if x.sum() > 0:
            message = "of my own"
            raise ValueError(message)
        return x * w

    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="of my own"):
        closure_convert(fun, torch.ones(3))
    assert torch.equal(torch.get_rng_state(), state)
    converted, hoisted = closure_convert(fun, -torch.ones(3))
    for context in (torch.enable_grad, torch.no_grad):
        with context(), pytest.raises(ValueError, match="of my own"):
            converted(torch.ones(3), *hoisted)
    assert torch._C._len_torch_function_stack() == 0  # conftest looks again
    same(converted(-x.abs().float(), *hoisted), -x.abs().float() * w)


# --- calls of another structure


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ({"x": torch.zeros(4), "y": [1.0]}, "a"),
            r"args\[0\]\['x'\] expected float32\[3\], got float32\[4\]",
        ),
        (
            ({"x": torch.zeros(3).double(), "y": [1.0]}, "a"),
            r"args\[0\]\['x'\] expected float32\[3\], got float64",
        ),
        (
            ({"x": torch.zeros(3), "y": [1]}, "a"),
            r"args\[0\]\['y'\]\[0\] expected a Python float, got a Python int",
        ),
        (({"x": torch.zeros(3), "y": [1.0]}, "b"), r"args\[1\] expected 'a', got 'b'"),
        (
            ({"x": torch.zeros(3), "y": [1.0, 2.0]}, "a"),
            r"args\[0\]\['y'\]\[1\] expected nothing, got 2\.0",
        ),
        (
            ({"x": torch.zeros(3), "y": (1.0,)}, "a"),
            r"args\[0\]\['y'\] expected a list, got a tuple",
        ),
        (
            ({"x": torch.zeros(3), "z": [1.0]}, "a"),
            r"args\[0\]\['y'\] expected \[a Python float\], got nothing",
        ),
        (
            ({"x": 3.0, "y": [1.0]}, "a"),
            r"args\[0\]\['x'\] expected float32\[3\], got a Python float",
        ),
    ],
)
def test_structure(args: Any, message: str) -> None:
    w = torch.ones(3, requires_grad=True)
    converted, hoisted = closure_convert(
        lambda d, mode: d["x"] * w, {"x": torch.zeros(3), "y": [1.0]}, "a"
    )
    with pytest.raises(StructureError, match=message):
        converted(*args, *hoisted)


def test_count_and_types_of_hoisted_values() -> None:
    w = fresh(3)
    x = fresh(3)
    converted, hoisted = closure_convert(lambda x: x * w, x)
    with pytest.raises(StructureError, match="1 arguments and 1 hoisted values, got 3 values"):
        converted(x, *hoisted, *hoisted)
    named = r"w \(float64\[3\] at .*first read at .*'converted, hoisted = closure_convert.*'\)"
    with pytest.raises(
        StructureError, match=rf"hoisted value 0 expected like {named}, got float64\[4\]"
    ):
        converted(x, fresh(4))
    with pytest.raises(StructureError, match="got a Python float"):
        converted(x, 2.0)
    with pytest.raises(TypeError, match=r"args\[0\] expected float64\[3\], got float64\[2\]"):
        converted(fresh(2), *hoisted)


def test_options() -> None:
    with pytest.raises(TypeError, match="needs a callable, got int: 3"):
        closure_convert(3, fresh(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hoist: expected"):
        closure_convert(lambda x: x, fresh(3), hoist="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rng: expected"):
        closure_convert(lambda x: x, fresh(3), rng="none")  # type: ignore[arg-type]


def test_without_pytorch() -> None:
    code = "import sys; sys.modules['torch'] = None\ntry:\n import freevars.torch\nexcept ImportError as e: print(e)"  # noqa: E501
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'freevars[torch]'" in shown.stdout


# --- a call without hoisted values


class _Once(torch.autograd.Function):
    """fun(x), and no derivative but by what it is given."""

    @staticmethod
    def forward(ctx: Any, fun: Any, x: Tensor, *hoisted: Tensor) -> Tensor:
        return fun(x).detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return (None,) * len(ctx.needs_input_grad)


def test_hoisted_values_that_a_custom_function_was_not_given() -> None:
    w, x = fresh(3), fresh(3)
    converted, hoisted = closure_convert(lambda x: x * w, x)
    with pytest.raises(StructureError, match=r"1 hoisted values, got .* of _Once, .* reaches w "):
        _Once.apply(converted, x)
    # It lists them beside, as adjoints do; the derivative reaches them; or nobody asks for one.
    same(_Once.apply(converted, x, *hoisted), x * w)
    same(torch.autograd.grad(converted(x).sum(), w), torch.autograd.grad((x * w).sum(), w))
    with torch.no_grad():
        same(converted(x), x * w)
    outer, again = closure_convert(lambda x: converted(x) * 2, x)
    same(_Once.apply(lambda x: outer(x, *again), x, *again), 2 * x * w)
    checkpoint = torch.utils.checkpoint.checkpoint
    checkpoint(converted, x, use_reentrant=True).sum().backward()
    same(w.grad, x)


def test_a_hoisted_value_in_the_place_of_an_argument() -> None:
    w, x = fresh(3), fresh(3)
    converted, hoisted = closure_convert(lambda x, y: x * y * w, x, x)
    with pytest.raises(StructureError, match=r"2 arguments and 1 hoisted .* in place of an arg"):
        converted(x, *hoisted)
