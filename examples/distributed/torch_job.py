"""Hyperparameters tuned on data that no process has whole, in PyTorch.

    torchrun --nproc-per-node=2 examples/distributed/torch_job.py

Each process holds its share of the training data, and all take the same steps. A value that all of
them have enters a process's share of the work through ``enter``, and the shares are summed by
``leave``; each is the transpose of the other. Process 0 has all the data as well, and compares.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import softplus

import freevars.torch as fv

STEPS, RATE, ROWS = 10, 50.0, 320


class Enter(torch.autograd.Function):
    """A value that all processes have, on its way into each one's share."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, g: Tensor) -> Tensor:
        return Leave.apply(g)


class Leave(torch.autograd.Function):
    """The sum of the shares, in every process."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, g: Tensor) -> Tensor:
        return Enter.apply(g)


@fv.argmin
def newton(fun, w0):
    w = w0
    for _ in range(10):
        w = w.detach().requires_grad_()
        (slope,) = torch.autograd.grad(fun(w), w)
        curvature = torch.autograd.functional.hessian(fun, w.detach())
        w = w - torch.linalg.solve(curvature, slope)
    return w.detach()


def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return softplus(-y * (x @ w)).sum()


def tune(train, valid, *, shared: bool) -> tuple[Tensor, list[float]]:
    enter, leave = (Enter.apply, Leave.apply) if shared else (lambda x: x, lambda x: x)

    def fit(log_ridge: Tensor) -> Tensor:
        penalty = lambda w: log_ridge.exp() @ w**2
        objective = lambda w: (leave(loss(enter(w), *train)) + penalty(w)) / ROWS
        return newton(objective, torch.zeros(30))

    log_ridge, losses = torch.zeros(30, requires_grad=True), []
    for _ in range(STEPS):
        value = loss(fit(log_ridge), *valid) / len(valid[0])
        (slope,) = torch.autograd.grad(value, log_ridge)
        log_ridge = (log_ridge - RATE * slope).detach().requires_grad_()
        losses.append(value.item())
    return log_ridge.detach(), losses


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    count, index = dist.get_world_size(), dist.get_rank()
    features, labels = load_breast_cancer(return_X_y=True)
    x = torch.tensor(StandardScaler().fit_transform(features))
    y = torch.tensor(2.0 * labels - 1.0)
    mine = slice(index * ROWS // count, (index + 1) * ROWS // count)
    valid = (x[ROWS:], y[ROWS:])
    found, losses = tune((x[:ROWS][mine], y[:ROWS][mine]), valid, shared=True)
    status = 0
    if index == 0:
        alone, _ = tune((x[:ROWS], y[:ROWS]), valid, shared=False)
        error = float((found - alone).abs().max() / alone.abs().max())
        print(f"{count} processes: {losses[0]:.4f} to {losses[-1]:.4f}")
        print(f"against one process with all the data: relative difference {error:.1e}")
        status = int(not (error < 1e-6 and losses[-1] < losses[0]))
    dist.destroy_process_group()
    sys.stdout.flush()
    # An interpreter that ends by itself aborts now and then on the threads of gloo.
    os._exit(status)


if __name__ == "__main__":
    main()
