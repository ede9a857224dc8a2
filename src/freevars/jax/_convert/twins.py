"""Recognise two captured arrays, one of a body and one of its rule, as copies of the same array.

JAX converts a NumPy array that is not of one of its own dtypes in each trace, and a function may
slice or scale one wherever it reads it. Not here: what makes two arrays the same object.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from freevars.jax._compat import Tracer
from freevars.jax._describe.tracers import identity

__all__ = ["twins"]


def twins(first: Iterable[Any], second: Iterable[Any]) -> dict[Any, Any]:
    """The values of `second` that are not in `first`, with those in `first` that they copy.

    A body and its rule that each convert or slice the same NumPy array read two objects for one.
    Of several candidates with the same content the next one is taken each time.
    """
    two = {identity(v): v for v in second if not isinstance(v, Tracer)}
    if not two:
        return {}
    one = {identity(v): v for v in first if not isinstance(v, Tracer)}
    alone = [v for key, v in one.items() if key not in two]
    copies = [(key, v) for key, v in two.items() if key not in one]
    if not alone or not copies:
        return {}
    by_content: dict[Any, list[Any]] = {}
    types = {_type(v) for _, v in copies}
    for v in alone:
        if _type(v) in types:
            by_content.setdefault(_content(v), []).append(v)
    found: dict[Any, Any] = {}
    for key, v in copies:
        same = by_content.get(_content(v)) if by_content else None
        if same:
            found[key] = same[0]
            same.append(same.pop(0))
    return found


def _type(value: Any) -> Any:
    return value.shape, str(value.dtype)


def _content(value: Any) -> Any:
    try:
        return (*_type(value), np.asarray(value).tobytes())
    except TypeError:  # random keys and the like: no NumPy array holds them
        return id(value)
