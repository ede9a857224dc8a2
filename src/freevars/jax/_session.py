"""A solver on the host inside a compiled program, without calling JAX from a callback.

A callback that itself runs compiled code can wait for a thread that waits for the callback. So the
roles are exchanged here. The solver runs in a Python thread of its own and never touches JAX; the
compiled program is a loop that fetches the solver's next question, answers it with its own compiled
code, and brings the answer along when it fetches the next. A callback only hands NumPy arrays from
one thread to another, the captured values never leave the device, and a solve inside a solve is just
a loop inside a loop.

Under `vmap` there can be several solvers, one in each lane of the batch, that go in step: the lanes
that ask the same kind of question are answered together. Not here: what the questions
mean (`_host_function`), and when to use this at all (`_on_host`).
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from freevars.jax import _compat
from freevars.jax._host_function import Question, answer

__all__ = ["Solve", "solve_in_program"]

# How many products with the derivative one question may ask for: a matrix is fetched in such blocks,
# so that no program reserves memory for a matrix that nobody asks for.
_BLOCK = 16

_GIVEN_UP = object()


class Solve(NamedTuple):
    """How to run the solver: `run(ask, v0, arrays) -> (v, aux leaves)`, all NumPy, in any thread."""

    run: Callable[..., tuple[Any, list[Any]]]
    aux: tuple[Any, ...]  # a jax.ShapeDtypeStruct for each aux leaf
    name: str


class _Session:
    """One solver in its thread. It asks; the program answers."""

    def __init__(self, solve: Solve, v0: Any, arrays: Sequence[Any]) -> None:
        self._questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.pending: tuple[str, Any, Any] | None = None
        self.result: tuple[Any, list[Any]] | None = None
        self._thread = threading.Thread(
            target=self._work, args=(solve, v0, arrays), name=f"freevars {solve.name}", daemon=True
        )
        self._thread.start()
        self.advance()

    def _work(self, solve: Solve, v0: Any, arrays: Sequence[Any]) -> None:
        try:
            self._questions.put(("done", solve.run(self._ask, v0, arrays)))
        except _GivenUpError:
            pass
        except BaseException as error:  # noqa: BLE001 (raised again in the thread of the program)
            self._questions.put(("failed", error))

    def _ask(self, kind: str, v: Any, d: Any = None) -> tuple[Any, ...]:
        if kind == "matrix":
            return (self._matrix(v),)
        return self._exchange(kind, v, np.zeros_like(v[..., None, :]) if d is None else d[..., None, :])

    def _matrix(self, v: Any) -> Any:
        """The matrix of the derivative, in blocks of columns."""
        n = v.shape[-1]
        columns = []
        for start in range(0, n, _BLOCK):
            block = np.eye(min(_BLOCK, n - start), n, start)
            columns.append(self._exchange("products", v, block)[0][..., : len(block), :])
        return np.swapaxes(np.concatenate(columns, axis=-2), -1, -2)

    def _exchange(self, kind: str, v: Any, block: Any) -> tuple[Any, ...]:
        self._questions.put(("asked", (kind, v, block)))
        got: Any = self._answers.get()
        if got is _GIVEN_UP:
            raise _GivenUpError
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
            raise value

    def give_up(self) -> None:
        if self.pending is not None:
            self._answers.put(_GIVEN_UP)


class _GivenUpError(BaseException):
    """Ends the thread of a solver whose program will not come back."""


class _Lanes:
    """The solvers of one solve in one program: one, or one in each lane of a batch."""

    def __init__(self, sessions: list[_Session], shape: _Shape) -> None:
        self._sessions = sessions
        self._shape = shape

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


class _Shape(NamedTuple):
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


_LANES: dict[int, _Lanes] = {}
_NUMBERS = itertools.count(1)


def solve_in_program(
    solve: Solve,
    question: Question,
    problem: Any,
    v0: Any,
    arrays: Sequence[Any],
    *,
    lanes: int | None = None,
    whole: bool = False,
    problem_axes: Any = None,
) -> tuple[Any, list[Any]]:
    """The solution as a vector and the aux leaves, traced into the program under way.

    With `lanes`, v0, `arrays` and the results have a leading axis of that size; `problem_axes` says
    which leaves of `problem` do, as the `in_axes` of `jax.vmap`. With `whole` too, one solver is given
    the batch.
    """
    struct = question.layout.struct()
    shape = _Shape(struct.size, lanes, whole)
    kinds = ["value", "product", "products"]
    if not question.equations:
        kinds.insert(1, "value_and_grad")
    start, done = 0, len(kinds) + 1
    state = (
        jax.ShapeDtypeStruct((), jnp.int32),  # the number of the lanes in `_LANES`
        jax.ShapeDtypeStruct((), jnp.int32),  # what comes next: start, a kind of question, or done
        jax.ShapeDtypeStruct(shape.vector, struct.dtype),
        jax.ShapeDtypeStruct(shape.block, struct.dtype),
    )

    def tell(number: int, running: _Lanes) -> tuple[Any, ...]:
        kind, v, block = running.question()
        return number, done if kind is None else 1 + kinds.index(kind), v, block

    def begin(v0: Any, *arrays: Any) -> tuple[Any, ...]:
        # Copies: the solver works with them after the callback has returned.
        given = [np.array(a) for a in (v0, *arrays)]
        count = lanes if lanes is not None and shape.separate else 1
        each = [[a[shape.lane(i)] for a in given] for i in range(count)]
        running = _Lanes([_Session(solve, v, rest) for v, *rest in each], shape)
        number = next(_NUMBERS)
        _LANES[number] = running
        return tell(number, running)

    def carry_on(kind: str, number: Any, *results: Any) -> tuple[Any, ...]:
        running = _LANES[int(number)]
        try:
            running.reply(kind, results)
        except BaseException:
            del _LANES[int(number)]
            raise
        return tell(int(number), running)

    def finish(number: Any) -> tuple[Any, ...]:
        return tuple(_LANES.pop(int(number)).aux())

    def compute(kind: str, v: Any, block: Any) -> Any:
        def one(problem: Any, v: Any, block: Any) -> Any:
            if kind == "products":
                return jax.vmap(lambda d: answer("product", question, problem, v, d))(block)
            return answer(kind, question, problem, v, block[0])

        if lanes is not None:
            one = jax.vmap(one, in_axes=(problem_axes, 0, 0))
        return one(problem, v, block)

    def ask_solver(kind: str) -> Callable[..., Any]:
        def branch(number: Any, v: Any, block: Any) -> Any:
            def step(number: Any, *results: Any) -> tuple[Any, ...]:
                return carry_on(kind, number, *results)

            return _compat.host_call(step, state, number, *compute(kind, v, block))

        return branch

    def start_solver(number: Any, v: Any, block: Any) -> Any:
        del number, block
        return _compat.host_call(begin, state, v, *arrays)

    branches = [start_solver, *map(ask_solver, kinds)]

    def step(carry: Any) -> Any:
        number, now, v, block = carry
        return tuple(jax.lax.switch(now, branches, number, v, block))

    first = (jnp.int32(0), jnp.int32(start), v0, jnp.zeros(shape.block, struct.dtype))
    number, _, v, _ = jax.lax.while_loop(lambda carry: carry[1] != done, step, first)
    lead = () if lanes is None else (lanes,)
    aux = tuple(jax.ShapeDtypeStruct((*lead, *a.shape), a.dtype) for a in solve.aux)
    # The solution passes through, so that nobody can drop this call and leave the lanes behind.
    v, *leaves = _compat.host_call(
        lambda number, v: (v, *finish(number)), (state[2], *aux), number, v
    )
    return v, leaves
