"""The linear operator of an implicit derivative, as a linear solver is given it.

It is dF/dx at the solution, as a map of pytrees like x in real coordinates: a complex array becomes
a pair of real ones, and everything else is as in x. Not here: where the map comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from freevars.jax._rules.coordinates import split_like

__all__ = ["LinearOperator", "lineax_module"]

Tree: TypeAlias = Any
Apply: TypeAlias = Callable[[Tree], Tree]


class LinearOperator:
    """A linear map A of pytrees of real arrays to pytrees of the same structure.

    Calling it applies it, so that a function written for `solve(matvec, b)`, as
    `jax.scipy.sparse.linalg.cg` and the `tangent_solve` of `jax.lax.custom_root` are, takes it as
    it is.

    Attributes:
        structure: the pytree of `jax.ShapeDtypeStruct` that it maps to itself: x, with a pair of
            real arrays for a complex one, all of one dtype (float32 or float64).
        symmetric: it is the second derivative of an objective.
        fixed_point: it is the derivative of x - fun(x).
        transposed: it is the transpose of the derivative of the equations: a backward pass asks.
            What solves with factors of its own needs to know.
        size: the number of real unknowns, of this device.

    Example:
        >>> import jax, jax.numpy as jnp, freevars.jax as fv
        >>> def solve(operator, b):
        ...     return operator.unravel(jnp.linalg.solve(operator.as_matrix(), operator.ravel(b)))
        >>> newton = fv.root(
        ...     lambda fun, x0: jax.lax.fori_loop(0, 20, lambda _, x: x - fun(x) / (2 * x), x0),
        ...     linear_solve=solve,
        ... )
        >>> print(jax.grad(lambda a: newton(lambda x: x**2 - a, 1.0))(4.0))
        0.25
    """

    def __init__(
        self,
        matvec: Apply,
        structure: Tree,
        *,
        rmatvec: Apply | None = None,
        symmetric: bool = False,
        fixed_point: bool = False,
        transposed: bool = False,
    ) -> None:
        self._matvec = matvec
        self._rmatvec = rmatvec
        leaves, self._tree = jax.tree.flatten(structure)
        self.example = structure
        self.structure = self._tree.unflatten(
            [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        )
        self.symmetric = symmetric
        self.fixed_point = fixed_point
        self.transposed = transposed
        self.size = sum(leaf.size for leaf in leaves)

    def __call__(self, v: Tree) -> Tree:
        """A v."""
        return self._matvec(v)

    def matvec(self, v: Tree) -> Tree:
        """A v, for `v` like `structure`; what calling the operator gives."""
        return self._matvec(v)

    def rmatvec(self, v: Tree) -> Tree:
        """A^T v, for `v` like `structure`."""
        if self._rmatvec is None:
            return jax.linear_transpose(self._matvec, self.example)(v)[0]
        return self._rmatvec(v)

    @property
    def T(self) -> LinearOperator:  # noqa: N802 (as arrays call it)
        """The transpose."""
        return LinearOperator(
            self.rmatvec,
            self.example,
            rmatvec=self._matvec,
            symmetric=self.symmetric,
            fixed_point=self.fixed_point,
            transposed=not self.transposed,
        )

    def ravel(self, tree: Tree) -> Any:
        """`tree`, like `structure`, as a vector of shape (size,): the order of `as_matrix`."""
        return jnp.concatenate([jnp.ravel(leaf) for leaf in self._tree.flatten_up_to(tree)])

    def unravel(self, vector: Any) -> Tree:
        """The pytree of a `vector` of shape (size,)."""
        return self._tree.unflatten(split_like(vector, jax.tree.leaves(self.structure)))

    def as_matrix(self) -> Any:
        """The matrix of shape (size, size), by as many applications of the operator."""
        return self.columns(jnp.arange(self.size)).T

    def columns(self, which: Any) -> Any:
        """The columns `which` of the matrix, each as a row: shape (k, size) for k indices."""
        leaves = jax.tree.leaves(self.example)
        rows = (which[:, None] == jnp.arange(self.size)[None]).astype(leaves[0].dtype)
        # Zeros like the example bring along over which axes of an enclosing shard_map it varies.
        units = [
            part + jnp.zeros_like(leaf)[None]
            for part, leaf in zip(split_like(rows, leaves), leaves, strict=True)
        ]
        images = jax.tree.leaves(jax.vmap(self._matvec)(self._tree.unflatten(units)))
        return jnp.concatenate([image.reshape(which.shape[0], -1) for image in images], axis=1)

    def diagonal(self) -> Tree:
        """The diagonal of the matrix, as a pytree like x.

        It takes `size` applications of the operator, 64 at a time: cheaper than the matrix in
        memory, not in time. Where the matrix is sparse, take fewer applications, to sums of unit
        vectors whose columns share no row.
        """

        def entry(i: Any) -> Any:
            return self.columns(i[None])[0, i]

        return self.unravel(jax.lax.map(entry, jnp.arange(self.size), batch_size=64))

    def as_lineax(self, *, definite: bool = False) -> Any:
        """A `lineax.FunctionLinearOperator`; `definite` declares it positive semidefinite."""
        lx = lineax_module()
        tags: frozenset[object] = frozenset()
        if definite:
            tags = frozenset({lx.positive_semidefinite_tag})
        elif self.symmetric:
            tags = frozenset({lx.symmetric_tag})
        return lx.FunctionLinearOperator(self._matvec, self.structure, tags)

    def __repr__(self) -> str:
        kind = "symmetric " if self.symmetric else ""
        how = ", transposed" if self.transposed else ""
        return f"<{kind}linear operator of {self.size} real unknowns{how}>"


def lineax_module() -> Any:
    """lineax, or an error that says how to get it."""
    try:
        import lineax  # noqa: PLC0415 (an extra: importing freevars.jax needs only JAX)
    except ImportError as error:
        message = "this needs lineax: pip install 'freevars[rules]'"
        raise ImportError(message) from error
    return lineax
