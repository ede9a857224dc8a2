"""A solver on the host inside a compiled program, without calling JAX from a callback.

A callback that itself runs compiled code can deadlock: it may wait for a thread that waits for the
callback. So the roles are exchanged here. The solver runs in a Python thread of its own and never
touches JAX (`solver_thread`); the compiled program is a loop that fetches the solver's next
query, answers it with its own compiled code, and brings the answer along when it fetches the
next. A callback only hands arrays from one thread to another, the captured values never leave the
device, and a solve inside a solve is just a loop inside a loop.

No callback raises: one device that stops would leave others waiting for it. A failure is passed on
like a query; it ends the loop on every device, and each of them raises it then. Not here: when to
use this at all (`on_host`), and which devices there are (`devices`).
"""

from __future__ import annotations

import functools
import itertools
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freevars.jax import _compat
from freevars.jax._host.devices import Devices
from freevars.jax._host.oracle import Oracle, evaluate
from freevars.jax._host.solver_thread import BatchShape, HostSolverError, Solve, SolverThread

__all__ = ["call_staged"]

# The solvers at work, by the number that their program knows them under.
_RUNNING: dict[int, SolverThread] = {}
_NUMBERS = itertools.count(1)

_TEXT = 4096  # bytes of an error, as far as they go to all devices


class _Callbacks:
    """The functions that the program calls. Each call but the last returns what comes next: the
    number of the solver, the kind of query (1 + its position in `kinds`, `done`, or `failed`), the
    point and the block of directions."""

    def __init__(
        self, solve: Solve, shape: BatchShape, kinds: Sequence[str], devices: Devices
    ) -> None:
        self.solve = solve
        self.shape = shape
        self.kinds = kinds
        self.devices = devices
        self.done = len(kinds) + 1
        self.failed = self.done + 1

    def begin(self, same: Any, v0: Any, *arrays: Any) -> tuple[Any, ...]:
        # Copies: the program's memory is its own again once the callback has returned.
        v0, *rest = [np.array(a) for a in (v0, *arrays)]
        running = SolverThread(self.solve, v0, rest)
        number = next(_NUMBERS)
        _RUNNING[number] = running
        running.start(lambda: self.devices.check_is_same(same))
        return self._next(number)

    def carry_on(self, kind: str, number: Any, *results: Any) -> tuple[Any, ...]:
        del kind
        # A copy, since the program's memory is its own again after the callback.
        _RUNNING[int(number)].reply([np.array(r) for r in results])
        return self._next(int(number))

    def _next(self, number: int) -> tuple[Any, ...]:
        running = _RUNNING[number]
        v, block = np.zeros(self.shape.vector), np.zeros(self.shape.block)
        if running.error is not None:
            return number, self.failed, v, block
        if running.result is not None:
            return number, self.done, running.result[0], block
        assert running.pending is not None  # noqa: S101 (one of the three)
        kind, point, rows = running.pending
        block[..., : rows.shape[-2], :] = rows
        return number, 1 + self.kinds.index(kind), point, block

    def finish(self, number: Any, v: Any) -> tuple[Any, ...]:
        # The solution passes through, so that this call cannot be removed as dead code, leaving the
        # solver running.
        running = _RUNNING.pop(int(number))
        text = np.zeros(_TEXT, np.uint8)
        if running.error is None:
            assert running.result is not None  # noqa: S101 (the loop ends with one of them)
            return (v, *running.result[1], text)
        said = _shown(self.solve.name, running.error)
        text[: len(said)] = np.frombuffer(said, np.uint8)
        lead = self.shape.lead
        return (v, *(np.zeros((*lead, *a.shape), a.dtype) for a in self.solve.aux), text)


def _shown(name: str, error: BaseException) -> bytes:
    """An error as text, which is all that a program can pass on."""
    said = f"the solver {name} on the host raised {type(error).__name__}: {error}".encode()
    where = "".join(traceback.format_exception(error)).encode()
    return (said[: _TEXT // 2] + b"\n\n" + where[-(_TEXT // 2 - 2) :])[:_TEXT]


def _raise(text: Any, *_: Any) -> Any:
    said = np.asarray(text).tobytes().rstrip(b"\0")
    raise HostSolverError(said.decode(errors="replace"))


def call_staged(
    solve: Solve,
    oracle: Oracle,
    problem: Any,
    v0: Any,
    arrays: Sequence[Any],
    *,
    lanes: int | None = None,
    problem_axes: Any = None,
) -> tuple[Any, list[Any]]:
    """The solution as a vector and the aux leaves, traced into the program under way.

    With `lanes`, v0, `arrays` and the results have a leading axis of that size; `problem_axes` says
    which leaves of `problem` do, as the `in_axes` of `jax.vmap`. One solver is given the batch.
    """
    struct = oracle.layout.struct()
    shape = BatchShape(struct.size, lanes)
    devices = Devices.of(_batched(oracle.all_values, problem_axes, lanes), problem, v0, arrays)
    callbacks = _Callbacks(solve, shape, oracle.kinds(), devices)
    state = (
        jax.ShapeDtypeStruct((), jnp.int32),  # the number of the solver
        jax.ShapeDtypeStruct((), jnp.int32),  # what comes next: start (0), a query, or an end
        jax.ShapeDtypeStruct(shape.vector, struct.dtype),
        jax.ShapeDtypeStruct(shape.block, struct.dtype),
    )

    def compute(kind: str, v: Any, block: Any) -> Any:
        def one(problem: Any, v: Any, block: Any) -> Any:
            if kind.endswith("products"):
                product = kind.removesuffix("s")
                return jax.vmap(lambda d: evaluate(product, oracle, problem, v, d))(block)
            return evaluate(kind, oracle, problem, v, block[0])

        one = _batched(one, problem_axes, lanes)
        values = one(problem, v, block)
        slopes = [oracle.is_slope(kind, i) for i in range(len(values))]
        return [devices.answer(x, slope=s) for x, s in zip(values, slopes, strict=True)]

    def start(number: Any, v: Any, block: Any) -> Any:
        del number, block
        return devices.call(callbacks.begin, state, devices.is_same(v), v, *arrays)

    def answering(kind: str) -> Callable[..., Any]:
        carry_on = functools.partial(callbacks.carry_on, kind)

        def branch(number: Any, v: Any, block: Any) -> Any:
            return devices.call(carry_on, state, number, *compute(kind, v, block))

        return branch

    branches = [start, *map(answering, callbacks.kinds)]

    def step(carry: Any) -> Any:
        number, now, v, block = carry
        return tuple(jax.lax.switch(now, branches, number, v, block))

    first = (jnp.int32(0), jnp.int32(0), v0, jnp.zeros(shape.block, struct.dtype))
    number, now, v, _ = jax.lax.while_loop(
        lambda carry: carry[1] < callbacks.done, step, devices.vary(first)
    )
    aux = tuple(jax.ShapeDtypeStruct((*shape.lead, *a.shape), a.dtype) for a in solve.aux)
    text = jax.ShapeDtypeStruct((_TEXT,), jnp.uint8)
    *found, said = devices.call(callbacks.finish, (state[2], *aux, text), number, v)

    def fail(found: list[Any]) -> list[Any]:
        # Everything that the solver returns passes through, for the same reason as in `finish`.
        del found
        return devices.vary(_compat.host_call(_raise, (state[2], *aux), said, everywhere=True))

    v, *leaves = jax.lax.cond(now == callbacks.failed, fail, lambda found: found, found)
    return v, leaves


def _batched(function: Callable[..., Any], problem_axes: Any, lanes: int | None) -> Any:
    """`function(problem, *vectors)`, over the lanes if there are any."""
    if lanes is None:
        return function
    return lambda problem, *vectors: jax.vmap(
        function, in_axes=(problem_axes, *[0] * len(vectors))
    )(problem, *vectors)
