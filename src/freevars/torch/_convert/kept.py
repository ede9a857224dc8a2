"""What a run of a function keeps of what it has made, put aside for each call.

Not here: finding it (`places.py`).
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from freevars.torch._convert.steps import GONE, Place, entry, follow

__all__ = ["Kept", "holds"]


def holds(x: Any, made: Mapping[int, Tensor]) -> bool:
    if isinstance(x, Tensor):
        return id(x) in made
    if isinstance(x, dict):
        return any(holds(y, made) for y in dict.values(x))
    return isinstance(x, list | tuple) and any(holds(y, made) for y in list(x))


class Kept:
    """The attributes and entries in which a run of `fun` keeps tensors that it made (a table of
    rotary embeddings), and what was there before. They were computed from the captured tensors, so
    each call begins without them and makes its own from the values that it is given."""

    def __init__(self, found: tuple[tuple[Place, Any, Any, Any], ...]) -> None:
        self._found = found

    def __bool__(self) -> bool:
        return bool(self._found)

    @contextmanager
    def as_before(self, fun: Any) -> Iterator[dict[int, Tensor]]:
        """Inside, they hold what they held before the first run; afterwards what they hold now.
        What stands for the latter in a later recomputation (checkpointing) is in what this gives,
        by id, at its end."""
        made: dict[int, Tensor] = {}
        with _lock:  # what a run keeps, all threads see
            holders = [
                (_holder(follow(fun, at), link), key, old) for at, link, key, old in self._found
            ]
            now = [(holder, key, holder.get(key, GONE)) for holder, key, _ in holders]
            for holder, key, old in holders:
                _put(holder, key, old)
            try:
                yield made
            finally:
                for holder, key, x in now:
                    mine = holder.get(key, GONE)
                    _put(holder, key, x)
                    if isinstance(x, Tensor) and isinstance(mine, Tensor):
                        made[id(x)] = mine


def _holder(obj: Any, link: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = obj if link is entry else object.__getattribute__(obj, "__dict__")
    return found


def _put(holder: dict[Any, Any], key: Any, x: Any) -> None:
    if x is GONE:
        holder.pop(key, None)
    else:
        holder[key] = x


_lock = threading.RLock()
