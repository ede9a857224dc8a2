"""`argmin`, `root`, `fixed_point`: the derivative of a solution, whatever solver found it."""

import copy
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

import freevars.torch as fv
from freevars.torch import (
    NotASolutionError,
    SingularError,
    StructureError,
    argmin,
    closure_convert,
    fixed_point,
    root,
)
from tests.torch.explicit import fresh, same

f = torch.func
pytree = torch.utils._pytree
F64 = torch.float64


@root
def newton(fun: Any, x0: Tensor) -> Tensor:
    """Newton's method, with the Jacobian of torch.func."""
    x = x0
    for _ in range(60):
        x = x - torch.linalg.solve(f.jacrev(fun)(x), fun(x))
    return x


@argmin
def lbfgs(fun: Any, x0: Tensor) -> Tensor:
    """A `torch.optim.LBFGS` loop, with plain `.backward()`."""
    x = x0.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = fun(x)
        value.backward()
        return value

    optimizer.step(closure)
    return x


@argmin
def by_scipy(fun: Any, x0: Tensor) -> Tensor:
    """scipy's BFGS: the solver leaves PyTorch."""

    def value_and_grad(v: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(v).requires_grad_()
        value = fun(x)
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    found = scipy.optimize.minimize(
        value_and_grad, x0.numpy(), jac=True, method="BFGS", options={"gtol": 1e-11}
    )
    return torch.from_numpy(found.x)


@fixed_point
def iterate(fun: Any, x0: Tensor) -> Tensor:
    """Plain iteration."""
    for _ in range(200):
        x0 = fun(x0)
    return x0


# The three rules on problems whose solution has a closed form: x(a, b) by hand.


def by_root(a: Tensor, b: Tensor) -> Tensor:
    return newton(lambda x: x**3 * a.exp() - b**2 - 1, torch.ones(3, dtype=F64))


def exact_root(a: Tensor, b: Tensor) -> Tensor:
    return ((b**2 + 1) / a.exp()) ** (1 / 3)


def quadratic(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    h = torch.diag(a.exp()) + torch.outer(b, b)
    return x @ h @ x / 2 - (a.sin() * b) @ x


def solve3(m: Tensor, b: Tensor) -> Tensor:
    """Cramer's rule: `torch.linalg.solve` itself is wrong in forward mode over forward mode."""
    cross = torch.linalg.cross
    adjugate = torch.stack([cross(m[1], m[2]), cross(m[2], m[0]), cross(m[0], m[1])], -1)
    return adjugate @ b / (m[0] * cross(m[1], m[2])).sum()


def exact_argmin(a: Tensor, b: Tensor) -> Tensor:
    return solve3(torch.diag(a.exp()) + torch.outer(b, b), a.sin() * b)


def by_argmin(a: Tensor, b: Tensor) -> Tensor:
    return lbfgs(lambda x: quadratic(x, a, b), torch.zeros(3, dtype=F64))


def by_scipy_argmin(a: Tensor, b: Tensor) -> Tensor:
    return by_scipy(lambda x: quadratic(x, a, b), torch.zeros(3, dtype=F64))


def by_fixed_point(a: Tensor, b: Tensor) -> Tensor:
    return iterate(lambda x: a.cos() * x / 3 + x.roll(1) / 4 + b, torch.zeros(3, dtype=F64))


def exact_fixed_point(a: Tensor, b: Tensor) -> Tensor:
    eye = torch.eye(3, dtype=F64)
    return solve3(eye - torch.diag(a.cos()) / 3 - eye.roll(1, 0) / 4, b)


RULES = {
    "root": (by_root, exact_root),
    "argmin": (by_argmin, exact_argmin),
    "scipy": (by_scipy_argmin, exact_argmin),
    "fixed_point": (by_fixed_point, exact_fixed_point),
}


def close(got: Any, expected: Any) -> None:
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def point() -> tuple[Tensor, Tensor]:
    return fresh(3, grad=False) / 2, fresh(3, grad=False) / 2


def loss(solve: Any) -> Any:
    return lambda a, b: (solve(a, b) * torch.arange(1.0, 4.0, dtype=F64)).sin().sum()


@pytest.mark.slow  # thousands of solves
@pytest.mark.parametrize("name", RULES)
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    solve, _ = RULES[name]
    inputs = tuple(t.requires_grad_() for t in point())
    assert torch.autograd.gradcheck(solve, inputs, eps=1e-4, atol=1e-4, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solve, inputs, eps=1e-4, atol=1e-4, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", RULES)
def test_triple_backward(name: str) -> None:
    solve, exact = RULES[name]
    inputs = tuple(t.requires_grad_() for t in point())

    def thrice(solve: Any) -> Any:
        out = loss(solve)(*inputs)
        for k in range(3):
            grads = torch.autograd.grad(out, inputs, create_graph=k < 2)
            out = sum((g * g.cos()).sum() for g in grads)
        return grads

    close(thrice(solve), thrice(exact))


def stacked(*inputs: Tensor) -> list[Tensor]:
    return [torch.stack([t, t / 2]) for t in inputs]


TRANSFORMS: dict[str, Any] = {
    "grad": lambda g, a, b: f.grad(g, (0, 1))(a, b),
    "vjp": lambda g, a, b: f.vjp(g, a, b)[1](torch.ones((), dtype=F64)),
    "jvp": lambda g, a, b: f.jvp(g, (a, b), (b, a)),
    "vmap": lambda g, a, b: f.vmap(g)(*stacked(a, b)),
    "vmap over one": lambda g, a, b: f.vmap(g, in_dims=(0, None))(stacked(a)[0], b),
    "vmap of grad": lambda g, a, b: f.vmap(f.grad(g, (0, 1)))(*stacked(a, b)),
    "grad of vmap": lambda g, a, b: f.grad(lambda a, b: f.vmap(g)(*stacked(a, b)).sum(), (0, 1))(
        a, b
    ),
    "vmap of jvp": lambda g, a, b: f.vmap(lambda a, b: f.jvp(g, (a, b), (b, a)))(*stacked(a, b)),
    "jvp of vmap": lambda g, a, b: f.jvp(f.vmap(g), tuple(stacked(a, b)), tuple(stacked(b, a))),
    "vmap of vmap": lambda g, a, b: f.vmap(lambda a: f.vmap(lambda b: g(a, b))(stacked(b)[0]))(
        stacked(a)[0]
    ),
    "hessian": lambda g, a, b: f.hessian(g, (0, 1))(a, b),
    "jacrev of jacrev": lambda g, a, b: f.jacrev(f.jacrev(g, (0, 1)), (0, 1))(a, b),
    "jacrev of jacfwd": lambda g, a, b: f.jacrev(f.jacfwd(g, (0, 1)), (0, 1))(a, b),
    "jacfwd of jacfwd": lambda g, a, b: f.jacfwd(f.jacfwd(g, (0, 1)), (0, 1))(a, b),
    "vmap of hessian": lambda g, a, b: f.vmap(f.hessian(g))(*stacked(a, b)),
    "third": lambda g, a, b: f.jacfwd(f.jacrev(f.grad(g)))(a, b),
    "third, forward": lambda g, a, b: f.jacfwd(f.jacfwd(f.jacfwd(g)))(a, b),
}


THIRD = ["third", "third, forward"]


@pytest.mark.parametrize(
    "transform",
    [pytest.param(t, marks=pytest.mark.slow if t in THIRD else ()) for t in TRANSFORMS],
)
@pytest.mark.parametrize("name", RULES)
def test_under_torch_func(name: str, transform: str) -> None:
    solve, exact = RULES[name]
    a, b = point()
    close(TRANSFORMS[transform](loss(solve), a, b), TRANSFORMS[transform](loss(exact), a, b))


@pytest.mark.parametrize("name", ["root", "fixed_point"])
def test_jacobians_of_a_vector(name: str) -> None:
    solve, exact = RULES[name]
    a, b = point()
    for jacobian in (f.jacrev, f.jacfwd, lambda g, i: f.vmap(f.jacrev(g, i))):
        given = stacked(a, b) if "lambda" in getattr(jacobian, "__name__", "") else (a, b)
        close(jacobian(solve, (0, 1))(*given), jacobian(exact, (0, 1))(*given))


# --- bilevel


def bilevel(theta: Tensor) -> Tensor:
    """min_y of a function of min_x of a function of y and theta."""

    def outer(y: Tensor) -> Tensor:
        x = by_scipy(
            lambda x: ((x - y * theta) ** 2).sum() + (x**4).sum() / 4, torch.zeros(2, dtype=F64)
        )
        return ((x - 1) ** 2).sum() + (y**2).sum() / 10

    return by_scipy(outer, torch.zeros(2, dtype=F64))


@pytest.mark.slow
def test_bilevel_in_bilevel() -> None:
    theta = torch.tensor([0.7, 1.3], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(bilevel, theta, atol=1e-4)
    close(f.jacfwd(bilevel)(theta.detach()), torch.autograd.functional.jacobian(bilevel, theta))


# --- the solver does not touch what is the caller's


def test_the_callers_grad_is_left_alone() -> None:
    net = nn.Linear(3, 1).double()
    data = fresh(10, 3, grad=False)

    def objective(x: Tensor) -> Tensor:
        return ((x - net(data).mean()) ** 2).sum() + (x**2).sum()

    x = lbfgs(objective, torch.zeros(2, dtype=F64))
    assert all(p.grad is None for p in net.parameters())
    close(x, (net(data).mean() / 2).expand(2))
    got = torch.autograd.grad(x.sum(), list(net.parameters()))
    close(got, torch.autograd.grad(net(data).mean(), list(net.parameters())))


def test_nothing_is_retained() -> None:
    gc.disable()
    try:
        big = torch.ones(1000, dtype=F64, requires_grad=True)
        x = by_scipy(lambda x: ((x - big.mean()) ** 2).sum(), torch.zeros(2, dtype=F64))  # noqa: F821 (deleted below)
        torch.autograd.grad(x.sum(), big)
        tensor, solution = weakref.ref(big), weakref.ref(x)
        del big, x
        assert solution() is None
        assert tensor() is None
    finally:
        gc.enable()


# --- structures


def test_pytrees_complex_and_arguments() -> None:
    @root(has_aux=True)
    def solve(fun: Any, x0: Any, *args: Any, steps: int, scale: Tensor, **shift: Any) -> Any:
        x = x0
        for _ in range(steps):
            r, _ = fun(x, *args, **shift)
            x = {"u": x["u"] - r["u"] * scale, "z": x["z"] - r["z"] * scale}
        return x, {"steps": steps}

    a, c, shift = fresh(2), fresh(3, dtype=torch.complex128), fresh()
    k = torch.tensor([1, 0, 1])  # odd: in one vector the complex numbers begin anywhere

    def fun(x: Any, c: Tensor, k: Tensor, shift: Tensor) -> Any:
        return {"u": x["u"] - a[k] * x["z"].real - shift, "z": 2 * x["z"] - c}, "aux"

    def exact() -> Any:
        z = c / 2
        return {"u": a[k] * z.real + shift, "z": z}

    x0 = {"u": torch.zeros(3, dtype=F64), "z": torch.zeros(3, dtype=torch.complex128)}
    scale = torch.tensor(0.5, dtype=F64, requires_grad=True)
    x, aux = solve(fun, x0, c, k, steps=80, scale=scale, shift=shift)
    assert aux == {"steps": 80}
    close(x, exact())
    total = lambda x: (x["z"].abs() ** 2 * 3).sum() + (x["u"] ** 2).sum()
    got = torch.autograd.grad(total(x), (a, c, shift, scale), allow_unused=True)
    close(got[:3], torch.autograd.grad(total(exact()), (a, c, shift)))
    assert got[3] is None
    assert solve.__name__ == "solve"


def test_a_batch_of_real_and_complex_unknowns() -> None:
    c, x0 = fresh(3, dtype=torch.complex128), torch.zeros(3, dtype=F64)
    solve = root(lambda fun, x0: {"u": c.detach().abs(), "z": c.detach()}, batch_dims=1)
    equations = lambda x: {"u": x["u"] - x["z"].abs(), "z": x["z"] - c}
    x = solve(equations, {"u": x0, "z": x0.to(c)})
    close(torch.autograd.grad(x["u"].sum(), c), torch.autograd.grad(c.abs().sum(), c))


def test_a_number_that_is_not_differentiable_and_no_captures() -> None:
    x = newton(lambda x: x**3 - 8, torch.ones(1, dtype=F64))
    close(x, torch.full((1,), 2.0, dtype=F64))
    assert not x.requires_grad
    with torch.no_grad():
        assert not by_root(fresh(3), fresh(3)).requires_grad


# --- linear systems


@pytest.mark.parametrize("kind", ["argmin", "root"])
@pytest.mark.parametrize("how", ["default", "own"])
def test_large_systems_without_a_matrix(kind: str, how: str) -> None:
    n = 300
    torch.manual_seed(1)
    m = torch.randn(n, n, dtype=F64) / n**0.5
    m = m @ m.T / 4 if kind == "argmin" else m / 4
    calls = 0

    def own(matvec: Any, b: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        u = torch.zeros_like(b)
        for _ in range(400):
            u = u + (b - matvec(u)) / 2
        return u

    options: dict[str, Any] = {} if how == "default" else {"linear_solve": own}
    theta = torch.randn(n, dtype=F64, requires_grad=True)

    def exact(theta: Tensor) -> Tensor:
        return torch.linalg.solve(torch.eye(n, dtype=F64) + m, theta.sin())

    def by_hand(fun: Any, x0: Tensor) -> Tensor:
        return exact(theta).detach()

    if kind == "argmin":
        x = argmin(by_hand, **options)(
            lambda x: x @ x / 2 + x @ (m @ x) / 2 - x @ theta.sin(), torch.zeros(n, dtype=F64)
        )
    else:
        x = root(by_hand, **options)(lambda x: x + m @ x - theta.sin(), torch.zeros(n, dtype=F64))
    weights = torch.linspace(0, 1, n, dtype=F64)

    def twice(x: Tensor) -> Any:
        (g,) = torch.autograd.grad((x * weights).sum(), theta, create_graph=True)
        return g, torch.autograd.grad((g**2).sum(), theta)[0]

    close(twice(x), twice(exact(theta)))
    assert (calls > 0) == (how == "own")


# --- failures


def test_not_converged() -> None:
    @argmin
    def lazy(fun: Any, x0: Tensor) -> Tensor:
        return x0

    a = fresh(3)

    def objective(x: Tensor) -> Tensor:
        return ((x - a) ** 2).sum()

    far = torch.ones(3, dtype=F64) * 9
    x = lazy(objective, far)
    same(x, far)
    with pytest.raises(
        NotASolutionError, match=r"lazy: the solver did not converge.*returned its starting point"
    ):
        torch.autograd.grad(x.sum(), a)
    with pytest.raises(NotASolutionError, match="did not converge"):
        f.jvp(lambda a: lazy(lambda x: ((x - a) ** 2).sum(), far), (a.detach(),), (far,))
    x = argmin(lazy.__wrapped__, on_failure="nan")(objective, far)
    assert torch.isnan(torch.autograd.grad(x.sum(), a)[0]).all()
    x = argmin(lazy.__wrapped__, check=False)(objective, far)
    close(torch.autograd.grad(x.sum(), a), [torch.ones(3, dtype=F64)])
    with pytest.raises(NotASolutionError, match="did not converge"):  # noqa: PT012
        n = 150
        w = torch.ones(n, dtype=F64, requires_grad=True)
        x = root(lazy.__wrapped__)(lambda x: x - w, torch.zeros(n, dtype=F64))
        torch.autograd.grad(x.sum(), w)


def test_not_finite() -> None:
    bad = root(lambda fun, x0: x0 / 0)
    a = fresh(3)
    x = bad(lambda x: x - a, torch.ones(3, dtype=F64))
    with pytest.raises(NotASolutionError, match="not finite"):
        torch.autograd.grad(x.sum(), a)


def test_singular() -> None:
    a = fresh(2)

    def fun(x: Tensor) -> Tensor:
        return torch.stack([x[0] + x[1], x[0] + x[1]]) - torch.stack([a[0], a[0]])

    def solver(fun: Any, x0: Tensor) -> Tensor:
        return x0 - fun(x0)[0] / 2

    x0 = torch.zeros(2, dtype=F64)
    x = root(solver)(fun, x0)
    with pytest.raises(SingularError, match="condition number"):
        torch.autograd.grad(x.sum(), a)
    x = root(solver, on_failure="nan")(fun, x0)
    assert torch.isnan(torch.autograd.grad(x.sum(), a)[0][0])
    x = root(solver, on_failure="least_squares")(fun, x0)
    close(torch.autograd.grad(x.sum(), a), [torch.tensor([1.0, 0.0], dtype=F64)])


def test_singular_without_a_matrix() -> None:
    n = 150
    a = fresh(n)

    def solve(**options: Any) -> Tensor:
        solver = root(lambda fun, x0: x0, **options)
        return solver(lambda x: x.roll(1) - x + a - a.detach(), torch.zeros(n, dtype=F64))

    with pytest.raises(SingularError, match="least_squares"):
        torch.autograd.grad(solve()[0], a)
    (unchecked,) = torch.autograd.grad(solve(check=False)[0], a)  # whatever the iteration gives
    assert unchecked.shape == a.shape


def test_equations_of_another_structure() -> None:
    """As many numbers as x has."""
    a = torch.tensor([4.0, 9.0], dtype=F64, requires_grad=True)
    solve = root(lambda fun, x0: {"p": x0["p"] + 1, "q": x0["q"] + 2})
    x = solve(
        lambda x: (torch.cat([x["p"], x["q"]]) ** 2 - a).flip(0)[:, None],
        {name: torch.ones(1, dtype=F64) for name in "pq"},
    )
    slope = torch.autograd.grad(x["p"].sum() + x["q"].sum(), a)[0]
    torch.testing.assert_close(slope, torch.tensor([1 / 4, 1 / 6], dtype=F64))


def test_wrong_structures() -> None:
    x0 = torch.zeros(2, dtype=F64)
    with pytest.raises(  # noqa: PT012
        StructureError, match=r"result of .*cut: x expected float64\[2\], got float64\[1\]"
    ):

        @root
        def cut(fun: Any, x0: Tensor) -> Tensor:
            return x0[:1]

        cut(lambda x: x, x0)
    with pytest.raises(StructureError, match="real scalar"):
        by_scipy(lambda x: x, x0)
    with pytest.raises(StructureError, match="<lambda> has 1 components for 2 unknowns"):
        newton(lambda x: x.sum(), x0)
    sparse, parts = (
        torch.eye(2, dtype=F64).to_sparse(),
        torch.nested.nested_tensor([x0, x0[:1]], layout=torch.jagged),
    )
    for start in ({"n": 3}, sparse, parts):
        with pytest.raises(StructureError, match=r"x0 expected .* neither sparse nor nested"):
            newton(lambda x: x, start)
    with pytest.raises(TypeError, match="a function and a starting point"):
        root(lambda fun: fun)
    with pytest.raises(StructureError, match=r"a solver returns .x, aux."):
        root(lambda fun, x0: x0, has_aux=True)(lambda x: (x, None), x0)
    with pytest.raises(ValueError, match="on_failure"):
        root(lambda fun, x0: x0, on_failure="ignore")
    with pytest.raises(StructureError, match=r"to return real or complex tensors, got .*None"):
        root(lambda fun, x0: (x0, None), has_aux=True)(lambda x: (x[0], None), x0)


class Iterate(torch.nn.Module):
    """A layer that solves by a method of its own, and holds a weight that only the solver reads."""

    def __init__(self, steps: int = 60) -> None:
        super().__init__()
        self.steps = steps
        self.inner = torch.nn.Linear(2, 2, dtype=F64)
        self.damping = torch.nn.Parameter(torch.tensor(0.9, dtype=F64))
        with torch.no_grad():
            self.inner.weight.mul_(0.3)
        self.held = fixed_point(self.run)

    def run(self, fun: Any, z: Tensor) -> Tensor:
        for _ in range(self.steps):
            z = z + self.damping * (fun(z) - z)
        return z

    solve = fixed_point(run)

    def forward(self, x: Tensor, name: str = "solve") -> Tensor:
        solve = getattr(self, name)
        return solve(lambda z: torch.tanh(self.inner(z) + x), torch.zeros_like(x))


@pytest.mark.parametrize("name", ["solve", "held"])
def test_methods(name: str) -> None:
    torch.manual_seed(1)
    net, x = Iterate(), torch.tensor([0.3, -0.2], dtype=F64)
    z = net(x, name)
    by_x = f.jacrev(lambda x: net(x, name))(x)
    slope = torch.diag(1 - z.detach() ** 2)
    close([by_x], [torch.linalg.solve(torch.eye(2) - slope @ net.inner.weight, slope)])
    z.sum().backward()
    assert net.inner.weight.grad is not None
    assert net.damping.grad is None  # how the fixed point is found does not move it
    net.steps = 0
    assert not net(x.detach(), name).any()  # read at the call


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["solve", "held"])
def test_copies_of_methods(name: str, copied: Any) -> None:
    net, x = Iterate(), torch.tensor([0.3, -0.2], dtype=F64)
    again = copied(net)
    net.steps = 0
    again(x, name).sum().backward()
    assert again.inner.weight.grad is not None
    assert net.inner.weight.grad is None


def test_arguments_have_the_solver_s_names() -> None:
    @root
    def halve(equation: Any, start: Tensor, args: Any = None) -> Tensor:
        assert args == ()
        return equation(start) * 0 + 2.0 * torch.ones_like(start)

    a, one = fresh().detach().abs().requires_grad_(), torch.ones((), dtype=F64)
    x = halve(start=one, equation=lambda x: x**2 - 4 * a / a.detach(), args=None)
    close(torch.autograd.grad(x, a), [1 / a.detach()])
    close([Iterate.solve(Iterate(), lambda z: z / 2 + 1, one)], [2 * one])


def test_errors_of_the_solver_reach_the_caller() -> None:
    @root
    def failing(fun: Any, x0: Tensor) -> Tensor:
        message = "of my own"
        raise ValueError(message)

    with pytest.raises(ValueError, match="of my own"):
        failing(lambda x: x - 1, torch.ones(2))


# --- found by trying to break it


def test_aux_of_a_batch() -> None:
    """Each element has its own; a transform inside or outside of the batch sees the right one."""

    def solver(fun: Any, x0: Tensor) -> Any:
        x = x0 - fun(x0)[0]
        return x, {"double": x * 2, "count": torch.tensor(len(x)), "name": "one step", "no": None}

    solve = root(solver, has_aux=True)
    zero = torch.zeros(3, dtype=F64)

    def both(b: Tensor) -> Any:
        return solve(lambda x: (x - b, None), zero)

    def loss(b: Tensor) -> Any:
        x, aux = both(b)
        return (x**2).sum() + aux["double"].sum(), aux["double"]  # aux adds no derivative

    b = fresh(4, 2, 3).detach()
    pick = lambda x, aux: (x, aux["double"], aux["count"])
    found = f.vmap(f.vmap(lambda b: pick(*both(b))))(b)
    close(list(found), [b, 2 * b, torch.full((4, 2), 3)])
    close(list(f.vmap(f.grad(loss, has_aux=True))(b[0])), [2 * b[0], 2 * b[0]])
    close(list(f.vmap(f.vmap(f.grad(loss, has_aux=True)))(b)), [2 * b, 2 * b])
    close(
        list(f.jacrev(f.vmap(lambda b: both(b)[1]["double"]))(b[0])),
        list(torch.zeros(2, 3, 2, 3, dtype=F64)),
    )
    primal, tangent = f.jvp(lambda b: loss(b)[0], (b[0, 0],), (b[1, 0],))
    close([primal, tangent], [(b[0, 0] ** 2).sum() + 2 * b[0, 0].sum(), 2 * b[0, 0] @ b[1, 0]])
    w = b[0, 0].clone().requires_grad_()
    _, aux = both(w)
    assert (aux["name"], aux["no"], aux["double"].requires_grad) == ("one step", None, False)


def test_aux_that_is_no_tensor_is_one_for_a_batch() -> None:
    solve = root(lambda fun, x0: (x0 - fun(x0)[0], float(fun(x0)[0])), has_aux=True)
    zero = torch.zeros((), dtype=F64)
    run = f.vmap(lambda b: solve(lambda x: (x - b, None), zero)[0])
    close([run(torch.ones(2, dtype=F64))], [torch.ones(2, dtype=F64)])
    with pytest.raises(
        StructureError, match=r"got -1\.0 and -2\.0\. Return what differs as tensors"
    ):
        run(torch.tensor([1.0, 2.0], dtype=F64))


def test_an_option_that_there_is_not() -> None:
    expected = "argmin: expected the options has_aux, .*, got chek. Did you mean check"
    with pytest.raises(TypeError, match=expected):
        argmin(lambda _, x0: x0, chek=False)


def test_nothing_unknown() -> None:
    a = fresh(3)
    x = root(lambda fun, x0: x0 - fun(x0))(lambda x: x - a[:0], torch.zeros(0, dtype=F64))
    assert x.shape == (0,)
    assert not torch.autograd.grad(x.sum(), a)[0].any()


@pytest.mark.parametrize("n", [3, 600])
def test_tensors_without_numbers(n) -> None:
    """A model on the device "meta" has shapes, and so have its derivatives."""
    with torch.device("meta"):
        lin = torch.nn.Linear(n, n)
        x0 = torch.zeros(n)
    for rule in (root, fixed_point, argmin):
        x = rule(lambda fun, x0: x0)(
            (lambda x: (x - lin(x)).square().sum()) if rule is argmin else lin, x0
        )
        grads = torch.autograd.grad(x.sum(), list(lin.parameters()))
        assert [(g.shape, g.is_meta) for g in grads] == [((n, n), True), ((n,), True)]


def test_half_precision() -> None:
    a = torch.tensor([2.0, 3.0], dtype=torch.bfloat16, requires_grad=True)
    x = root(lambda fun, x0: x0 - fun(x0))(lambda x: 2 * x - 2 * a, a.detach())
    (g,) = torch.autograd.grad(x.sum(), a)
    assert g.dtype is torch.bfloat16
    assert torch.equal(g, torch.ones_like(g))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compile_around() -> None:
    a = fresh(3)
    fun = torch.compile(lambda a: by_root(a, a).sum() * 2, backend="eager")
    close(torch.autograd.grad(fun(a), a), torch.autograd.grad(2 * by_root(a, a).sum(), a))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_derivatives_inside_of_what_is_compiled() -> None:
    """The backward pass of a rule, and the rest of its call under a transform, is not compiled.
    (The rest of a function of the user's under one is, and PyTorch cannot.)"""
    solve = root(lambda fun, x0: torch.full((2,), 2.0, dtype=F64))
    one, integrate = (
        torch.ones((), dtype=F64),
        fv.integral(lambda fun, a, b: fun((a + b) / 2) * (b - a)),
    )
    x: Any = lambda a: solve(lambda x: x**2 - a, torch.ones(2, dtype=F64))
    ones = torch.ones(2, dtype=F64)
    programs: dict[str, Any] = {
        "backward": (lambda a: torch.autograd.grad(x(a).sum(), a)[0] + 0, ones / 4),
        "second": (
            lambda a: torch.autograd.grad(
                torch.autograd.grad(x(a).sum(), a, create_graph=True)[0].sum(), a
            )[0],
            -ones / 32,
        ),
        "jacrev": (f.jacrev(x), torch.eye(2, dtype=F64) / 4),
        "jvp": (lambda a: f.jvp(x, (a,), (a,))[1], ones),
        "of an integral": (
            f.grad(lambda a: integrate(lambda t: t * a.sum(), 0 * one, one)),
            ones / 2,
        ),
    }
    for program, expected in programs.values():
        torch._dynamo.reset()
        a = torch.full((2,), 4.0, dtype=F64, requires_grad=True)
        close(torch.compile(program, backend="eager")(a).detach(), expected)


def test_the_solution_may_be_written_to() -> None:
    """What the backward pass needs of it is its own."""
    a, zero = fresh(2), torch.zeros(2, dtype=F64)
    x = newton(lambda x: x**3 + x - a, zero)
    before = x.detach().clone()
    x.add_(1)
    close(x, before + 1)
    close(torch.autograd.grad(x.sum(), a)[0], 1 / (3 * before**2 + 1))


def test_a_linear_solve_that_does_not_solve() -> None:
    a, zero = fresh(3), torch.zeros(3, dtype=F64)
    for wrong in (lambda _, b: b / 2, lambda _, b: b * float("nan")):
        x = root(newton.__wrapped__, linear_solve=wrong)(lambda x: x**3 + x - a, zero)
        with pytest.raises((SingularError, NotASolutionError)):
            torch.autograd.grad(x.sum(), a)
    # A caller may mean it: one step of a series in place of the solution.
    x = root(newton.__wrapped__, linear_solve=lambda _, b: b, check=False)(
        lambda x: x**3 + x - a, zero
    )
    close(torch.autograd.grad(x.sum(), a), [torch.ones(3, dtype=F64)])


SEEN = torch.tensor(2.0, dtype=F64, requires_grad=True)


def gradient_step(fun: Any, x0: Tensor, through: Tensor) -> Tensor:
    """Half a step from `x0`, by a backward pass that also runs through another tensor."""
    x = x0.clone().requires_grad_()
    (fun(x) + through.sum()).backward()
    return x0 - x.grad / 2


class Steps:
    """A solver that holds an optimizer of a parameter of its own."""

    def __init__(self, p: Tensor) -> None:
        self.optimizer = torch.optim.SGD([p], lr=0.5)

    def __call__(self, fun: Any, x0: Tensor) -> Tensor:
        (p,) = self.optimizer.param_groups[0]["params"]
        with torch.no_grad():
            p.copy_(x0)
        self.optimizer.zero_grad()
        fun(p).backward()
        self.optimizer.step()
        return p


class Holder:
    """An option that is no pytree."""

    def __init__(self, t: Tensor) -> None:
        self.t = t


def failing(fun: Any, x0: Tensor) -> Tensor:
    gradient_step(fun, x0, SEEN)
    message = "of my own"
    raise ValueError(message)


@pytest.mark.parametrize("before", [None, 5.0])
def test_what_a_solver_reaches_itself_keeps_its_grad(before: float | None) -> None:
    a, leaf, behind = fresh(3), fresh(3), fresh(3)
    kept = behind.sin()
    kept.retain_grad()
    watched = (leaf, behind, kept, SEEN)
    grads = [None if before is None else torch.full_like(t, before) for t in watched]
    for t, grad in zip(watched, grads, strict=True):
        t.grad = grad
    objective = lambda x: ((x - a) ** 2).sum()
    zero = torch.zeros(3, dtype=F64)
    of_global = argmin(lambda fun, x0: gradient_step(fun, x0, SEEN))
    of_closure = argmin(lambda fun, x0: gradient_step(fun, x0, kept * 2))
    of_option = argmin(lambda fun, x0, held: gradient_step(fun, x0, held.t))
    solves: list[Any] = [
        lambda: of_global(objective, zero),
        lambda: argmin(Steps(leaf))(objective, zero),
        lambda: of_option(objective, zero, Holder(leaf)),
        lambda: of_option(objective, zero, held=Holder(behind.cos())),
        lambda: f.vmap(lambda a: of_global(lambda x: ((x - a) ** 2).sum(), zero))(a[None])[0],
        lambda: of_closure(objective, zero),
    ]
    for solve in solves:
        x = solve()
        close(x, a)
        assert all(t.grad is grad for t, grad in zip(watched, grads, strict=True))
        # What the solver captures has no derivative: the solution does not depend on it.
        got = torch.autograd.grad(x.sum(), [a, SEEN, leaf, behind], allow_unused=True)
        close(got[0], torch.ones(3, dtype=F64))
        assert got[1:] == (None, None, None)
    with pytest.raises(ValueError, match="of my own"):
        argmin(failing)(objective, zero)
    for t, grad in zip(watched, grads, strict=True):
        assert t.grad is grad
        assert grad is None or bool((grad == before).all())


def test_what_a_converted_call_gives_a_solver_keeps_its_grad() -> None:
    a, other, zero = fresh(3), fresh(), torch.zeros(3, dtype=F64)
    of_global = argmin(lambda fun, x0: gradient_step(fun, x0, SEEN))
    fun = lambda x0: of_global(lambda x: ((x - a) ** 2).sum(), x0)
    SEEN.grad = None
    converted, hoisted = closure_convert(fun, zero)
    given = [other if h.data_ptr() == SEEN.data_ptr() else h for h in hoisted]
    assert len(given) == 2
    x = converted(zero, *given)
    close(x, a)
    assert (a.grad, other.grad, SEEN.grad) == (None, None, None)
    close(torch.autograd.grad(x.sum(), a), [torch.ones(3, dtype=F64)])
