"""What each of two processes checks; started by `test_distributed.py` with torchrun, on CPU (gloo).

Every check compares with one process that has all data and all parameters.
"""

import copy
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import freevars.torch as fv
from freevars.torch._rules.coupling import check_shared

F64 = torch.float64


@fv.argmin
def descend(fun: Any, x0: Tensor) -> Tensor:
    x = x0.clone().requires_grad_()
    for _ in range(100):
        (g,) = torch.autograd.grad(fun(x), x)
        x = (x - 0.4 * g).detach().requires_grad_()
    return x.detach()


def whole(t: Any) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def same(got: Iterable[Any], expected: Iterable[Any]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a is not None, "no gradient"
        assert torch.allclose(whole(a).detach(), whole(b).detach(), atol=1e-8), (a, b)


class Setting:
    """One network in each process, all data, and the share of this process."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.rank = dist.get_rank()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(F64)
        self.plain = copy.deepcopy(self.net)
        self.data = torch.randn(16, 4, dtype=F64)
        n = 16 // dist.get_world_size()
        self.mine = self.data[dist.get_rank() * n :][:n]
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def gradients(self, loss: Callable[[nn.Module, Tensor], Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(loss(self.plain, self.data), list(self.plain.parameters()))

    def mean_of_processes(self, loss: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        found = []
        for g in torch.autograd.grad(loss(self.plain, self.mine), list(self.plain.parameters())):
            total = g.clone()
            dist.all_reduce(total)
            found.append(total / dist.get_world_size())
        return found


def loss(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) ** 2).mean()


def minimum(net: nn.Module, x: Tensor) -> Tensor:
    """Of (y - m)^2 + 0.1 y^2, where m is the mean output; squared."""
    m = descend(lambda y: ((y - net(x).mean()) ** 2 + 0.1 * y**2).sum(), torch.zeros(1, dtype=F64))
    return (m**2).sum()


def minimum_by_hand(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x).mean() / 1.1) ** 2


def both_passes(s: Setting, net: nn.Module) -> None:
    """Gradients of a converted function and of a rule arrive in .grad, as without freevars."""
    parameters = list(s.net.parameters())
    converted, hoisted = fv.closure_convert(lambda x: loss(net, x), s.mine)
    assert len(hoisted) == 4
    for _ in range(2):
        s.net.zero_grad()
        converted(s.mine, *hoisted).backward()
        same([p.grad for p in parameters], s.gradients(loss))
    s.net.zero_grad()
    minimum(net, s.mine).backward()
    same([p.grad for p in parameters], s.mean_of_processes(minimum_by_hand))
    s.net.zero_grad()
    loss(net, s.mine).backward()  # a step without freevars afterwards
    same([p.grad for p in parameters], s.gradients(loss))


def check_data_parallel(s: Setting) -> None:
    net = DistributedDataParallel(s.net)
    both_passes(s, net)
    names = [v.name for v in fv.captures(lambda x: net(x), s.mine).values]
    assert names == [f"net.module[{i}].{kind}" for i in (0, 2) for kind in ("weight", "bias")], (
        names
    )


def check_fully_sharded(s: Setting) -> None:
    net = s.net
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=s.mesh)
    both_passes(s, net)
    converted, hoisted = fv.closure_convert(lambda x: loss(net, x), s.mine)
    assert all(h is p for h, p in zip(hoisted, net.parameters(), strict=True))
    names = [v.name for v in fv.captures(lambda x: net(x), s.mine).values]
    assert names == [f"net[{i}].{kind}" for i in (0, 2) for kind in ("weight", "bias")], names
    try:
        converted(s.mine, *(2 * h for h in hoisted))
    except fv.CaptureError as error:
        assert "parameters of a sharded module" in str(error)  # noqa: PT017 (no pytest here)
    else:
        message = "other values than its own were taken"
        raise AssertionError(message)
    closure = fv.Closure(lambda x: loss(net, x), s.mine)
    same([closure(s.mine)], [loss(s.plain, s.mine)])


def check_collectives(s: Setting) -> None:
    def mean(x: Tensor) -> Tensor:
        return collectives.all_reduce(s.plain(x).mean()) / dist.get_world_size()

    converted, hoisted = fv.closure_convert(mean, s.mine)
    total = []
    for g in torch.autograd.grad(converted(s.mine, *hoisted), hoisted):
        total.append(g.clone())
        dist.all_reduce(total[-1])
    same([t / dist.get_world_size() for t in total], s.gradients(lambda net, x: net(x).mean()))

    def fun(y: Tensor) -> Tensor:
        return ((y - mean(s.mine)) ** 2 + 0.1 * y**2).sum()

    y = descend(fun, torch.zeros(1, dtype=F64))
    total = []
    for g in torch.autograd.grad((y**2).sum(), list(s.plain.parameters())):
        total.append(g.clone())
        dist.all_reduce(total[-1])
    same([t / dist.get_world_size() for t in total], s.gradients(minimum_by_hand))


def check_unknowns_of_several_processes(s: Setting) -> None:
    """One system spans the processes where a collective couples unknowns that differ: refused by
    all of them. Where nothing is coupled each solves its own, whatever else is summed."""
    rank = dist.get_rank()
    w = torch.tensor([0.2, 0.3 + rank, -0.1], dtype=F64).requires_grad_()
    for n in (3, 600):
        zero = torch.zeros(n, dtype=F64)
        weights = w.repeat(n // 3) / 4
        x = fv.fixed_point(iterate)(lambda x, b=weights: b + _mean_of_all(x).cos() / 4, zero)
        try:
            torch.autograd.grad(x.sum(), w)
        except NotImplementedError as error:
            assert "Make the unknown a DTensor" in str(error)  # noqa: PT017 (no pytest here)
        else:
            message = "a system that spans the processes was solved in one"
            raise AssertionError(message)
        shared = collectives.all_reduce(w.sum()) / 4
        x = fv.fixed_point(iterate)(lambda x, b=weights, c=shared: b * _Cosine.apply(x) + c, zero)
        (g,) = torch.autograd.grad(x.sum(), w, retain_graph=True)
        y = zero
        for _ in range(40):
            y = weights * y.cos() + shared
        same([g], torch.autograd.grad(y.sum(), w))


def check_one_unknown_of_several_processes(s: Setting) -> None:
    """Each process has a part of the equations: the system is the same in all where x is averaged
    backward, and only there."""
    n = dist.get_world_size()
    weights = torch.tensor([0.5, 0.9], dtype=F64)
    a, parts = weights[s.rank].clone().requires_grad_(), weights.clone().requires_grad_()
    k = torch.arange(1, 4, dtype=F64)

    def mine(x: Tensor) -> Tensor:
        return collectives.all_reduce((a * k * x).tanh()) / n / 2 + 1

    solve, zero = fv.fixed_point(iterate), torch.zeros(3, dtype=F64)
    x = solve(lambda x: mine(collectives.all_reduce(x) / n), zero)
    expected = solve(lambda x: sum((p * k * x).tanh() for p in parts) / n / 2 + 1, zero)
    (whole,) = torch.autograd.grad(expected.sum(), parts)
    same(torch.autograd.grad(x.sum(), a), [n * whole[s.rank]])  # each process has a sum of its own
    try:
        torch.autograd.grad(solve(mine, zero).sum(), a)
    except NotImplementedError as error:
        assert "derivatives by it that differ" in str(error)  # noqa: PT017 (no pytest here)
    else:
        message = "a part of the derivative by the unknown was taken for the whole"
        raise AssertionError(message)


class _OfTheFirst(torch.autograd.Function):
    """What the first process has, in all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        x = x.clone()
        dist.broadcast(x, 0)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        del ctx
        g = g.clone()
        dist.all_reduce(g)
        return g if dist.get_rank() == 0 else torch.zeros_like(g)


def check_a_loss_of_each_process(s: Setting) -> None:
    """Of one unknown: by a matrix each process solves for its own share. An iteration needs one
    right side in all, or the processes would take different steps."""
    n_processes = dist.get_world_size()

    def mean(x: Tensor) -> Tensor:
        return collectives.all_reduce(x) / n_processes

    for n in (3, 600):
        torch.manual_seed(2)
        a, weights = torch.rand(2, n, dtype=F64), torch.randn(2, n, dtype=F64)
        mine, all_of_it = a[s.rank].clone().requires_grad_(), a.clone().requires_grad_()
        solve, zero = fv.fixed_point(iterate), torch.zeros(n, dtype=F64)
        x = solve(lambda x, a=mine: mean((a * mean(x)).cos()) / 2, zero)
        y = solve(lambda y, a=all_of_it: (a * y).cos().mean(0) / 2, zero)
        (expected,) = torch.autograd.grad((weights.sum(0) * y).sum(), all_of_it)
        same(
            torch.autograd.grad((weights[s.rank] * mean(x)).sum(), mine, retain_graph=True),
            [expected[s.rank]],
        )
        try:
            found = torch.autograd.grad((weights[s.rank] * x).sum(), mine)
        except NotImplementedError as error:
            assert "got one of its own in each" in str(error)  # noqa: PT017 (no pytest here)
            assert n > 3
        else:
            assert n == 3
            same(found, [expected[s.rank]])


def check_a_coupling_in_one_direction(s: Setting) -> None:
    """The process that all depend on refuses; nobody waits for the other, which finds nothing."""
    x = torch.full((1, 3), 1.0 + s.rank, dtype=F64, requires_grad=True)
    try:
        check_shared(x, _OfTheFirst.apply(x).tanh() - x, "solve")
    except NotImplementedError as error:
        assert "unknowns that differ" in str(error)  # noqa: PT017 (no pytest here)
        assert s.rank == 0
    else:
        assert s.rank == 1


def _mean_of_all(x: Tensor) -> Tensor:
    return collectives.all_reduce(x.mean()) / dist.get_world_size()


class _Cosine(torch.autograd.Function):
    """A function of one's own, of which nobody can tell whether it communicates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.cos()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return -g * x.sin()


def check_captured_dtensor(s: Setting) -> None:
    w, x = torch.rand(8, dtype=F64) + 1, torch.randn(8, dtype=F64)
    shared = distribute_tensor(w, s.mesh, [Shard(0)]).requires_grad_()
    x_shared = distribute_tensor(x, s.mesh, [Shard(0)])
    converted, hoisted = fv.closure_convert(lambda x: (shared * x**2).sum(), x_shared)
    (g,) = torch.autograd.grad(converted(x_shared, *hoisted), hoisted)
    assert isinstance(g, DTensor)
    same([g], [x**2])
    twice = (2 * shared).detach().requires_grad_()
    same([converted(x_shared, twice)], [(2 * w * x**2).sum()])
    y = descend(
        lambda y: ((y - (shared * x_shared).sum().full_tensor()) ** 2 + 0.1 * y**2).sum(),
        torch.zeros(1, dtype=F64),
    )
    same(torch.autograd.grad(y.sum(), shared), [x / 1.1])


def iterate(fun: Any, x0: Any) -> Any:
    """40 fixed-point iterations of a pytree."""
    for _ in range(40):
        x0 = torch.utils._pytree.tree_map(lambda t: t.detach(), fun(x0))
    return x0


def check_dtensor_unknown(s: Setting) -> None:
    """Of any placement, beside plain tensors, with captured DTensors; all orders."""
    for shape, placements in (
        ((7,), [Shard(0)]),
        ((3, 4), [Shard(1)]),
        ((3,), [Replicate()]),
        ((600,), [Shard(0)]),  # more than are solved by a matrix
    ):
        torch.manual_seed(1)
        w, b = torch.rand(shape, dtype=F64) / 2, torch.randn(shape, dtype=F64)
        shared = distribute_tensor(w, s.mesh, placements).requires_grad_()
        plain = w.clone().requires_grad_()
        solve = fv.fixed_point(iterate)

        def coupled(w: Tensor, b: Tensor) -> Any:
            return lambda x: 0.5 * w * x.cos() + b + 0.1 * x.mean()

        zero = distribute_tensor(torch.zeros_like(w), s.mesh, placements)
        x = solve(coupled(shared, distribute_tensor(b, s.mesh, placements)), zero)
        assert isinstance(x, DTensor)
        assert x.placements == tuple(placements)
        expected = solve(coupled(plain, b), torch.zeros_like(w))
        same([x], [expected])
        (g,) = torch.autograd.grad((x**2).sum(), shared, create_graph=True)
        (h,) = torch.autograd.grad((expected**2).sum(), plain, create_graph=True)
        assert isinstance(g, DTensor)
        same([g], [h])
        if w.numel() < 10:
            same(
                torch.autograd.grad((g**2).sum(), shared),
                torch.autograd.grad((h**2).sum(), plain),
            )


def check_matrices(s: Setting) -> None:
    """A Jacobian that holds nothing but exchanges: PyTorch does not wait for them in a batched
    backward pass."""
    b = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    shared = distribute_tensor(b, s.mesh, [Shard(0)]).requires_grad_()
    zero = distribute_tensor(torch.zeros_like(b), s.mesh, [Shard(0)])
    x = fv.root(lambda fun, x0: x0 - fun(x0))(lambda x: x - 2 * shared, zero)
    same(torch.autograd.grad((x**2).sum(), shared), [8 * b])


def check_mixed_unknown(s: Setting) -> None:
    """A DTensor beside a plain tensor, which is the same in each process."""
    a, c = torch.rand(5, dtype=F64), torch.tensor(0.3, dtype=F64)

    def fun(a: Tensor, c: Tensor, as_dtensor: Any = lambda t: t) -> Any:
        return lambda x: {
            "d": a * as_dtensor(x["p"]).cos(),
            "p": c * whole((x["d"] ** 2).sum()),
        }

    shared = distribute_tensor(a, s.mesh, [Shard(0)]).requires_grad_()
    values = [shared, c.clone().requires_grad_()]
    plain = [a.clone().requires_grad_(), c.clone().requires_grad_()]
    zero = torch.zeros((), dtype=F64)
    solve = fv.fixed_point(iterate, polish=True)

    x0 = {"d": torch.zeros(5, dtype=F64), "p": zero}
    expected = solve(fun(*plain), x0)

    def as_dtensor(p: Tensor) -> Tensor:
        return DTensor.from_local(p, s.mesh, [Replicate()], run_check=False)

    x = solve(
        fun(*values, as_dtensor), {"d": distribute_tensor(x0["d"], s.mesh, [Shard(0)]), "p": zero}
    )
    same([x["d"], x["p"]], [expected["d"], expected["p"]])
    grads = torch.autograd.grad((x["d"] ** 2).sum().full_tensor() + x["p"], values)
    same(grads, torch.autograd.grad((expected["d"] ** 2).sum() + expected["p"], plain))


def check_refusal_everywhere(s: Setting) -> None:
    """What is no solution is refused in every process: none waits for the other."""
    a = distribute_tensor(torch.rand(3, dtype=F64), s.mesh, [Shard(0)]).requires_grad_()
    stay = fv.root(lambda fun, x0: x0 + 0 * fun(x0).detach())
    x = stay(
        lambda x: x**2 - a, distribute_tensor(2 * torch.ones(3, dtype=F64), s.mesh, [Shard(0)])
    )
    try:
        torch.autograd.grad(x.sum(), a)
    except fv.NotASolutionError:
        return
    message = "a point that is no solution was taken"
    raise AssertionError(message)


CHECKS = (
    check_data_parallel,
    check_fully_sharded,
    check_collectives,
    check_unknowns_of_several_processes,
    check_one_unknown_of_several_processes,
    check_a_loss_of_each_process,
    check_a_coupling_in_one_direction,
    check_captured_dtensor,
    check_dtensor_unknown,
    check_matrices,
    check_mixed_unknown,
    check_refusal_everywhere,
)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    failed = 0
    for check in (c for c in CHECKS if not sys.argv[1:] or c.__name__ in sys.argv[1:]):
        try:
            check(Setting())
            sys.stdout.write(f"passed {check.__name__}\n")
        except Exception:  # noqa: BLE001 (each is told, and the other process must not wait)
            failed += 1
            sys.stdout.write(f"failed {check.__name__} in process {os.environ['RANK']}\n")
            traceback.print_exc()
            break  # the processes are out of step now
    dist.destroy_process_group()
    sys.stdout.flush()
    # An interpreter that ends by itself aborts now and then on the threads of gloo.
    os._exit(failed)


if __name__ == "__main__":
    main()
