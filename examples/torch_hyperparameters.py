"""Tune one regulariser per pixel of a digit classifier by gradient descent, in PyTorch.

    python examples/torch_hyperparameters.py

The inner problem fits a linear softmax classifier to scikit-learn's digits, read batch by batch
from a DataLoader. The outer problem moves the 64 regularisers so that the fitted classifier does
well on validation data. `fv.argmin` finds what the objective captured and carries the gradient
through the solver, which knows nothing of it.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset
from tqdm import trange

import freevars.torch as fv


@fv.argmin
def minimize(objective, x0: Tensor) -> Tensor:
    """The minimiser of a smooth, strictly convex objective, by a damped Newton method."""
    x = x0
    for _ in range(50):
        x = x.detach().requires_grad_()
        slope = torch.autograd.grad(objective(x), x)[0].flatten()
        curvature = torch.autograd.functional.hessian(objective, x, vectorize=True)
        curvature = curvature.reshape(len(slope), len(slope))
        step = torch.linalg.solve(curvature, slope)
        size, height = 1.0, objective(x) + 1e-12  # rounding hides any fall near the minimum
        while size > 1e-3 and objective(x - size * step.view_as(x)) > height:
            size /= 2
        x = x - size * step.view_as(x)
        if slope @ step < 1e-16:  # the next step would change nothing that can be seen
            break
    return x.detach()


def load(n_train: int) -> tuple[DataLoader, tuple[Tensor, Tensor]]:
    """Batches of training data, and validation data: (pixels in 0..1 [n, 64], digit [n])."""
    pixels, digits = load_digits(return_X_y=True)
    train_x, valid_x, train_y, valid_y = train_test_split(
        pixels / 16, digits, train_size=n_train, stratify=digits, random_state=0
    )
    train = TensorDataset(torch.tensor(train_x), torch.tensor(train_y))
    sampler = BatchSampler(SequentialSampler(train), batch_size=100, drop_last=False)
    batches = DataLoader(train, sampler=sampler, batch_size=None)
    return batches, (torch.tensor(valid_x), torch.tensor(valid_y))


def logits(weights: Tensor, x: Tensor) -> Tensor:
    """Scores of the ten digits; the last row of ``weights`` [65, 10] is the bias."""
    return x @ weights[:-1] + weights[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10, help="outer steps")
    parser.add_argument("--rate", type=float, default=0.3, help="outer step size of Adam")
    parser.add_argument("--train", type=int, default=300, help="training examples")
    options = parser.parse_args()

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    batches, (valid_x, valid_y) = load(options.train)
    start = torch.zeros(65, 10)

    def fit(log_reg: Tensor) -> Tensor:
        """The weights for these log-regularisers, one a pixel."""
        ridge = log_reg.exp() / 2

        def objective(weights: Tensor) -> Tensor:
            penalty = (ridge[:, None] * weights[:-1] ** 2).sum() + (weights[-1] ** 2).sum() / 100
            fits = [cross_entropy(logits(weights, x), y, reduction="sum") for x, y in batches]
            return (torch.stack(fits).sum() + penalty) / options.train

        return minimize(objective, start)

    def validation_loss(log_reg: Tensor) -> Tensor:
        return cross_entropy(logits(fit(log_reg), valid_x), valid_y)

    log_reg = torch.zeros(64, requires_grad=True)
    before = validation_loss(log_reg)
    (hypergradient,) = torch.autograd.grad(before, log_reg)
    direction = torch.randn(64)
    h = 1e-4
    with torch.no_grad():
        finite = (
            validation_loss(log_reg + h * direction) - validation_loss(log_reg - h * direction)
        ) / (2 * h)
    error = float(abs(hypergradient @ direction - finite) / abs(finite))

    optimizer = torch.optim.Adam([log_reg], lr=options.rate)
    began = time.perf_counter()
    for _ in trange(options.steps, desc="tuning", unit="step"):
        optimizer.zero_grad()
        validation_loss(log_reg).backward()
        optimizer.step()
    milliseconds = 1e3 * (time.perf_counter() - began) / options.steps

    with torch.no_grad():
        after = validation_loss(log_reg)
        accuracy = (logits(fit(log_reg), valid_x).argmax(1) == valid_y).double().mean()
    print(f"hypergradient along a random direction against central differences: {error:.1e}")
    print(f"validation loss: {before:.4f} before, {after:.4f} after {options.steps} steps")
    print(f"validation accuracy: {accuracy:.1%}")
    print(f"time per step: {milliseconds:.0f} ms")
    if not (error < 1e-5 and after < before):
        raise SystemExit("the hypergradient is off by more than 1e-5, or tuning did not help")


if __name__ == "__main__":
    main()
