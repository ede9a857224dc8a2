"""The linear system of an implicit derivative: which method solves it.

Up to `DENSE_LIMIT` unknowns a problem the matrix is written out, from as many products as one
problem has unknowns, and factorised once for the whole batch. Beyond, the system is only applied
to vectors.

Not here: where products come from (`derivative.py`), and what the figures mean (`diagnostics.py`).
"""

from torch import Tensor

from freevars.torch._rules.dense import Dense
from freevars.torch._rules.derivative import Derivative
from freevars.torch._rules.iterative import Iterative
from freevars.torch._rules.system import LinearSolve, System

__all__ = ["DENSE_LIMIT", "system_of"]

# Up to this size a factorisation costs less than the bookkeeping of an iteration, and tells a
# singular system from a slow one.
DENSE_LIMIT = 512


def system_of(
    derivative: Derivative,
    size: Tensor,
    structure: object,
    *,
    own: LinearSolve | None,
    least_squares: bool,
    tensors: Tensor,
    minimum: bool,
    fixed_point: bool,
) -> System:
    """The system of a derivative (`minimum`: of an objective), by the method that suits its size;
    `size` is that of the components of the unknown, `tensors` that of its tensors."""
    f = derivative.f.detach()

    def dense() -> Dense:
        matrix = derivative.matrix()
        return Dense(matrix, f, size, least_squares=least_squares, fixed_point=fixed_point)

    if own is None and f.shape[1] <= DENSE_LIMIT:
        return dense()
    return Iterative(
        derivative, dense, structure, own, tensors, minimum=minimum, fixed_point=fixed_point
    )
