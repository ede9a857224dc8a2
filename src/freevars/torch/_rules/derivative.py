"""The derivative A of an optimality function at a solution, by products with what was recorded.

`f` was computed once, with a graph, at the leaf `at`. Products of A^T are vector-Jacobian products
of that graph; nothing runs the function again. Products of A are the same where A is symmetric;
otherwise they are the derivative of the product of A^T, which is linear, and only these need `f` to
be twice differentiable.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from freevars.torch._rules.products import paired
from freevars.torch._rules.sharded import communicates

__all__ = ["Derivative", "LinearOperator"]

# How many rows of a matrix are computed at once: bounds the memory of a batched backward pass.
_ROWS_AT_ONCE = 128


class Derivative:
    """A = df/dat; `f` and `at` are Float[Tensor, "problems n"], each row of `f` a function of that
    row of `at` alone."""

    def __init__(self, at: Tensor, f: Tensor, *, symmetric: bool) -> None:
        self.at = at
        self.f = f
        self.symmetric = symmetric
        self._pullback: tuple[Tensor, Tensor] | None = None

    def transposed(self, u: Tensor) -> Tensor:
        """A^T u."""
        if not self.f.requires_grad:
            return torch.zeros_like(u)
        (product,) = torch.autograd.grad(
            self.f, self.at, u.to(self.f.dtype), retain_graph=True, materialize_grads=True
        )
        return product.detach().to(u.dtype)

    def forward(self, v: Tensor) -> Tensor:
        """A v."""
        if self.symmetric or not self.f.requires_grad:
            return self.transposed(v)
        if self._pullback is None:
            with torch.enable_grad():
                u = torch.zeros_like(self.f, requires_grad=True)
                (product,) = torch.autograd.grad(
                    self.f, self.at, u, create_graph=True, materialize_grads=True
                )
            self._pullback = (u, product)
        u, product = self._pullback
        if not product.requires_grad:
            return torch.zeros_like(v)
        (out,) = torch.autograd.grad(
            product, u, v.to(product.dtype), retain_graph=True, materialize_grads=True
        )
        return out.to(v.dtype)

    def curvature(self, s: Tensor) -> Tensor:
        """The second derivative of f along s, twice; needs an f that is differentiable three times,
        and otherwise raises PyTorch's own error."""
        return self.along(s, (), (), s)[1]

    def along(
        self, y: Tensor, by: Sequence[Tensor], dots: Sequence[Tensor], s: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The derivative of f where `at` moves along y and the tensors `by` along `dots`, and how
        it changes where `at` moves along s (None: not asked for)."""
        zero = torch.zeros_like(self.f)
        if not self.f.requires_grad:
            return zero, zero
        with torch.enable_grad():
            u = torch.zeros_like(self.f, requires_grad=True)
            pulled = torch.autograd.grad(
                self.f, (self.at, *by), u, create_graph=True, materialize_grads=True
            )
            pairing = paired(pulled, (y, *dots))
            if not pairing.requires_grad:
                return zero, zero
            (value,) = torch.autograd.grad(pairing, u, retain_graph=True, materialize_grads=True)
            if s is None:
                return value, zero
            (change,) = torch.autograd.grad(
                pairing, self.at, create_graph=True, materialize_grads=True
            )
            pairing = paired((change,), (s,))
            if not pairing.requires_grad:
                return value, zero
        (out,) = torch.autograd.grad(pairing, u, retain_graph=True, materialize_grads=True)
        return value, out

    def matrix(self) -> Tensor:
        """A of each problem, Float[Tensor, "problems n n"], from n products whatever the number of
        problems."""
        b, n = self.f.shape
        if not self.f.requires_grad or not b * n:
            return torch.zeros(b, n, n, dtype=self.f.dtype, device=self.f.device)
        eye = torch.eye(n, dtype=self.f.dtype, device=self.f.device)
        rows = [
            self._rows(part[:, None].expand(-1, b, -1)) for part in torch.split(eye, _ROWS_AT_ONCE)
        ]
        return torch.cat(rows).transpose(0, 1)

    def _rows(self, units: Tensor) -> Tensor:
        """By one batched sweep where every operation has a batching rule, row by row elsewhere."""
        if len(units) > 1 and not communicates(self.f):
            try:
                (rows,) = torch.autograd.grad(
                    self.f,
                    self.at,
                    units,
                    is_grads_batched=True,
                    retain_graph=True,
                    materialize_grads=True,
                )
                return rows.detach()
            except RuntimeError:
                pass
        return torch.stack([self.transposed(unit) for unit in units])


class _Part(Derivative):
    """Of some of the problems, by products with the whole of A."""

    def __init__(self, whole: Derivative, problems: slice) -> None:
        super().__init__(whole.at[problems], whole.f[problems], symmetric=whole.symmetric)
        self._whole = whole
        self._problems = problems

    def transposed(self, u: Tensor) -> Tensor:
        return self._whole.transposed(self._beside_zeros(u))[self._problems]

    def forward(self, v: Tensor) -> Tensor:
        return self._whole.forward(self._beside_zeros(v))[self._problems]

    def matrix(self) -> Tensor:
        return self._whole.matrix()[self._problems]

    def _beside_zeros(self, u: Tensor) -> Tensor:
        whole = torch.zeros_like(self._whole.f, dtype=u.dtype)
        whole[self._problems] = u
        return whole


class LinearOperator:
    """A linear map A of real vectors of n numbers to such vectors: what a `linear_solve` is given.

    `solve(operator, b)` returns the u with A u = b; a complex unknown counts as two numbers.
    Calling the operator applies it, so that a function written for `solve(matvec, b)` takes it as
    it is.

    Attributes:
        symmetric: it is the second derivative of an objective.
        structure: a function without arguments, which gives the unknown that a vector stands for,
            a pytree of tensors on the device "meta".

    Example:
        >>> import torch, freevars.torch as fv
        >>> @fv.root(linear_solve=lambda A, b: torch.linalg.solve(A.as_matrix(), b))
        ... def newton(fun, x0):
        ...     for _ in range(20):
        ...         x0 = x0 - fun(x0) / (2 * x0)
        ...     return x0
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> torch.autograd.grad(newton(lambda x: x**2 - a, torch.tensor(1.0)), a)
        (tensor(0.2500),)
    """

    def __init__(self, derivative: Derivative, structure: object, *, transposed: bool) -> None:
        self._derivative = derivative
        self._transposed = transposed
        self.structure = structure
        self.symmetric = derivative.symmetric

    def __repr__(self) -> str:
        n = self._derivative.f.numel()
        kind = "symmetric operator" if self.symmetric else "operator"
        return f"<{kind} on {n} unknowns>"

    def __call__(self, v: Tensor) -> Tensor:
        return self.matvec(v)

    def matvec(self, v: Tensor) -> Tensor:
        """A v, for `v` of shape (n,); what calling the operator gives."""
        return self._product(v, transposed=self._transposed)

    def rmatvec(self, v: Tensor) -> Tensor:
        """A^T v, for `v` of shape (n,)."""
        return self._product(v, transposed=not self._transposed)

    def as_matrix(self) -> Tensor:
        """The matrix, of shape (n, n), by n applications of the operator."""
        blocks = self._derivative.matrix()
        b, n, _ = blocks.shape
        whole = blocks.new_zeros(b, n, b, n)
        whole[range(b), :, range(b)] = blocks.mT if self._transposed else blocks
        return whole.reshape(b * n, b * n)

    def diagonal(self) -> Tensor:
        """The diagonal of the matrix, of shape (n,), by as many applications as one problem of a
        batch has unknowns."""
        return self._derivative.matrix().diagonal(dim1=1, dim2=2).reshape(-1)

    def part(self, k: int, parts: int) -> "LinearOperator":
        """The operator of the `k`-th of `parts` equal parts of a batch of problems."""
        count = len(self._derivative.f) // parts
        part = _Part(self._derivative, slice(k * count, (k + 1) * count))
        return LinearOperator(part, self.structure, transposed=self._transposed)

    def _product(self, v: Tensor, *, transposed: bool) -> Tensor:
        a = self._derivative
        product = a.transposed if transposed else a.forward
        return product(v.reshape(a.f.shape)).reshape(-1)
