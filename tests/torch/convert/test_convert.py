"""What `closure_convert` finds, and that the converted function computes with what it is given."""

import collections
import functools
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from freevars.torch import CaptureError, closure_convert
from tests.torch.explicit import check, derivatives, fresh, same

GLOBAL = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
Pair = collections.namedtuple("Pair", "a b")  # noqa: PYI024 (the plain named tuple is the case)


class Square(torch.autograd.Function):
    """x -> scale x^2, in the old style."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return scale * x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        return 2 * g * scale * x, g * x * x


class Cube(torch.autograd.Function):
    """x -> x^3, in the style that torch.func takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * x * x

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * t * x * x


PREBOUND = Square.apply


def loop(x: Tensor, w: Tensor) -> Tensor:
    while x.abs().sum() < 50:
        x = x * (1 + w.abs())
    return x


def in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y[0] = w[1] * 2
    y += w
    y.mul_(w)
    return y.sin_()


def listed(x: Tensor, w: Tensor, v: Tensor) -> Any:
    a, b = torch.unbind(torch.stack([w, v]))
    return {"a": [a * x, Pair(b, x * v)], "b": (w.flip(0), 3)}


def inner_grad(x: Tensor, w: Tensor) -> Tensor:
    y = x.detach().requires_grad_()
    (g,) = torch.autograd.grad((y**3 * w).sum(), y, create_graph=True)
    return g * x


def own_leaf(x: Tensor, w: Tensor) -> Tensor:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    with torch.enable_grad():
        (g,) = torch.autograd.grad(((p - 1.5) ** 2).sum(), p)
    q = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    return x * w + g + p * 2 + q


def foreach(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    a, b = torch._foreach_mul([w, v], [x, x])
    return a * b


def sparse(x: Tensor, w: Tensor) -> Tensor:
    indices = torch.tensor([[0, 1, 2], [2, 0, 1]])
    return torch.sparse.mm(
        torch.sparse_coo_tensor(indices, w, (3, 3), check_invariants=True), x[:, None]
    )[:, 0]


def checkpointed(x: Tensor, w: Tensor) -> Tensor:
    return checkpoint(lambda y: (y * w).sin() * w, x, use_reentrant=False)


def hook(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(lambda g: g * w)
    return (y * y).sin()


def odd_containers(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    named = torch.stack(Pair(w, v)).sum(0)
    listed = torch.cat([w, *[v]])[torch.tensor([0, 3, 5])]
    return named * x + listed * torch.einsum("i,i->", [w, v])


CASES: dict[str, tuple[Any, int, int]] = {  # function, captured values, derivatives of which order
    "elementwise": (lambda x, w: (x * w).sin(), 1, 2),
    "two values": (lambda x, w, v: (x * w).sin() + v.exp() * w, 2, 2),
    "repeated": (lambda x, w: w * x * w + w, 1, 2),
    "method and operator": (lambda x, w: w.mul(x) @ w - (2.0 / w).sum(), 1, 2),
    "attribute": (lambda x, w: w.T @ x + w.mT.sum() if w.ndim > 1 else w.real * x, 1, 2),
    "keyword": (lambda x, w: torch.add(input=x, other=w, alpha=2) * x, 1, 2),
    "indexing": (lambda x, w: w[1:] * x[0] + w[torch.tensor([0, 2])], 1, 2),
    "returned": (lambda x, w: (w, x * 2), 1, 2),
    "loop on data": (loop, 1, 2),
    "in place on its own": (in_place, 1, 2),
    "containers": (listed, 2, 2),
    "odd containers": (odd_containers, 2, 2),
    "inner autograd": (inner_grad, 1, 2),
    "leaves of its own": (own_leaf, 1, 2),
    "foreach": (foreach, 2, 2),
    "sparse": (sparse, 1, 1),
    "checkpoint": (checkpointed, 1, 2),
    "hook": (hook, 1, 1),
    "custom Function": (lambda x, w: Square.apply(x, w), 1, 2),
    "custom Function, prebound": (lambda x, w: PREBOUND(w, x) * w, 1, 2),
    "custom Function of torch.func": (lambda x, w: Cube.apply(x * w) + Cube.apply(w), 1, 2),
    "func.grad": (lambda x, w: torch.func.grad(lambda z: (z**3 * w).sum())(x), 1, 2),
    "func.grad of a captured value": (
        lambda x, w: torch.func.grad(lambda z: (z**3 * w).sum())(w) * x,
        1,
        2,
    ),
    "func.vmap of a captured value": (lambda x, w: torch.func.vmap(lambda z: z * z * x)(w), 1, 2),
    "func.vmap over": (lambda x, w: torch.func.vmap(lambda z: z * z * w)(x), 1, 2),
    "func.vmap returns captured": (lambda x, w: torch.func.vmap(lambda z: w)(x) * x, 1, 2),
    "func.jvp of captured values": (
        lambda x, w, v: torch.func.jvp(lambda z: (z**3 * w).sum() * x, (w,), (v,))[1],
        2,
        2,
    ),
    "func.vjp": (lambda x, w: torch.func.vjp(lambda z: (z**3) * w, w)[1](x)[0], 1, 2),
    "func.hessian": (lambda x, w: torch.func.hessian(lambda z: (z**3 * w).sum())(w) @ x, 1, 2),
    "func.jacrev of a custom Function": (
        lambda x, w: torch.func.jacrev(lambda z: Cube.apply(z) * w)(w) @ x,
        1,
        2,
    ),
    "rearranged": (lambda x, w: torch.einsum("i,j->ij", w, x).reshape(-1).cumsum(0), 1, 2),
    "decomposition": (lambda x, w: torch.linalg.solve(torch.diag(w) + torch.outer(x, x), w), 1, 2),
    "norm and softmax": (
        lambda x, w: nn.functional.softmax(nn.functional.layer_norm(x * w, (3,), weight=w), 0),
        1,
        2,
    ),
    "detached": (lambda x, w: (w.detach() * x * w).sum(), 1, 2),
    "no_grad inside": (lambda x, w: x * w * _constant(w), 1, 2),
}


def _constant(w: Tensor) -> Tensor:
    with torch.no_grad():
        return w * w


@pytest.mark.parametrize("name", CASES)
def test_equals_explicit_arguments(name: str) -> None:
    explicit, n, order = CASES[name]
    check(explicit, [fresh(3)], [fresh(3) for _ in range(n)], order=order)


FUNC_CASES = sorted(
    set(CASES) - {"custom Function", "custom Function, prebound", "inner autograd", "hook"}
)
FUNC_CASES = sorted(set(FUNC_CASES) - {"checkpoint", "leaves of its own", "sparse", "loop on data"})


def _no_batching_rule(name: str, transform: str) -> None:
    if name == "foreach" and "vmap" in transform:
        pytest.skip("PyTorch has no batching rule for _foreach_mul")


@pytest.mark.parametrize("name", FUNC_CASES)
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "jacrev", "jacfwd", "vmap of grad"])
def test_converted_under_torch_func(name: str, transform: str) -> None:
    _no_batching_rule(name, transform)
    explicit, n, _ = CASES[name]
    x, values = fresh(3, grad=False), [fresh(3) for _ in range(n)]
    converted, hoisted = closure_convert(lambda x: explicit(x, *values), x)
    order = [next(i for i, v in enumerate(values) if v.data_ptr() == h.data_ptr()) for h in hoisted]
    f = torch.func

    def total(fun: Any) -> Any:
        def summed(*args: Tensor) -> Any:
            leaves = torch.utils._pytree.tree_leaves(fun(*args))
            return sum((t * t.cos()).sum() for t in leaves if isinstance(t, Tensor))

        return summed

    def ours(x: Tensor, *values: Tensor) -> Any:
        return converted(x, *(values[i] for i in order))

    point = [fresh(3, grad=False) for _ in range(n + 1)]
    every = tuple(range(n + 1))
    apply = {
        "grad": lambda fun: f.grad(total(fun), every)(*point),
        "jvp": lambda fun: f.jvp(total(fun), tuple(point), tuple(t.cos() for t in point)),
        "vmap": lambda fun: f.vmap(total(fun))(*(torch.stack([t, t * 2]) for t in point)),
        "jacrev": lambda fun: f.jacrev(f.grad(total(fun), every), every)(*point),
        "jacfwd": lambda fun: f.jacfwd(f.grad(total(fun), every), every)(*point),
        "vmap of grad": lambda fun: f.vmap(f.grad(total(fun), every))(
            *(torch.stack([t, t * 2]) for t in point)
        ),
    }[transform]
    same(apply(ours), apply(explicit))


@pytest.mark.parametrize("name", FUNC_CASES)
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "hessian", "dual"])
def test_conversion_inside_a_transform(name: str, transform: str) -> None:
    """The captured values are wrapped by a transform while the conversion happens."""
    _no_batching_rule(name, transform)
    explicit, n, _ = CASES[name]
    x, values = fresh(3, grad=False), [fresh(3, grad=False) for _ in range(n)]

    def summed(out: Any) -> Any:
        leaves = torch.utils._pytree.tree_leaves(out)
        return sum((t * t.cos()).sum() for t in leaves if isinstance(t, Tensor))

    def plain(*values: Tensor) -> Any:
        return summed(explicit(x, *values))

    def ours(*values: Tensor) -> Any:
        converted, hoisted = closure_convert(lambda x: explicit(x, *values), x)
        assert len(hoisted) == n
        return summed(converted(x, *hoisted))

    every = tuple(range(n))
    f = torch.func
    if transform == "dual" and "func." in name:
        pytest.skip("PyTorch does not nest plain forward mode and torch.func")

    def dual(fun: Any) -> Any:
        with torch.autograd.forward_ad.dual_level():
            pairs = [torch.autograd.forward_ad.make_dual(t, t.cos()) for t in values]
            return torch.autograd.forward_ad.unpack_dual(fun(*pairs))

    apply = {
        "grad": lambda fun: f.grad(fun, every)(*values),
        "jvp": lambda fun: f.jvp(fun, tuple(values), tuple(t.cos() for t in values)),
        "vmap": lambda fun: f.vmap(fun)(*(torch.stack([t, t * 2]) for t in values)),
        "hessian": lambda fun: f.hessian(fun, every)(*values),
        "dual": dual,
    }[transform]
    same(apply(ours), apply(plain))


# --- where captured values hide


class Objective:
    def __init__(self, w: Tensor) -> None:
        self.w = w
        self.table = {"v": [w * 2]}

    def __call__(self, x: Tensor) -> Tensor:
        return self.w * x + self.table["v"][0]

    def method(self, x: Tensor, k: float = 2.0) -> Tensor:
        return self.w * x * k


def test_found_wherever_they_hide() -> None:
    w, v, x = fresh(3), fresh(3), fresh(3, grad=False)
    objective = Objective(w)

    def helper(x: Tensor) -> Tensor:
        return x * v

    def with_default(x: Tensor, *, lam: Tensor = w) -> Tensor:
        return lam * helper(x)

    expected: list[tuple[Any, list[Tensor]]] = [
        (lambda x: x * GLOBAL, [GLOBAL]),
        (with_default, [v, w]),
        (objective, [w, objective.table["v"][0]]),
        (objective.method, [w]),
        (functools.partial(objective.method, k=3.0), [w]),
        (functools.partial(torch.mul, w), [w]),
        (lambda x: helper(helper(x)), [v]),
        (lambda x: x * w[0] + w[1], [w]),
        (torch.no_grad()(lambda x: x * w), [w]),
    ]
    for fun, tensors in expected:
        converted, hoisted = closure_convert(fun, x)
        assert {t.data_ptr() for t in hoisted} == {t.data_ptr() for t in tensors}
        same(converted(x, *hoisted), fun(x))
        assert converted.__wrapped__ is fun


def test_module_parameters_and_tied_weights() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    net[2].weight = net[0].weight
    x = fresh(4, 3, grad=False)
    converted, hoisted = closure_convert(net, x)
    parameters = list(net.parameters())
    assert [h.data_ptr() for h in hoisted] == [p.data_ptr() for p in parameters]
    got = torch.autograd.grad(converted(x, *hoisted).sin().sum(), parameters)
    same(got, torch.autograd.grad(net(x).sin().sum(), parameters))
    others = [torch.randn_like(p) for p in parameters]
    names = [name for name, _ in net.named_parameters()]
    tied = dict(zip(names, others, strict=True)) | {"2.weight": others[0]}
    same(converted(x, *others), torch.func.functional_call(net, tied, x))


@pytest.mark.parametrize(
    "net",
    [
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        lambda: nn.LSTM(8, 8, batch_first=True),
        lambda: nn.GRU(8, 8, num_layers=2, batch_first=True),
        lambda: nn.Sequential(nn.Conv1d(5, 6, 3), nn.GroupNorm(2, 6), nn.GELU()),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)),
        lambda: nn.BatchNorm1d(5).eval(),
        lambda: nn.BatchNorm1d(5, track_running_stats=False),
        lambda: nn.EmbeddingBag(10, 8),
    ],
)
def test_modules(net: Any) -> None:
    net = net().double()
    x = (
        fresh(2, 5, 8, grad=False)
        if not isinstance(net, nn.EmbeddingBag)
        else torch.randint(10, (2, 5))
    )
    converted, hoisted = closure_convert(net, x)
    parameters = list(net.parameters())
    assert len(hoisted) == len(parameters)

    def loss(out: Any) -> Tensor:
        return sum((t * t.cos()).sum() for t in torch.utils._pytree.tree_leaves(out))  # type: ignore[return-value]

    got = torch.autograd.grad(loss(converted(x, *hoisted)), parameters)
    same(got, torch.autograd.grad(loss(net(x)), parameters))


def test_partial_derivatives_are_independent() -> None:
    w = fresh(3)
    v = 2 * w
    x = fresh(3, grad=False)
    converted, (hw, hv) = closure_convert(lambda x: w * x + v**2, x)
    gw, gv = torch.autograd.grad(converted(x, hw, hv).sum(), (hw, hv), retain_graph=True)
    same([gw, gv], [x, 2 * v])
    (total,) = torch.autograd.grad(converted(x, hw, hv).sum(), w)
    same([total], [x + 4 * v])
    # The captured tensors themselves, exchanged.
    same(converted(x, v, w), v * x + w**2)


def test_an_argument_that_is_also_captured() -> None:
    w = fresh(3)
    converted, hoisted = closure_convert(lambda x: x * x * w, w)
    (h,) = hoisted
    got = torch.autograd.grad(converted(w, *hoisted).sum(), h)
    same(got, [w * w])
    x = fresh(3)
    same(converted(x, w), x * x * w)
    same(torch.autograd.grad(converted(w, w).sum(), w), [3 * w * w])


def test_views_and_their_bases_are_apart() -> None:
    w = fresh(3)
    row = w[1:]
    converted, hoisted = closure_convert(lambda x: (row * x[1:]).sum() + (w * x).sum(), fresh(3))
    assert [tuple(h.shape) for h in hoisted] == [(2,), (3,)]
    x = fresh(3)
    same(torch.autograd.grad(converted(x, *hoisted), hoisted), [x[1:], x])


def test_what_is_hoisted() -> None:
    w, c, x = fresh(3), fresh(3, grad=False), fresh(3)
    k = torch.arange(3)

    def fun(x: Tensor) -> Tensor:
        return x * c + w[k]

    def pointers(**options: Any) -> list[int]:
        return [h.data_ptr() for h in closure_convert(fun, x, **options)[1]]

    assert pointers() == [w.data_ptr()]
    assert pointers(hoist="all") == [c.data_ptr(), w.data_ptr(), k.data_ptr()]
    assert pointers(hoist=lambda t: t.dtype is torch.int64) == [k.data_ptr()]


def test_metadata_is_no_capture() -> None:
    w = fresh(3)
    w.grad = torch.ones_like(w)

    def fun(x: Tensor) -> Tensor:
        assert w.requires_grad
        assert w.is_leaf
        return (
            x * len(w) * w.shape[0] * w.size(0)
            + w.numel()
            + w.grad.sum()
            + w.dim()
            + w.dtype.itemsize
        )

    assert not closure_convert(fun, fresh(3))[1]


def test_hoisted_values_see_updates_and_backward() -> None:
    w, x = fresh(3), fresh(3, grad=False)
    converted, hoisted = closure_convert(lambda x: (x * w).sin(), x)
    for _ in range(2):
        w.grad = None
        converted(x, *hoisted).sum().backward()
        same([w.grad], [(x * w).cos() * x])
        with torch.no_grad():
            w.add_(1.0)


def test_complex() -> None:
    check(
        lambda x, w: (x * w.conj()).abs() + w.real,
        [fresh(3, dtype=torch.complex128)],
        [fresh(3, dtype=torch.complex128)],
    )


def test_captured_sparse_tensor() -> None:
    w = fresh(3, 3).detach().to_sparse().requires_grad_()
    x = fresh(3, 1)
    converted, hoisted = closure_convert(lambda x: torch.sparse.mm(w, x), x)
    got = torch.autograd.grad(converted(x, *hoisted).sum(), [x, *hoisted])
    expected = torch.autograd.grad(torch.sparse.mm(w, x).sum(), [x, w])
    same([t.to_dense() for t in got], [t.to_dense() for t in expected])


class Tagged(Tensor):
    """A subclass that passes through operations."""


def test_subclass() -> None:
    w = torch.randn(3, dtype=torch.float64).as_subclass(Tagged).requires_grad_()
    x = fresh(3)
    converted, hoisted = closure_convert(lambda x: x * w, x)
    assert isinstance(converted(x, *hoisted), Tagged)
    other = fresh(3)
    same(converted(x, other), x * other)


# --- the modes a call can be in


def test_no_grad_inference_mode_and_autocast() -> None:
    w, x = fresh(3), fresh(3, grad=False)
    converted, hoisted = closure_convert(lambda x: (x * w).sin(), x)
    other = fresh(3)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            same(converted(x, other), (x * other).sin())
            inside, values = closure_convert(lambda x: (x * w).sin(), x)
            assert len(values) == 1
        same(torch.autograd.grad(inside(x, *values).sum(), w), [(x * w).cos() * x])
    with torch.inference_mode():
        made_there = torch.randn(3, dtype=torch.float64)
        same(converted(made_there, *hoisted), (made_there * w).sin())


def test_autocast() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x = torch.randn(4, 8)

    def loss(out: Tensor) -> Tensor:
        return out.float().square().sum()

    with torch.autocast("cpu", torch.bfloat16):
        net(x)  # fills the cache of cast weights
        converted, hoisted = closure_convert(net, x)
        assert len(hoisted) == 4
        others = [torch.randn_like(h) for h in hoisted]
        got = converted(x, *others)
        expected = torch.func.functional_call(
            net, dict(zip(["0.weight", "0.bias", "2.weight", "2.bias"], others, strict=True)), x
        )
        assert got.dtype is torch.bfloat16
        assert torch.equal(got, expected)
        got_grads = torch.autograd.grad(loss(converted(x, *hoisted)), list(net.parameters()))
        assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        expected_grads = torch.autograd.grad(loss(net(x)), list(net.parameters()))
    for a, b in zip(got_grads, expected_grads, strict=True):
        assert torch.equal(a, b)


def test_reentrant_checkpoint_gives_the_given_values_their_gradient() -> None:
    w, x = fresh(3), fresh(3)
    converted, _ = closure_convert(
        lambda x: checkpoint(lambda y: (y * w).sin() * w, x, use_reentrant=True) * w, x
    )
    other, expected = fresh(3), None
    converted(x, other).sum().backward()
    expected = torch.autograd.grad(((x * other).sin() * other * other).sum(), [x, other])
    same([x.grad, other.grad], expected)
    assert w.grad is None


SCALE = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)


class Rereads(torch.autograd.Function):
    """The backward body reads a global that forward reads too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * SCALE.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * SCALE * x


def test_backward_bodies_read_the_given_values() -> None:
    x, other = fresh(3), torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    converted, hoisted = closure_convert(Rereads.apply, x)
    assert [h.data_ptr() for h in hoisted] == [SCALE.data_ptr()]
    (g,) = torch.autograd.grad(converted(x, other).sum(), x, create_graph=True)
    same([g], [other * x])
    same(torch.autograd.grad(g.sum(), other), [x.sum()])


STATE: dict[str, Tensor] = {}


class RereadsState(torch.autograd.Function):
    """The backward body reads an entry of a dict, whatever it is by then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * STATE["now"]


@pytest.mark.parametrize("kind", ["custom Function", "hook"])
def test_backward_bodies_read_what_changed_while_the_function_ran(kind: str) -> None:
    w, v, x = fresh(3), fresh(3), fresh(3)

    def fun(x: Tensor) -> Tensor:
        for t in (w, v):
            STATE["now"] = t
            if kind == "hook":
                x = x * 2
                x.register_hook(lambda g: g * STATE["now"])
            else:
                x = RereadsState.apply(x)
        return x

    converted, hoisted = closure_convert(fun, x)
    assert v.data_ptr() in [h.data_ptr() for h in hoisted]
    given = [fresh(3) if h.data_ptr() == v.data_ptr() else h for h in hoisted]
    (other,) = (t for t, h in zip(given, hoisted, strict=True) if t is not h)
    (g,) = torch.autograd.grad(converted(x, *given).sum(), x, create_graph=True)
    factor = 4 if kind == "hook" else 1
    same([g], [factor * other**2])
    same(torch.autograd.grad(g.sum(), other), [2 * factor * other])
    STATE.clear()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # the compiler's own look
def test_compiled_callee_and_compile_around() -> None:
    count = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    w, x = fresh(3), fresh(3)
    callee = torch.compile(lambda x: (x * w).sin(), backend=backend)
    expected = callee(x)
    assert count == 1
    converted, hoisted = closure_convert(callee, x)
    assert len(hoisted) == 1
    same(converted(x, *hoisted), expected)
    other = fresh(3)
    same(
        derivatives(converted, [x, other], 2),
        derivatives(lambda x, w: (x * w).sin(), [x, other], 2),
    )
    same(callee(x), expected)
    assert count == 1
    whole = torch.compile(lambda x: (x * w).sin(), backend=backend, fullgraph=True)
    converted, hoisted = closure_convert(whole, x)
    same(converted(x, *hoisted), expected)
    assert count == 1

    plain, _ = closure_convert(lambda x: (x * w).sin(), x)
    around = torch.compile(lambda x, w: plain(x * 2, w) + 1, backend=backend)
    same(
        derivatives(around, [x, other], 1),
        derivatives(lambda x, w: (2 * x * w).sin() + 1, [x, other], 1),
    )

    @functools.partial(torch.compile, backend=backend)
    def converts(x: Tensor) -> Tensor:
        inside, values = closure_convert(lambda x: (x * w).sin(), x)
        return inside(x, *values)

    same(converts(x), (x * w).sin())


def test_nested_conversions() -> None:
    w, v, x = fresh(3), fresh(3), fresh(3)

    def inner(y: Tensor) -> Tensor:
        return y * w + v

    def outer(x: Tensor) -> Tensor:
        converted, hoisted = closure_convert(inner, x)
        assert len(hoisted) == 2
        return converted(x.sin(), *hoisted) * w

    for hoist in ("differentiable", "all"):
        converted, hoisted = closure_convert(outer, x, hoist=hoist)
        assert [h.data_ptr() for h in hoisted] == [w.data_ptr(), v.data_ptr()]
        others = [x, fresh(3), fresh(3)]
        same(
            derivatives(converted, others, 2),
            derivatives(lambda x, w, v: (x.sin() * w + v) * w, others, 2),
        )


def test_nested_conversion_sees_what_the_outer_call_gives() -> None:
    """Constants, hoisted by `hoist='all'`, are differentiable where the outer caller
    differentiates."""
    w, x = fresh(3, grad=False), fresh(3, grad=False)

    def outer(x: Tensor) -> Tensor:
        converted, hoisted = closure_convert(lambda y: y * w, x)
        return converted(x, *hoisted) if hoisted else x * w

    converted, _ = closure_convert(outer, x, hoist="all")
    same(torch.func.grad(lambda w: converted(x, w).sum())(w), x)


def test_threads_do_not_see_each_other() -> None:
    errors: list[BaseException] = []
    shared = fresh(3)

    def work(seed: int) -> None:
        try:
            x = torch.full((3,), float(seed), dtype=torch.float64)
            for k in range(30):
                converted, hoisted = closure_convert(
                    lambda x: (x * shared).sin() + Square.apply(x, shared), x
                )
                assert len(hoisted) == 1
                other = torch.full((3,), 0.1 * (k + seed), dtype=torch.float64, requires_grad=True)
                got = torch.autograd.grad(converted(x, other).sum(), other)
                same(got, [(x * other).cos() * x + x * x])
        except BaseException as error:  # noqa: BLE001 (reported by the main thread)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors


def test_nothing_is_retained() -> None:
    gc.disable()
    try:
        w = fresh(3)
        fun = lambda x: (x * w).sin()  # noqa: F821 (deleted below)
        converted, hoisted = closure_convert(fun, fresh(3))
        converted(fresh(3), *hoisted).sum().backward()
        tensor, function = weakref.ref(w), weakref.ref(fun)
        del w, fun, converted, hoisted
        assert function() is None
        assert tensor() is None
    finally:
        gc.enable()


def test_functions_without_captures_and_without_arguments() -> None:
    converted, hoisted = closure_convert(lambda x: x * 2, fresh(3))
    assert hoisted == []
    x = fresh(3)
    same(converted(x), x * 2)
    w = fresh(3)
    converted, hoisted = closure_convert(lambda: w * 2)
    same(converted(x), x * 2)


def test_arguments_of_any_structure() -> None:
    w = fresh(3)

    def fun(batch: Any, power: int, mode: str) -> Any:
        x = batch["x"][0]
        return {"y": (x * w) ** power, "mode": mode, "left": batch["n"]}

    batch = {"x": [fresh(3)], "n": None}
    converted, hoisted = closure_convert(fun, batch, 2, "sum")
    got = converted(batch, 3, "sum", *hoisted)
    same([got["y"]], [(batch["x"][0] * w) ** 3])
    assert got["mode"] == "sum"
    assert got["left"] is None


def test_random_numbers() -> None:
    w, x = fresh(3), fresh(3, grad=False)
    generator = torch.Generator().manual_seed(5)

    def fun(x: Tensor) -> Tensor:
        return (
            x * w
            + torch.randn(3, dtype=torch.float64)
            + torch.rand(3, generator=generator, dtype=torch.float64)
        )

    before, before_generator = torch.get_rng_state(), generator.get_state()
    converted, hoisted = closure_convert(fun, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), before_generator)
    assert not torch.equal(converted(x, *hoisted), converted(x, *hoisted))
    replayed, hoisted = closure_convert(fun, x, rng="replay")
    state = torch.get_rng_state()
    assert torch.equal(replayed(x, *hoisted), replayed(x, *hoisted))
    assert torch.equal(torch.get_rng_state(), state)


def test_constants_in_slices_and_keywords() -> None:
    start, table = torch.tensor(1), {"w": fresh(3)}
    x = fresh(3)
    converted, hoisted = closure_convert(lambda x: x[start:] * table["w"][start:], x, hoist="all")
    assert [h.data_ptr() for h in hoisted] == [start.data_ptr(), table["w"].data_ptr()]
    same(converted(x, torch.tensor(2), hoisted[1]), x[2:] * table["w"][2:])


def test_metadata_of_an_alias_may_be_written() -> None:
    def explicit(x: Tensor, w: Tensor) -> Tensor:
        return w.detach().unsqueeze_(0).t_().squeeze_() * x.detach().unsqueeze_(0) * w

    check(explicit, [fresh(3)], [fresh(3)], order=1)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: torch.softmax(x * w, dim=0),
        lambda x, w: torch.matmul(x, w),
        lambda x, w: torch.cat([x, w]),
        lambda x, w: nn.functional.layer_norm(x, (3,), weight=w),
        lambda x, w: (x - 1) ** w,
        lambda x, w: w[..., 1:] * x[None, 1:],
        lambda x, w: torch.where(x > 0, input=w, other=x),
    ],
)
def test_an_operation_is_asked_about_once_and_read_through_at_each_call(call) -> None:
    x, w = fresh(3).exp().detach().add(1).requires_grad_(), fresh(3)
    converted, hoisted = closure_convert(lambda x: call(x, w), x)
    for mode in (torch.enable_grad, torch.no_grad):
        for _ in range(2):
            other = fresh(3)
            with mode():
                same(converted(x, other), call(x, other))
    same(derivatives(converted, [x, *hoisted], 2), derivatives(call, [x, w], 2))


def test_an_operation_known_to_be_harmless_is_not_where_it_writes() -> None:
    x, buffer, write = torch.ones(3), torch.zeros(3), False

    def fun(x: Tensor) -> Tensor:
        return torch.add(x, buffer, alpha=1, **({"out": buffer} if write else {}))

    converted, hoisted = closure_convert(fun, x, hoist="all")
    for _ in range(2):
        same(converted(x, *hoisted), x)
    write = True
    with pytest.raises(CaptureError, match="in place"):
        converted(x, *hoisted)
    same(buffer, torch.zeros(3))
