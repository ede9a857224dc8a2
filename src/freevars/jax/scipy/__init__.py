"""scipy's solvers, with scipy's signatures, for functions in JAX: `freevars.jax.scipy`.

Each is `freevars.jax.on_host` around the solver of scipy, with the rule of its result above:
differentiable by everything that its functions capture, under `jit`, `vmap` and `scan`. It is
imported by itself, or at the first use of `fv.scipy`: nothing else in freevars needs scipy.
"""

from freevars.jax.scipy._fixed_point import fixed_point
from freevars.jax.scipy._least_squares import least_squares
from freevars.jax.scipy._linprog import linprog
from freevars.jax.scipy._minimize import minimize
from freevars.jax.scipy._quad import quad
from freevars.jax.scipy._result import OdeResult, OptimizeResult, RootResults
from freevars.jax.scipy._root import root
from freevars.jax.scipy._root_scalar import root_scalar
from freevars.jax.scipy._solve_ivp import solve_ivp

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
