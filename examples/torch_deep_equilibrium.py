"""A deep-equilibrium layer in PyTorch, trained with torch.optim.

    python examples/torch_deep_equilibrium.py

The layer of deep_equilibrium.py as a `torch.nn.Module`: its output is the fixed point of a small
network, and `.backward()` solves one linear system there, of a small block for each example
(`batch_dims=1`). The lambda captures the module, whose parameters get their gradients.
"""

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

import freevars.torch as fv

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)

WIDTH, STEPS = 12, 60


@fv.fixed_point(batch_dims=1)
def iterate(fun, z):
    """Apply ``fun`` until nothing moves any more."""
    for _ in range(500):
        before, z = z, fun(z)
        if (z - before).abs().max() < 1e-10:
            break
    return z


# %%
class Network(nn.Module):
    """A deep-equilibrium layer, and a score on top."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Parameter(0.2 * torch.randn(WIDTH, WIDTH))
        self.enter = nn.Linear(2, WIDTH)
        self.leave = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Scaled to norm 0.9 at most, the map is a contraction and has one fixed point.
        w = self.again * (0.9 / self.again.norm()).clamp(max=1.0)
        entered = self.enter(x)
        z = iterate(lambda z: torch.tanh(z @ w.T + entered), torch.zeros(len(x), WIDTH))
        return self.leave(z)[:, 0]


def loss(model: Network, x: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.softplus(-labels * model(x)).mean()


# %%
x, labels = map(torch.tensor, make_moons(200, noise=0.1, random_state=0))
labels = 2.0 * labels - 1.0
model = Network()
before = loss(model, x, labels)
slope = sum(g.sum() for g in torch.autograd.grad(before, list(model.parameters())))


def moved(t: float) -> Tensor:
    """The loss with ``t`` added to all parameters."""
    values = {name: p.detach() + t for name, p in model.named_parameters()}
    scores = torch.func.functional_call(model, values, x)
    return nn.functional.softplus(-labels * scores).mean()


error = float(abs(slope - (moved(1e-5) - moved(-1e-5)) / 2e-5) / abs(slope))
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
losses = []
for _ in range(STEPS):
    optimizer.zero_grad()
    now = loss(model, x, labels)
    now.backward()
    optimizer.step()
    losses.append(now.item())
right = (model(x).sign() == labels).double().mean().item()
print(f"loss: {before:.3f} before, {losses[-1]:.3f} after; accuracy {right:.1%}")
print(f"gradient against a central difference: relative error {error:.1e}")

# %%
plt.figure(figsize=(7, 3.5), layout="constrained")
plt.plot(losses)
plt.gca().set(xlabel="step", ylabel="loss")
plt.show()

# %%
if not (right > 0.9 and error < 1e-6):
    raise SystemExit("the network did not learn, or its gradient is off")
