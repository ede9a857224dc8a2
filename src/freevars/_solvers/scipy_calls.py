"""What scipy's solvers take, and what a caller need not give them; the same in both hosts.

Not here: scipy itself, which only `freevars.jax.scipy` and `freevars.torch.scipy` need.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "HESSIAN",
    "JACOBIAN",
    "NO_GRADIENT",
    "ORDERS",
    "PRODUCTS",
    "as_tuple",
    "refuse_derivatives",
    "refuse_loss",
]

# What a method of `minimize` takes beside the value. To any other scipy says that it has no use.
NO_GRADIENT = {"nelder-mead", "powell", "cobyla", "cobyqa"}
HESSIAN = {"dogleg", "trust-exact", "trust-constr"}
PRODUCTS = {"newton-cg", "trust-ncg", "trust-krylov"}

JACOBIAN = {"hybr", "lm"}  # methods of `root` that take one

ORDERS = {"newton": 1, "halley": 2}  # how many derivatives a method of `root_scalar` takes


def as_tuple(args: Any) -> tuple[Any, ...]:
    """Extra arguments as scipy takes them: a tuple, or the only one."""
    return args if isinstance(args, tuple) else (args,)


def refuse_derivatives(name: str, host: str, own_rule: str, **given: Any) -> None:
    """Refuse derivatives that a caller brings: they are taken from the function.

    Raises:
        TypeError: one of them is neither None nor False.
    """
    for what, value in given.items():
        if value is not None and value is not False:
            message = (
                f"{name}: {what}= is not needed, got {value!r}. The function is {host} code, and"
                " the solver is given its exact derivatives. Leave it out, and let the function"
                f" return its value alone; {own_rule} gives a function a derivative of your own."
            )
            raise TypeError(message)


def refuse_loss(name: str, loss: Any) -> None:
    """Refuse a loss of `least_squares` that is another objective.

    Raises:
        TypeError: it is not "linear".
    """
    if loss != "linear":
        message = (
            f"{name}: loss: expected 'linear', got {loss!r}. Another loss is another objective:"
            " write it out and give it to minimize."
        )
        raise TypeError(message)
