"""scipy's solvers, with scipy's signatures, for functions in PyTorch: `freevars.torch.scipy`.

Each is the solver of scipy with the rule of its condition above: differentiable by everything that
its functions capture. It is imported by itself, or at the first use of `fv.scipy`: nothing else in
freevars needs scipy.
"""

from freevars.torch.scipy._fixed_point import fixed_point
from freevars.torch.scipy._least_squares import least_squares
from freevars.torch.scipy._linprog import linprog
from freevars.torch.scipy._minimize import minimize
from freevars.torch.scipy._quad import quad
from freevars.torch.scipy._result import OdeResult, OptimizeResult, RootResults
from freevars.torch.scipy._root import root
from freevars.torch.scipy._root_scalar import root_scalar
from freevars.torch.scipy._solve_ivp import solve_ivp

__all__ = [
    "OdeResult",
    "OptimizeResult",
    "RootResults",
    "fixed_point",
    "least_squares",
    "linprog",
    "minimize",
    "quad",
    "root",
    "root_scalar",
    "solve_ivp",
]
