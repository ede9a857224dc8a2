"""A captured tensor is known by its place: what is rebound, kept by a run, or copied."""

import copy
import functools
import io
import itertools
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor, nn

from freevars.torch import CaptureError, Closure, closure_convert, root
from freevars.torch._convert.places import Search
from tests.torch import other_module
from tests.torch.explicit import fresh, same

f = torch.func
pytree = torch.utils._pytree


class Box:
    def __init__(self, w: Tensor) -> None:
        self.w = w


class Slotted:
    __slots__ = ("__hidden",)

    def __init__(self, w: Tensor) -> None:
        self.bind(w)

    def bind(self, w: Tensor) -> None:
        self.__hidden = w

    def get(self) -> Tensor:
        return self.__hidden


GLOBAL = torch.zeros(3)


def bound_cell(w: Tensor) -> tuple[Any, Any]:
    def bind(new: Tensor) -> None:
        nonlocal w
        w = new

    return lambda x: (w * x).sum(), bind


def bound_global(w: Tensor) -> tuple[Any, Any]:
    def bind(new: Tensor) -> None:
        global GLOBAL
        GLOBAL = new

    bind(w)
    return lambda x: (GLOBAL * x).sum(), bind


def bound_attribute(w: Tensor) -> tuple[Any, Any]:
    box = Box(w)
    return lambda x: (box.w * x).sum(), functools.partial(setattr, box, "w")


def bound_entry(w: Tensor) -> tuple[Any, Any]:
    params = {"layers": [{"w": w}]}
    return lambda x: (params["layers"][0]["w"] * x).sum(), functools.partial(
        params["layers"][0].__setitem__, "w"
    )


def bound_item(w: Tensor) -> tuple[Any, Any]:
    params = [w]
    return lambda x: (params[0] * x).sum(), functools.partial(params.__setitem__, 0)


def bound_slot(w: Tensor) -> tuple[Any, Any]:
    box = Slotted(w)
    return lambda x: (box.get() * x).sum(), box.bind


def bound_default(w: Tensor) -> tuple[Any, Any]:
    def fun(x: Tensor, w: Tensor = w) -> Tensor:
        return (w * x).sum()

    def bind(new: Tensor) -> None:
        fun.__defaults__ = (new,)

    return fun, bind


def bound_above(w: Tensor) -> tuple[Any, Any]:
    """What is rebound is not the variable of the tensor, but one on the way to it."""
    box = Box(Box(w))  # type: ignore[arg-type]
    return lambda x: (box.w.w * x).sum(), lambda new: setattr(box, "w", Box(new))


def bound_module(w: Tensor) -> tuple[Any, Any]:
    net = nn.Module()
    net.register_buffer("w", w)
    return lambda x: (net.w * x).sum(), functools.partial(setattr, net, "w")


def bound_other_module(w: Tensor) -> tuple[Any, Any]:
    other_module.w = w  # type: ignore[attr-defined]
    return lambda x: (other_module.w * x).sum(), functools.partial(setattr, other_module, "w")  # type: ignore[attr-defined]


BOUND = [
    bound_cell,
    bound_global,
    bound_attribute,
    bound_entry,
    bound_item,
    bound_slot,
    bound_default,
    bound_above,
    bound_module,
    bound_other_module,
]


@pytest.mark.parametrize("bound", BOUND)
def test_rebinding_changes_nothing(bound: Any) -> None:
    w, x, v = fresh(3, grad=False), fresh(3, grad=False), fresh(3, grad=False)
    fun, bind = bound(w)
    c = Closure(fun, x)
    for new in (fresh(3, grad=False), fresh(3), w):
        bind(new)
        same(c.values, [w])
        same(c(x), (w * x).sum())
        same(f.grad(lambda c: c(x))(c).values, [x])
        same(pytree.tree_map(lambda t: 10 * t, c)(x), (10 * w * x).sum())
        converted, _ = closure_convert(c, x, hoist="all")
        same(converted(x, v), (v * x).sum())


def test_what_is_gone_is_refused() -> None:
    params: dict[str, Any] = {"w": fresh(3)}
    converted, hoisted = closure_convert(lambda x: (params["w"] * x).sum(), fresh(3))
    params["w"] = 2.0
    with pytest.raises(CaptureError, match=r"in the place of .*: a float. Convert again"):
        converted(fresh(3), *hoisted)
    del params["w"]
    with pytest.raises(CaptureError, match=r"in the place of .*: nothing. Convert again"):
        converted(fresh(3), *hoisted)


def test_two_variables_that_change_places() -> None:
    a, b, x = fresh(3), fresh(3), fresh(3)
    params = {"a": a, "b": b}
    converted, hoisted = closure_convert(lambda x: (params["a"] * x + params["b"]).sum(), x)
    params["a"], params["b"] = b, a
    same(converted(x, *hoisted), (a * x + b).sum())
    params["a"] = params["b"] = b  # which of the two a read of it means, nobody can tell
    with pytest.raises(CaptureError, match="which another captured tensor is bound to as well"):
        converted(x, *hoisted)


def test_one_tensor_under_two_names() -> None:
    w, x = fresh(3), fresh(3)
    params = {"a": w, "b": w}
    converted, hoisted = closure_convert(lambda x: (params["a"] * x * params["b"]).sum(), x)
    params["b"] = fresh(3, grad=False)
    same(converted(x, *hoisted), (w * x * w).sum())
    same(torch.autograd.grad(converted(x, *hoisted), hoisted), [2 * w * x])


def test_a_constant_that_is_rebound() -> None:
    w, x = fresh(3), fresh(3)
    box = Box(torch.tensor([2, 0, 1]))
    converted, hoisted = closure_convert(lambda x: (w[box.w] * x).sum(), x)
    expected = (w[box.w] * x).sum()
    box.w = torch.tensor([0, 0, 0])
    same(converted(x, *hoisted), expected)


# --- what the first run keeps


def doubled_once(a: Tensor, how: str) -> Any:
    """`a` doubled in the first call, and kept."""
    kept: Any = None

    @functools.lru_cache
    def cached() -> Tensor:
        return 2 * a

    def variable() -> Tensor:
        nonlocal kept
        if kept is None:
            kept = 2 * a
        return kept  # type: ignore[no-any-return]

    class Holder:
        kept: Any = None

        def __call__(self) -> Tensor:
            if self.kept is None:
                self.kept = 2 * a
            return self.kept  # type: ignore[no-any-return]

    return {"cache": cached, "variable": variable, "object": Holder()}[how]


DERIVATIVES: dict[str, Any] = {
    "backward": lambda g, a: torch.autograd.grad(g(a), a, create_graph=True)[0],
    "grad": lambda g, a: f.grad(g)(a.detach()),
    "jvp": lambda g, a: f.jvp(g, (a.detach(),), (torch.ones_like(a),))[1],
    "vmap": lambda g, a: f.vmap(f.grad(g))(a.detach()[None])[0],
    "grad_vmap": lambda g, a: f.grad(lambda b: f.vmap(g)(b).sum())(a.detach()[None])[0],
    "jacfwd": lambda g, a: f.jacfwd(g)(a.detach()),
}


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("how", ["cache", "variable", "object"])
@pytest.mark.parametrize("by", DERIVATIVES)
def test_what_the_first_run_keeps_out_of_sight_is_refused(by: str, how: str, filled: bool) -> None:  # noqa: FBT001
    """A first run that fills a cache leaves nothing to capture but what the cache was filled
    from, which later runs do not read."""

    @root
    def newton(fun: Any, x0: Tensor) -> Tensor:
        for _ in range(20):
            x0 = x0 - fun(x0) / f.grad(fun)(x0)
        return x0

    def found(a: Tensor) -> Tensor:
        twice = doubled_once(a, how)
        if filled:
            twice()
        return newton(lambda x: x**2 - twice(), torch.ones_like(a))

    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    if filled or how == "object":
        torch.testing.assert_close(DERIVATIVES[by](found, a).detach(), a.detach() * 0 + 0.5)
    else:
        with pytest.raises(CaptureError, match=r"keeps.* is kept before, so that it is captured"):
            DERIVATIVES[by](found, a)


class Table(nn.Module):
    """Keeps a table that its first run computes from a buffer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([1.0, 2.0], dtype=torch.float64))
        self.kind = kind
        self.table: Any = {} if kind == "entry" else None
        if kind == "missing":
            del self.table

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "entry":
            if 2 not in self.table:
                self.table[2] = torch.sin(self.frequencies)
            return (self.table[2] * x).sum()
        if getattr(self, "table", None) is None:
            angle = torch.empty(2, dtype=torch.float64)
            angle[:] = torch.sin(self.frequencies)
            self.table = (angle, angle) if self.kind == "tuple" else angle
        table = self.table[0] if self.kind == "tuple" else self.table
        return (table * x).sum()


@pytest.mark.parametrize("kind", ["attribute", "missing", "tuple", "entry"])
def test_a_table_made_in_the_first_run(kind: str) -> None:
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    net = Table(kind)
    w = net.frequencies
    c = Closure(net, x)
    same(c.values, [w])
    kept = net.table
    for _ in range(2):
        same(f.grad(lambda c: c(x))(c).values, [w.cos() * x])
        same(pytree.tree_map(lambda t: 3 * t, c)(x), ((3 * w).sin() * x).sum())
        same(copy.deepcopy(pytree.tree_map(lambda t: 3 * t, c))(x), ((3 * w).sin() * x).sum())
    assert net.table is kept  # a call leaves the module as it was


def test_a_table_and_threads() -> None:
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    c = Closure(Table("attribute"), x)
    found: dict[int, Tensor] = {}

    def run(k: int) -> None:
        for _ in range(20):
            found[k] = pytree.tree_map(lambda t: k * t, c)(x)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, got in found.items():
        same(got, ((k * c.values[0]).sin() * x).sum())


def test_a_table_under_checkpointing() -> None:
    """The recomputation runs later, when the module has its own table again."""
    x, v = fresh(2), fresh(2, grad=False)
    net = Table("attribute")
    again = functools.partial(torch.utils.checkpoint.checkpoint, net, use_reentrant=False)
    converted, _ = closure_convert(lambda x: again(x).sin(), x, hoist="all")
    (g,) = torch.autograd.grad(converted(x, v), x)
    same(g, (v.sin() * x).sum().cos() * v.sin())


# --- copies


SCALE = torch.tensor([2.0, 3.0], dtype=torch.float64)


def scaled(x: Tensor) -> Tensor:
    return (SCALE * x).sum()


def lambda_closure(x: Tensor) -> tuple[Closure, Tensor]:
    w = fresh(2, grad=False)
    return Closure(lambda x: (w * x).sum(), x), w


def _module_closure(x: Tensor) -> tuple[Closure, Tensor]:
    net = nn.Linear(2, 1, bias=False).double()
    return Closure(net, x), net.weight.detach()[0]


def _pickled(c: Any) -> Any:
    return pickle.loads(pickle.dumps(c))


def _cloudpickled(c: Any) -> Any:
    return cloudpickle.loads(cloudpickle.dumps(c))


def _saved(c: Any) -> Any:
    file = io.BytesIO()
    torch.save(c, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CLOSURES = {
    "function of a module": lambda x: (Closure(scaled, x), SCALE),
    "module": _module_closure,
    "lambda": lambda_closure,
}


@pytest.mark.parametrize("how", [_pickled, _cloudpickled, _saved, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("kind", CLOSURES)
def test_a_copy_computes_with_its_own_values(kind: str, how: Any) -> None:
    if kind == "lambda" and how in {_pickled, _saved}:
        return  # `pickle` has no lambdas
    x = torch.tensor([5.0, 7.0], dtype=torch.float64)
    c, w = CLOSURES[kind](x)
    tenfold = pytree.tree_map(lambda t: (10 * t).detach().requires_grad_(t.requires_grad), c)
    for given, factor in ((c, 1), (tenfold, 10)):
        again = how(given)
        same(again(x).sum(), (factor * w * x).sum())
        (g,) = f.grad(lambda c: c(x).sum())(again).values
        same(g.reshape(-1), x)
        assert pytree.tree_structure(again) == pytree.tree_structure(given)
        both = pytree.tree_map(lambda a, b: a.detach() - b.detach(), given, again)
        same(both.values, [torch.zeros_like(v) for v in c.values])


class WithTable(nn.Module):
    """Its buffer is a value of its closure too, so that the others stand for its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2).double()
        self.register_buffer("table", torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        return self.linear(x) * self.table


@pytest.mark.parametrize("how", [_pickled, _cloudpickled, _saved, copy.deepcopy])
def test_a_closure_and_its_module_stay_together(how: Any) -> None:
    """A derivative by the parameters of the copy comes out of the closure beside it."""
    module, x = WithTable(), torch.tensor([5.0, 7.0], dtype=torch.float64)
    again, c = how((module, Closure(module, x)))
    parameters = list(again.parameters())
    same(
        torch.autograd.grad(c(x).sum(), parameters),
        torch.autograd.grad(again(x).sum(), parameters),
    )
    tenfold = how(pytree.tree_map(lambda t: 10 * t.detach(), Closure(module, x)))
    assert not tenfold(x).requires_grad


def test_a_shallow_copy_has_the_same_values() -> None:
    """Derivatives flow into what the values were computed from."""
    p, x = fresh(2), fresh(2)
    w = p.exp()
    c = Closure(lambda x: (w * x).sum(), x)
    again = copy.copy(c)
    assert again is not c
    assert all(map(lambda a, b: a is b, again.values, c.values))
    same(torch.autograd.grad(again(x), p)[0], (w * x).detach())


def test_a_copy_of_a_converted_function() -> None:
    w, x, v = fresh(3), fresh(3), fresh(3)
    converted, hoisted = closure_convert(lambda x: (w * x).sum(), x)
    for again in (copy.deepcopy(converted), _cloudpickled(converted)):
        assert again == converted
        same(again(x, v), (v * x).sum())
        same(again(x), converted(x, *hoisted))
    assert closure_convert(lambda x: (w * x).sum(), x)[0] != converted


@pytest.mark.slow
def test_in_a_new_process(tmp_path: Path) -> None:
    x = torch.tensor([5.0, 7.0], dtype=torch.float64)
    c = pytree.tree_map(lambda t: 10 * t, Closure(scaled, x))
    file = tmp_path / "closure.pickle"
    file.write_bytes(pickle.dumps((c, x)))
    code = f"import pickle; c, x = pickle.load(open({str(file)!r}, 'rb')); print(float(c(x)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(shown.stdout) == 310.0


class Dataset(torch.utils.data.Dataset[Tensor]):
    def __init__(self, c: Closure) -> None:
        self.c = c

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Tensor:
        return self.c(torch.full((2,), float(i), dtype=torch.float64)).detach()


@pytest.mark.slow
# Where other tests have loaded JAX, it warns of its threads; the worker runs none of JAX.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_workers_of_a_data_loader(context: str) -> None:
    c = pytree.tree_map(lambda t: 10 * t, Closure(scaled, torch.ones(2, dtype=torch.float64)))
    loader = torch.utils.data.DataLoader(
        Dataset(c), batch_size=None, num_workers=1, multiprocessing_context=context
    )
    assert [float(y) for y in loader] == [0.0, 50.0]


class Hiding:
    """Keeps a tensor where no look from outside finds it."""

    def __init__(self, w: Tensor) -> None:
        self.get = iter([w] * 100).__next__


def test_what_a_copy_could_not_find_is_refused() -> None:
    hiding = Hiding(fresh(3))
    c = Closure(lambda x: (hiding.get() * x).sum(), fresh(3))
    assert len(c.values) == 1
    with pytest.raises(CaptureError, match=r"cannot be found again in the copy\. Keep it in one"):
        copy.deepcopy(c)
    generator = torch.Generator()
    w = fresh(3)
    c = Closure(
        lambda x: (w * torch.rand(3, generator=generator) * x).sum(), fresh(3), rng="replay"
    )
    with pytest.raises(CaptureError, match="Draw outside and capture the result"):
        copy.deepcopy(c)


def test_a_copy_that_keeps_something_else_is_refused() -> None:
    dumped = pickle.dumps(Closure(scaled, torch.ones(2, dtype=torch.float64)))
    global SCALE  # another process may have something else there
    before = SCALE
    try:
        SCALE = torch.ones(3)
        with pytest.raises(CaptureError, match=r"float64\[2\] where the original did, got float32"):
            pickle.loads(dumped)
    finally:
        SCALE = before


def test_packages_without_pytorch_are_searched_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to their end: the globals of a large library lead to the whole process."""
    library: Any = ModuleType("library_without_pytorch")
    code = "".join(f"def f{i}(): return f{i + 1}()\n" for i in range(200))
    exec(code, vars(library))  # noqa: S102 (a module of its own)
    monkeypatch.setitem(sys.modules, library.__name__, library)
    w = fresh(3)
    met = Search(lambda x: library.f0() if x is None else w * x).met
    assert id(w) in met
    assert id(library.f1) in met
    assert id(library.f199) not in met
    exec("class Node: pass", vars(library))  # noqa: S102 (as above)
    nodes = [library.Node() for _ in range(5_000)]
    for node, following in itertools.pairwise(nodes):
        node.following = following
    met = Search(lambda x, first=nodes[0]: first if x is None else w * x).met
    assert id(w) in met
    assert id(nodes[100]) in met
    assert id(nodes[-1]) not in met
    library.torch = torch
    monkeypatch.setitem(sys.modules, "another_module", ModuleType("another_module"))
    assert id(library.f199) in Search(lambda x: library.f0() if x is None else w * x).met


def test_a_variable_of_a_package_with_pytorch_has_a_place() -> None:
    fun = lambda x: other_module.scaled(x)
    assert id(other_module.SCALE) in Search(fun).met


def test_a_module_without_pytorch_that_is_given_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = ModuleType("settings_without_pytorch")
    exec("class Settings: pass\nS = Settings()\ndef scale(x): return x * S.w", vars(settings))  # noqa: S102 (a module of its own)
    monkeypatch.setitem(sys.modules, settings.__name__, settings)
    x = fresh(3)
    Search(settings.scale)  # it has been looked at before there is a tensor
    settings.S.w = w = fresh(3)
    converted = Closure(lambda x: settings.scale(x), x)
    settings.S.w = fresh(3)
    same(converted(x), x * w)


def test_no_code_of_a_metaclass_runs() -> None:
    class Meta(type):
        def __getattribute__(cls, name: str) -> Any:
            raise AssertionError(f"class attribute {name} read")

    class Odd(metaclass=Meta):
        pass

    w, instance = fresh(3), object.__new__(Odd)
    converted, hoisted = closure_convert(lambda x: (Odd, instance, w * x)[2], fresh(3))
    assert converted.captured == (w,)
    x = fresh(3)
    assert torch.equal(converted(x, *hoisted), w * x)
