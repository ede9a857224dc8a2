"""A solver on the host in a thread of its own, which sends a program queries.

The thread hands over a query and sleeps until it has the answer; the answering side sleeps in
between. Only NumPy arrays pass between them. Not here: the program (`staged`), and what a query
means (`oracle`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["BatchShape", "HostSolverError", "Solve", "SolverThread"]

# The most products with the derivative in one query: a matrix is fetched in such blocks, so that no
# program reserves memory for a matrix that is never needed.
_BLOCK = 16


class Solve(NamedTuple):
    """How to run the solver: `run(query, v0, arrays) -> (v, aux leaves)`, all NumPy, in any
    thread."""

    run: Callable[..., tuple[Any, list[Any]]]
    aux: tuple[Any, ...]  # a jax.ShapeDtypeStruct for each aux leaf
    name: str


class SolverThread:
    """One solver in its thread. It makes queries; the program answers.

    After each step there is a query (`pending`), the result or an error.
    """

    def __init__(self, solve: Solve, v0: Any, arrays: Sequence[Any]) -> None:
        self._name = solve.name
        self._queries: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._turn = threading.Lock()  # a solver may ask from several threads of its own
        self._closed: BaseException | None = None  # why nothing can be asked any more
        self.pending: tuple[str, Any, Any] | None = None
        self.result: tuple[Any, list[Any]] | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._work, args=(solve, v0, arrays), name=f"freevars {solve.name}", daemon=True
        )

    def start(self, check: Callable[[], None]) -> None:
        """Run it up to its first query, unless `check` raises."""
        try:
            check()
            self._thread.start()
        except Exception as error:  # noqa: BLE001 (the program raises it, on every device)
            self.error = error
        else:
            self._advance()

    def _work(self, solve: Solve, v0: Any, arrays: Sequence[Any]) -> None:
        end: tuple[str, Any]
        try:
            end = ("done", solve.run(self._query, v0, arrays))
        except BaseException as error:  # noqa: BLE001 (the program raises it)
            end = ("failed", error)
        with self._turn:
            if self._closed is None:
                self._closed = RuntimeError(
                    f"the function that the solver {self._name} was given is called after the"
                    " solver was done. Inside a program it answers while the solver runs, and"
                    " not later."
                )
            self._queries.put(end)

    def _query(self, kind: str, v: Any, d: Any = None) -> tuple[Any, ...]:
        if kind.endswith("matrix"):
            return (self._matrix(v, kind.removesuffix("matrix")),)
        block = np.zeros_like(v) if d is None else d
        return self._exchange(kind, v, block[..., None, :])

    def _matrix(self, v: Any, of: str) -> Any:
        """The matrix of the derivative, in blocks of columns; `of`: a prefix of the kind."""
        n = v.shape[-1]
        columns = []
        for start in range(0, n, _BLOCK):
            block = np.eye(min(_BLOCK, n - start), n, start)
            columns.append(self._exchange(f"{of}products", v, block)[0][..., : len(block), :])
        return np.swapaxes(np.concatenate(columns, axis=-2), -1, -2)

    def _exchange(self, kind: str, v: Any, block: Any) -> tuple[Any, ...]:
        with self._turn:
            if self._closed is not None:
                raise self._closed
            self._queries.put(("query", (kind, v, block)))
            got: Any = self._answers.get()
        return tuple(got)

    def reply(self, got: Any) -> None:
        """Answer its query, and wait for the next one or the end."""
        self._answers.put(got)
        self._advance()

    def _advance(self) -> None:
        what, value = self._queries.get()
        self.pending = value if what == "query" else None
        if what == "done":
            self.result = value
        elif what == "failed":
            self.error = value


class HostSolverError(RuntimeError):
    """A program's error for an error of its solver."""


class BatchShape(NamedTuple):
    """The shapes of what travels between the program and the solver."""

    n: int
    lanes: int | None  # the size of the batch, None without one

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes in front."""
        return () if self.lanes is None else (self.lanes,)

    @property
    def vector(self) -> tuple[int, ...]:
        return (*self.lead, self.n)

    @property
    def block(self) -> tuple[int, ...]:
        return (*self.lead, min(_BLOCK, self.n), self.n)
