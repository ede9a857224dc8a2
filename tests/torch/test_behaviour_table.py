"""The behaviour table: each way to capture x each transformation x each way to convert.

The same cases as for JAX, from one file. The oracle of every cell is the same transformation of the
function with its values handed down explicitly. A program takes `diff`, the argument and the
captured floats, and `rest`, the captured integers and booleans.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from freevars.torch import Closure, StructureError, closure_convert
from tests.behaviour import CASES, Case, Host, X

f = torch.func
pytree = torch.utils._pytree
F64 = torch.float64
HOST = Host(torch, f.vmap)

Program = Callable[[Any, Any], Tensor]


# The ways to convert: each gives `fun(*args)` by another road.


def traced(fun: Any, *args: Any) -> Any:
    converted, hoisted = closure_convert(fun, *args)
    return converted(*args, *hoisted)


def everything(fun: Any, *args: Any) -> Any:
    converted, hoisted = closure_convert(fun, *args, hoist="all")
    return converted(*args, *hoisted)


def closure(fun: Any, *args: Any) -> Any:
    return Closure(fun, *args)(*args)


def elsewhere(fun: Any, x: Tensor) -> Any:
    """Converted at another argument than it is called with."""
    converted, hoisted = closure_convert(fun, x.detach() * 0.5 + 0.1)
    return converted(x, *hoisted)


class Swapped:
    """The function of a first run, over other captured values, called with the values that are
    hoisted now: nothing of what the function captured may be left in the result."""

    def __init__(self) -> None:
        self.first: Any = None

    def __call__(self, fun: Any, *args: Any) -> Any:
        converted, hoisted = closure_convert(fun, *args, hoist="all")
        if self.first is None:
            self.first = converted
        return self.first(*args, *hoisted)


def nested(fun: Any, *args: Any) -> Any:
    """A closure inside the other conversion, inside itself."""
    return closure(
        lambda *inner: traced(lambda *innermost: closure(fun, *innermost), *inner), *args
    )


def _floating(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


class Evaluate(torch.autograd.Function):
    """The rule of a function argument: its hoisted values are trailing arguments."""

    @staticmethod
    def forward(fun: Any, *args: Tensor) -> Any:
        return fun(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.fun, *args = inputs
        ctx.save_for_backward(*args)
        ctx.save_for_forward(*args)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        floating = [i for i, t in enumerate(ctx.saved_tensors) if _floating(t)]

        def run(*some: Tensor) -> Tensor:
            args = list(ctx.saved_tensors)
            for i, t in zip(floating, some, strict=True):
                args[i] = t
            return (ctx.fun(*args) * g).sum()

        some = [ctx.saved_tensors[i] for i in floating]
        grads = f.grad(run, tuple(range(len(some))))(*some)
        all_grads: list[Any] = [None] * len(ctx.saved_tensors)
        for i, grad in zip(floating, grads, strict=True):
            all_grads[i] = grad
        return None, *all_grads

    @staticmethod
    def vmap(info: Any, in_dims: Any, fun: Any, *args: Tensor) -> Any:
        return f.vmap(fun, in_dims=in_dims[1:])(*args), 0


def custom_function(fun: Any, x: Tensor) -> Any:
    converted, hoisted = closure_convert(fun, x)
    return Evaluate.apply(converted, x, *hoisted)


def as_an_argument(fun: Any, x: Tensor) -> Any:
    """The closure is a differentiable argument of a torch.func transform."""
    out, pullback = f.vjp(lambda c, x: c(x), Closure(fun, x), x)
    pullback(torch.ones_like(out))
    return out


def checkpoint_inside(fun: Any, x: Tensor) -> Any:
    return traced(lambda x: checkpoint(fun, x, use_reentrant=False), x)


def reentrant_inside(fun: Any, x: Tensor) -> Any:
    return traced(lambda x: checkpoint(fun, x, use_reentrant=True), x)


def checkpoint_around(fun: Any, x: Tensor) -> Any:
    converted, hoisted = closure_convert(fun, x)
    return checkpoint(converted, x, *hoisted, use_reentrant=False)


def compiled_inside(fun: Any, x: Tensor) -> Any:
    return traced(torch.compile(fun, backend="eager"), x)


# The transformations: each takes `program(diff, rest)` and the values of both.


def value(p: Program, diff: Any, rest: Any) -> Any:
    return p(diff, rest)


def no_grad(p: Program, diff: Any, rest: Any) -> Any:
    with torch.no_grad():
        return p(diff, rest)


def inference_mode(p: Program, diff: Any, rest: Any) -> Any:
    with torch.inference_mode():
        return p(diff, rest)


def made_in_inference_mode(p: Program, diff: Any, rest: Any) -> Any:
    with torch.inference_mode():
        return p(pytree.tree_map(torch.clone, diff), rest)


def backward(p: Program, diff: Any, rest: Any) -> Any:
    leaves = [t.detach().requires_grad_() for t in diff]
    p(leaves, rest).backward()
    return [t.grad for t in leaves]


def reentrant_around(p: Program, diff: Any, rest: Any) -> Any:
    leaves = [t.detach().requires_grad_() for t in diff]
    checkpoint(lambda *d: p(d, rest), *leaves, use_reentrant=True).backward()
    return [t.grad for t in leaves]


def _backward_of_order(n: int, p: Program, diff: Any, rest: Any) -> Any:
    """The gradient of a function of the gradient of ..., n times, by the autograd engine."""
    out = p(diff, rest)
    grads: Any = ()
    for k in range(n):
        grads = torch.autograd.grad(out, diff, create_graph=k + 1 < n, materialize_grads=True)
        out = sum((g * g.cos()).sum() for g in grads)
    return grads


def double_backward(p: Program, diff: Any, rest: Any) -> Any:
    return _backward_of_order(2, p, diff, rest)


def triple_backward(p: Program, diff: Any, rest: Any) -> Any:
    return _backward_of_order(3, p, diff, rest)


def through_checkpoint(p: Program, diff: Any, rest: Any) -> Any:
    return _backward_of_order(
        2, lambda d, r: checkpoint(lambda *d: p(d, r), *d, use_reentrant=False), diff, rest
    )


def grad(p: Program, diff: Any, rest: Any) -> Any:
    return f.grad(p)(diff, rest)


def grad_grad(p: Program, diff: Any, rest: Any) -> Any:
    return f.grad(lambda d: sum((g * g.cos()).sum() for g in f.grad(p)(d, rest)))(diff)


def vjp(p: Program, diff: Any, rest: Any) -> Any:
    out, pullback = f.vjp(lambda d: p(d, rest), diff)
    return out, pullback(torch.full_like(out, 0.7))


def _tangent(diff: Any) -> Any:
    def one(t: Tensor) -> Tensor:
        return torch.arange(t.numel(), dtype=t.dtype).cos().reshape(t.shape)

    return pytree.tree_map(one, diff)


def jvp(p: Program, diff: Any, rest: Any) -> Any:
    return f.jvp(lambda d: p(d, rest), (diff,), (_tangent(diff),))


def dual(p: Program, diff: Any, rest: Any) -> Any:
    with forward_ad.dual_level():
        pairs = pytree.tree_map(forward_ad.make_dual, diff, _tangent(diff))
        return tuple(forward_ad.unpack_dual(p(pairs, rest)))


def dual_over_backward(p: Program, diff: Any, rest: Any) -> Any:
    """Forward mode over the autograd engine."""
    with forward_ad.dual_level():
        pairs = pytree.tree_map(forward_ad.make_dual, diff, _tangent(diff))
        grads = torch.autograd.grad(p(pairs, rest), pairs, materialize_grads=True)
        tangents = [forward_ad.unpack_dual(g).tangent for g in grads]
        return [
            torch.zeros_like(g) if t is None else t for g, t in zip(grads, tangents, strict=True)
        ]


def _other(x: Tensor) -> Tensor:
    return ~x if x.dtype is torch.bool else x.flip(0) if x.ndim else x - 1


def _pairs(diff: Any, rest: Any) -> Any:
    """A batch of two: the values, and others of the same types."""
    a = pytree.tree_map(lambda x: torch.stack([x, 0.5 * x + 0.1]), diff)
    return a, tuple(torch.stack([x, _other(x)]) for x in rest)


def vmap(p: Program, diff: Any, rest: Any) -> Any:
    return f.vmap(p)(*_pairs(diff, rest))


def vmap_some(p: Program, diff: Any, rest: Any) -> Any:
    """Over the captured values alone: the argument is not batched."""
    (_, *values), others = _pairs(diff, rest)
    axes = ((None, *(0 for _ in values)), tuple(0 for _ in others))
    return f.vmap(p, in_dims=axes)((diff[0], *values), others)


def vmap_grad(p: Program, diff: Any, rest: Any) -> Any:
    return f.vmap(f.grad(p))(*_pairs(diff, rest))


def grad_vmap(p: Program, diff: Any, rest: Any) -> Any:
    diffs, rests = _pairs(diff, rest)
    return f.grad(lambda d: f.vmap(p)(d, rests).sin().sum())(diffs)


def backward_vmap(p: Program, diff: Any, rest: Any) -> Any:
    """The autograd engine over vmap."""
    diffs, rests = _pairs(diff, rest)
    out = f.vmap(p)(diffs, rests).sin().sum()
    return torch.autograd.grad(out, diff, materialize_grads=True)


def vmap_jvp(p: Program, diff: Any, rest: Any) -> Any:
    return f.vmap(lambda d, r: jvp(p, d, r))(*_pairs(diff, rest))


def jacrev(p: Program, diff: Any, rest: Any) -> Any:
    return f.jacrev(lambda d: torch.stack([p(d, rest), p(d, rest) ** 2]))(diff)


def jacfwd(p: Program, diff: Any, rest: Any) -> Any:
    return f.jacfwd(lambda d: torch.stack([p(d, rest), p(d, rest) ** 2]))(diff)


def hessian(p: Program, diff: Any, rest: Any) -> Any:
    """Forward over reverse."""
    return f.hessian(p)(diff, rest)


def hessian_reversed(p: Program, diff: Any, rest: Any) -> Any:
    return f.jacrev(f.jacfwd(p))(diff, rest)


def jacrev_jacrev(p: Program, diff: Any, rest: Any) -> Any:
    return f.jacrev(f.jacrev(p))(diff, rest)


def jacfwd_jacfwd(p: Program, diff: Any, rest: Any) -> Any:
    return f.jacfwd(f.jacfwd(p))(diff, rest)


def third(p: Program, diff: Any, rest: Any) -> Any:
    return f.jacfwd(f.jacrev(f.grad(p)))(diff, rest)


def autocast(p: Program, diff: Any, rest: Any) -> Any:
    """In half precision where PyTorch's rules say so, forward and backward."""
    diff = [t.detach().float().requires_grad_() for t in diff]
    with torch.autocast("cpu", torch.bfloat16):
        out = p(diff, rest)
    return out, torch.autograd.grad(out.float(), diff, materialize_grads=True)


def _compiled(p: Program, diff: Any, rest: Any, backend: str) -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    around = torch.compile(lambda d, r: (2 * p(d, r)).sin() + d[0].sum(), backend=backend)
    grads = _backward_of_order(1, around, diff, rest)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    return grads


def compiled(p: Program, diff: Any, rest: Any) -> Any:
    """`torch.compile` around all of it; the graph of what it traces runs as it is."""
    return _compiled(p, diff, rest, "eager")


def compiled_with_autograd(p: Program, diff: Any, rest: Any) -> Any:
    """As above, with derivatives traced as well."""
    return _compiled(p, diff, rest, "aot_eager")


ORDINARY = [
    *(value, no_grad, inference_mode, made_in_inference_mode, autocast),
    *(backward, double_backward, triple_backward, through_checkpoint, reentrant_around),
    *(grad, grad_grad, vjp, jvp, dual, dual_over_backward),
    *(vmap, vmap_some, vmap_grad, grad_vmap, backward_vmap, vmap_jvp),
    *(jacrev, jacfwd, hessian, hessian_reversed, jacrev_jacrev, jacfwd_jacfwd, third),
]

COMPILED = (compiled, compiled_with_autograd)

# The whole table for the conversions themselves. What takes a converted function meets each case
# under the transformations that meet it in another way.
SOME = [double_backward, vmap_grad, jvp, hessian]
TABLE = [
    *((way, t) for way in (traced, closure, Swapped) for t in ORDINARY),
    *((way, t) for way in (everything, elsewhere, nested, as_an_argument) for t in SOME),
    *((custom_function, t) for t in (double_backward, vmap_grad, grad_grad, jacrev)),
    *((way, t) for way in (checkpoint_inside, checkpoint_around) for t in (double_backward,)),
    (reentrant_inside, backward),
    *((traced, t) for t in COMPILED),
    (compiled_inside, double_backward),
]


class Excluded(NamedTuple):
    """Cells that cannot be shared: what they raise and why. Each must raise it, so that nothing
    stays here longer than it is true."""

    ways: tuple[Any, ...]
    transformations: tuple[Any, ...]
    cases: tuple[str, ...]
    error: type[Exception]
    match: str
    explicit_too: bool  # whether a function with explicit arguments would raise the same
    reason: str


EVERY = tuple(case.name for case in CASES)
EXCLUDED = [
    Excluded(
        *((Swapped,), (autocast,), EVERY),
        *(StructureError, r"expected (like .*)?(float64|complex128)\[.*got (float32|complex64)\["),
        explicit_too=False,
        reason="converted in double precision, called in single: other types are refused",
    ),
    Excluded(
        *((traced, closure), (autocast,), ("numpy",)),
        *(AssertionError, "dtype"),
        explicit_too=False,
        reason="a NumPy constant promotes to double precision, the oracle's Python numbers do not",
    ),
    Excluded(
        *((as_an_argument,), (vmap_grad, hessian), ("int", "bool")),
        *(RuntimeError, "only Tensors of floating point dtype can require gradients"),
        explicit_too=True,
        reason="torch.func.vjp takes no integers, and what a transform wraps is captured",
    ),
    Excluded(
        *((checkpoint_inside, checkpoint_around), (double_backward,), ("batched",)),
        *(RuntimeError, "escaped from inside a function being vmapped"),
        explicit_too=True,
        reason="PyTorch: what a checkpoint inside vmap recomputes runs when vmap is over",
    ),
    Excluded(
        *((reentrant_inside,), (backward,), ("batched",)),
        *(RuntimeError, "override the setup_context staticmethod"),
        explicit_too=True,
        reason="PyTorch: reentrant checkpointing is a custom Function without torch.func's parts",
    ),
]


def _excluded(way: Any, transformation: Any, case: Case) -> Excluded | None:
    for cells in EXCLUDED:
        here = way in cells.ways and transformation in cells.transformations
        if here and case.name in cells.cases:
            return cells
    return None


def _values(case: Case) -> tuple[Any, Any, list[bool]]:
    values = [torch.tensor(v) for v in case.values]
    where = [t.is_floating_point() for t in values]
    pairs = list(zip(values, where, strict=True))
    diff = [torch.tensor(X), *(t for t, floating in pairs if floating)]
    return (
        tuple(t.requires_grad_() for t in diff),
        tuple(t for t, floating in pairs if not floating),
        where,
    )


def _program(case: Case, way: Any) -> tuple[Program, Any, Any]:
    diff, rest, where = _values(case)
    via = way() if way is Swapped else way

    def program(diff: Any, rest: Any) -> Any:
        (x, *values), others = diff, iter(rest)
        floating = iter(values)
        merged = [next(floating if is_float else others) for is_float in where]
        if way is None:
            return case.explicit(HOST, x, *merged)
        return case.program(HOST, via, x, *merged)

    if way is Swapped:
        program(tuple((0.7 * t + 0.2).detach().requires_grad_() for t in diff), rest)
    return program, diff, rest


def _transformed(case: Case, transformation: Any, way: Any) -> Any:
    program, diff, rest = _program(case, way)
    return transformation(program, diff, rest)


@pytest.fixture(scope="module")
def oracle() -> Any:
    """What the explicit function gives under a transformation, computed once."""
    known: dict[Any, Any] = {}

    def get(case: Case, transformation: Any) -> Any:
        if (case.name, transformation) not in known:
            known[case.name, transformation] = _transformed(case, transformation, None)
        return known[case.name, transformation]

    return get


# PyTorch's compiler looks at .grad, and warns of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("way", "transformation"),
    [
        # The compiler takes two seconds a cell.
        pytest.param(way, t, marks=[pytest.mark.slow] if t in COMPILED else [])
        for way, t in TABLE
    ],
    ids=[f"{way.__name__}-{t.__name__}" for way, t in TABLE],
)
def test_equals_the_explicit_function(oracle, case, way, transformation) -> None:
    cells = _excluded(way, transformation, case)
    if cells is None:
        _compare(_transformed(case, transformation, way), oracle(case, transformation))
        return
    with pytest.raises(cells.error, match=cells.match):
        _compare(_transformed(case, transformation, way), oracle(case, transformation))


def _compare(got: Any, expected: Any) -> None:
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        exact = b.dtype in {F64, torch.complex128}
        tight = {"rtol": 1e-10, "atol": 1e-10} if exact else {}  # PyTorch's own for the others
        torch.testing.assert_close(a, b, **tight)


def test_autocast_makes_a_difference() -> None:
    """Else that column would show nothing."""
    (case,) = (case for case in CASES if case.name == "matrix")
    program, diff, rest = _program(case, traced)
    out, _ = autocast(program, diff, rest)
    assert abs(out - program(diff, rest)) > 1e-4


@pytest.mark.parametrize("cells", [c for c in EXCLUDED if c.explicit_too], ids=lambda c: c.reason)
def test_what_is_excluded_is_the_hosts(cells: Excluded) -> None:
    """The same cells with the captured values threaded by hand instead of converted."""
    x, ws = torch.tensor(X, requires_grad=True), torch.ones(3, 2, dtype=F64, requires_grad=True)

    def fun(x: Tensor, w: Tensor) -> Tensor:
        return (w * x).sin().sum()

    def by_vjp() -> Any:
        return f.vjp(lambda k, x: x[k], torch.tensor(1), x)

    def by_checkpoint() -> Any:
        one = lambda w: checkpoint(fun, x, w, use_reentrant=cells.ways == (reentrant_inside,))
        return torch.autograd.grad(f.vmap(one)(ws).sum(), x)

    with pytest.raises(cells.error, match=cells.match):
        by_vjp() if cells.ways == (as_an_argument,) else by_checkpoint()
