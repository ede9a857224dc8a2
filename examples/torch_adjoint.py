"""A neural differential equation whose field is a plain closure, by torchdiffeq's solver.

    python examples/torch_adjoint.py

torchdiffeq's own adjoint takes an `nn.Module`, so that it can find the parameters. Here the field
is a lambda over two matrices and a driving frequency, and the gradient reaches all three; a
backward pass keeps no steps, and costs the same memory for ten steps as for ten thousand. A spiral
is learned from points on it. Checks: torchdiffeq's gradient through its steps, the loss after
training, and how much is saved for the backward pass.

Source: Chen et al. 2018, "Neural Ordinary Differential Equations".
"""

# %%
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torchdiffeq import odeint as dopri5

import freevars.torch as fv

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

TIMES = torch.linspace(0.0, 2.0, 4)
START = torch.tensor([2.0, 0.0])
SPIRAL = torch.tensor([[-0.2, 1.5], [-1.5, -0.2]])

solve = fv.odeint(dopri5)


# %%
def trajectory(
    solver, inner: Tensor, outer: Tensor, frequency: Tensor, times: Tensor = TIMES
) -> Tensor:
    field = lambda t, y: outer @ torch.tanh(inner @ y) + 0.1 * torch.cos(frequency * t)
    return solver(field, START, times, rtol=1e-5, atol=1e-7)


def saved_for_backward(solver, weights: list[Tensor]) -> int:
    """How many numbers the graph of one solve holds."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        trajectory(solver, *weights)
    return sum(sizes)


# %%
seen = dopri5(lambda _, y: SPIRAL @ y, START, TIMES, rtol=1e-9, atol=1e-9)
weights = [0.5 * torch.randn(4, 2), 0.5 * torch.randn(2, 4), torch.tensor(1.0)]
weights = [w.requires_grad_() for w in weights]

loss = lambda solver: ((trajectory(solver, *weights) - seen) ** 2).mean()
through_steps = torch.autograd.grad(loss(dopri5), weights)
by_adjoint = torch.autograd.grad(loss(solve), weights)
saved = [saved_for_backward(solver, weights) for solver in (dopri5, solve)]
print("saved for the backward pass:", saved[0], "numbers through the steps,", saved[1], "here")

first = float(loss(dopri5).detach())
optimizer = torch.optim.Adam(weights, lr=0.1)
for _ in range(12):
    optimizer.zero_grad()
    loss(solve).backward()
    optimizer.step()
last = float(loss(dopri5).detach())
print(f"mean squared distance from the spiral: {first:.3f} before, {last:.3f} after 12 steps")

checks = {
    "the gradient is that through the steps": all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5)
        for a, b in zip(by_adjoint, through_steps, strict=True)
    ),
    "less than a tenth is saved": saved[1] < saved[0] / 10,
    "the loss fell": last < first / 3,
}

# %%
times = torch.linspace(0.0, 2.0, 60)
with torch.no_grad():
    learned = trajectory(dopri5, *weights, times=times)
plt.figure(figsize=(5, 4), layout="constrained")
plt.plot(*seen.T, "o", label="seen")
plt.plot(*learned.T, label="learned")
plt.gca().set_aspect("equal")
plt.legend()
plt.show()

# %%
for what, holds in checks.items():
    print(f"{what}: {holds}")
if not all(checks.values()):
    raise SystemExit("a check failed")
