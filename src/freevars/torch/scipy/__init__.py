"""scipy's solvers, with scipy's signatures, for functions in PyTorch: `freevars.torch.scipy`.

Each is the solver of scipy with the rule of its condition above: differentiable by everything that
its functions capture. It is imported by itself, or at the first use of `fv.scipy`: nothing else in
freevars needs scipy.
"""

from freevars.torch.scipy._least_squares import least_squares
from freevars.torch.scipy._minimize import minimize
from freevars.torch.scipy._result import OptimizeResult, RootResults
from freevars.torch.scipy._root import root
from freevars.torch.scipy._root_scalar import root_scalar

__all__ = [
    "OptimizeResult",
    "RootResults",
    "least_squares",
    "minimize",
    "root",
    "root_scalar",
]
