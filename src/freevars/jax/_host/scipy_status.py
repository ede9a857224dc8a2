"""What a scipy result reports about its own success, as an aux of `on_host`."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["scipy_status"]


def scipy_status(result: Any = None) -> dict[str, Any]:
    """What an `OptimizeResult` of scipy says of its own success, as an aux for `on_host`.

    Args:
        result: a `scipy.optimize.OptimizeResult`. None: an example, for
            `on_host(aux=scipy_status())`.

    Returns:
        A dict of `success` (bool), `iterations` (int32; function evaluations where the method
        counts no iterations) and `status` (int32, scipy's code of its message).

    Example:
        >>> import scipy.optimize, freevars.jax as fv
        >>> fv.scipy_status(scipy.optimize.minimize(lambda x: x @ x, [0.0]))["success"].item()
        True
    """
    count = getattr(result, "nit", getattr(result, "nfev", 0))
    return {
        "success": np.bool_(getattr(result, "success", False)),
        "iterations": np.int32(count),
        "status": np.int32(getattr(result, "status", 0)),
    }
