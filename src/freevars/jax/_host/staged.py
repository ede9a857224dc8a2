"""A solver on the host inside a compiled program, without calling JAX from a callback.

A callback that itself runs compiled code can wait for a thread that waits for the callback. So the
roles are exchanged here. The solver runs in a Python thread of its own and never touches JAX
(`solver_thread`); the compiled program is a loop that fetches the solver's next question, answers
it with its own compiled code, and brings the answer along when it fetches the next. A callback only
hands arrays from one thread to another, the captured values never leave the device, and a solve
inside a solve is just a loop inside a loop. Not here: when to use this at all (`on_host`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freevars.jax import _compat
from freevars.jax._host.oracle import Oracle, evaluate
from freevars.jax._host.solver_thread import BatchShape, Solve, SolverBatch, SolverThread

__all__ = ["call_staged"]

# The solvers at work, by the number that their program knows them under.
_RUNNING: dict[int, SolverBatch] = {}
_NUMBERS = itertools.count(1)


class _Callbacks:
    """What the program calls. Each call but the last gives the next question: the number of the
    solvers, the kind of question (the position in `kinds` and 1, or `done`), the point and the
    block of directions."""

    def __init__(self, solve: Solve, shape: BatchShape, kinds: Sequence[str]) -> None:
        self.solve = solve
        self.shape = shape
        self.kinds = kinds
        self.done = len(kinds) + 1

    def begin(self, v0: Any, *arrays: Any) -> tuple[Any, ...]:
        # Copies: the program's memory is its own again once the callback has returned.
        given = [np.array(a) for a in (v0, *arrays)]
        count = self.shape.lanes if self.shape.separate and self.shape.lanes is not None else 1
        each = [[a[self.shape.lane(i)] for a in given] for i in range(count)]
        running = SolverBatch([SolverThread(self.solve, v, rest) for v, *rest in each], self.shape)
        running.begin()
        number = next(_NUMBERS)
        _RUNNING[number] = running
        return self._question(number)

    def carry_on(self, kind: str, number: Any, *results: Any) -> tuple[Any, ...]:
        try:
            _RUNNING[int(number)].reply(kind, results)
        except BaseException:
            del _RUNNING[int(number)]
            raise
        return self._question(int(number))

    def finish(self, number: Any, v: Any) -> tuple[Any, ...]:
        # The solution passes through, so that nobody can drop this call and leave the solvers
        # behind.
        return (v, *_RUNNING.pop(int(number)).aux())

    def _question(self, number: int) -> tuple[Any, ...]:
        kind, v, block = _RUNNING[number].question()
        return number, self.done if kind is None else 1 + self.kinds.index(kind), v, block


def call_staged(
    solve: Solve,
    oracle: Oracle,
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
    which leaves of `problem` do, as the `in_axes` of `jax.vmap`. With `whole` too, one solver is
    given the batch.
    """
    struct = oracle.layout.struct()
    shape = BatchShape(struct.size, lanes, whole)
    callbacks = _Callbacks(solve, shape, oracle.kinds())
    state = (
        jax.ShapeDtypeStruct((), jnp.int32),  # the number of the solvers
        jax.ShapeDtypeStruct((), jnp.int32),  # what comes next: start (0), a question, or done
        jax.ShapeDtypeStruct(shape.vector, struct.dtype),
        jax.ShapeDtypeStruct(shape.block, struct.dtype),
    )

    def compute(kind: str, v: Any, block: Any) -> Any:
        def one(problem: Any, v: Any, block: Any) -> Any:
            if kind.endswith("products"):
                product = kind.removesuffix("s")
                return jax.vmap(lambda d: evaluate(product, oracle, problem, v, d))(block)
            return evaluate(kind, oracle, problem, v, block[0])

        if lanes is not None:
            one = jax.vmap(one, in_axes=(problem_axes, 0, 0))
        return one(problem, v, block)

    def start(number: Any, v: Any, block: Any) -> Any:
        del number, block
        return _compat.host_call(callbacks.begin, state, v, *arrays)

    def answering(kind: str) -> Callable[..., Any]:
        def branch(number: Any, v: Any, block: Any) -> Any:
            def carry_on(number: Any, *results: Any) -> tuple[Any, ...]:
                return callbacks.carry_on(kind, number, *results)

            return _compat.host_call(carry_on, state, number, *compute(kind, v, block))

        return branch

    branches = [start, *map(answering, callbacks.kinds)]

    def step(carry: Any) -> Any:
        number, now, v, block = carry
        return tuple(jax.lax.switch(now, branches, number, v, block))

    first = (jnp.int32(0), jnp.int32(0), v0, jnp.zeros(shape.block, struct.dtype))
    number, _, v, _ = jax.lax.while_loop(lambda carry: carry[1] != callbacks.done, step, first)
    lead = () if lanes is None else (lanes,)
    aux = tuple(jax.ShapeDtypeStruct((*lead, *a.shape), a.dtype) for a in solve.aux)
    v, *leaves = _compat.host_call(callbacks.finish, (state[2], *aux), number, v)
    return v, leaves
