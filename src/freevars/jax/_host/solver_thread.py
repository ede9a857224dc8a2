"""A solver on the host in a thread of its own, which asks a program questions.

The thread hands a question over and sleeps until it has the answer; whoever answers sleeps
meanwhile. Only NumPy arrays pass from one to the other. Under `vmap` there can be several solvers,
one in each lane of the batch, that go in step: the lanes that ask the same kind of question are
answered together. Not here: the program (`staged`), and what a question means
(`oracle`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["BatchShape", "Solve", "SolverBatch", "SolverThread"]

# How many products with the derivative one question may ask for: a matrix is fetched in such
# blocks, so that no program reserves memory for a matrix that nobody asks for.
_BLOCK = 16

_GIVEN_UP = object()


class Solve(NamedTuple):
    """How to run the solver: `run(query, v0, arrays) -> (v, aux leaves)`, all NumPy, in any
    thread."""

    run: Callable[..., tuple[Any, list[Any]]]
    aux: tuple[Any, ...]  # a jax.ShapeDtypeStruct for each aux leaf
    name: str


class SolverThread:
    """One solver in its thread. It asks; the program answers."""

    def __init__(self, solve: Solve, v0: Any, arrays: Sequence[Any]) -> None:
        self._name = solve.name
        self._questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._turn = threading.Lock()  # a solver may ask from several threads of its own
        self._closed: BaseException | None = None  # why nothing can be asked any more
        self.pending: tuple[str, Any, Any] | None = None
        self.result: tuple[Any, list[Any]] | None = None
        self._thread = threading.Thread(
            target=self._work, args=(solve, v0, arrays), name=f"freevars {solve.name}", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def _work(self, solve: Solve, v0: Any, arrays: Sequence[Any]) -> None:
        end: tuple[str, Any] | None
        try:
            end = ("done", solve.run(self._query, v0, arrays))
        except GivenUpError:
            end = None
        except BaseException as error:  # noqa: BLE001 (raised again in the thread of the program)
            end = ("failed", error)
        with self._turn:
            if self._closed is None:
                self._closed = RuntimeError(
                    f"the function that the solver {self._name} was given is called after the"
                    " solver was done. Inside a program it answers while the solver runs, and"
                    " not later."
                )
            if end is not None:
                self._questions.put(end)

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
            self._questions.put(("asked", (kind, v, block)))
            got: Any = self._answers.get()
            if got is _GIVEN_UP:
                self._closed = GivenUpError()
                raise self._closed
        return tuple(got)

    def reply(self, got: Any) -> None:
        self._answers.put(got)
        self.advance()

    def advance(self) -> None:
        """Wait for the next question, or the end."""
        what, value = self._questions.get()
        self.pending = value if what == "asked" else None
        if what == "done":
            self.result = value
        elif what == "failed":
            # JAX tells of an error its text alone: so the text says whose it is.
            message = f"the solver {self._name} on the host raised {type(value).__name__}: {value}"
            raise HostSolverError(message).with_traceback(value.__traceback__) from value

    def give_up(self) -> None:
        """Whatever it asks now or next, nobody answers."""
        self._answers.put(_GIVEN_UP)


class GivenUpError(BaseException):
    """Ends the thread of a solver whose program will not come back."""


class HostSolverError(RuntimeError):
    """What a program says of an error of its solver."""


class BatchShape(NamedTuple):
    """The shapes of what travels between the program and the solvers."""

    n: int
    lanes: int | None  # the size of the batch, None without one
    whole: bool  # one solver takes the batch as a whole

    @property
    def separate(self) -> bool:
        """Whether each lane has a solver of its own."""
        return self.lanes is not None and not self.whole

    def lane(self, i: int) -> Any:
        """The index of what belongs to the solver i."""
        return i if self.separate else ...

    @property
    def vector(self) -> tuple[int, ...]:
        return (self.n,) if self.lanes is None else (self.lanes, self.n)

    @property
    def block(self) -> tuple[int, ...]:
        rows = min(_BLOCK, self.n)
        return (rows, self.n) if self.lanes is None else (self.lanes, rows, self.n)


class SolverBatch:
    """The solvers of one solve in one program: one, or one in each lane of a batch."""

    def __init__(self, sessions: list[SolverThread], shape: BatchShape) -> None:
        self._sessions = sessions
        self._shape = shape

    def begin(self) -> None:
        """Start them, and wait for what each asks first."""
        try:
            for session in self._sessions:
                session.start()
            for session in self._sessions:
                session.advance()
        except BaseException:
            self.give_up()
            raise

    def reply(self, kind: str, results: Sequence[Any]) -> None:
        """Answer those that asked this kind of question, then wait for what each asks next."""
        try:
            for i, session in enumerate(self._sessions):
                if session.pending is not None and session.pending[0] == kind:
                    # A copy, since the program's memory is its own again after the callback.
                    session.reply([np.array(r[self._shape.lane(i)]) for r in results])
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        for session in self._sessions:
            session.give_up()

    def question(self) -> tuple[str | None, Any, Any]:
        """The kind that the program answers next (None: all are done), and where."""
        shape = self._shape
        kinds = [s.pending[0] for s in self._sessions if s.pending is not None]
        v, block = np.zeros(shape.vector), np.zeros(shape.block)
        for i, session in enumerate(self._sessions):
            lane = shape.lane(i)
            if session.pending is not None:
                _, v[lane], rows = session.pending
                block[lane][..., : rows.shape[-2], :] = rows
            else:
                assert session.result is not None  # noqa: S101 (it is pending or it has a result)
                v[lane] = session.result[0]
        return (kinds[0] if kinds else None), v, block

    def aux(self) -> list[Any]:
        results = [session.result[1] for session in self._sessions if session.result is not None]
        if not self._shape.separate:
            return results[0]
        return [np.stack(leaves) for leaves in zip(*results, strict=True)]
