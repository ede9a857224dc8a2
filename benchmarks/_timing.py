"""Time several ways to do one thing, side by side.

Only ratios taken in one run mean anything on a shared machine, so the sides take turns, and a ratio
is the median over the turns of the quotient within one turn: a slow moment hits both of its halves.
Not here: what is measured, and what is good enough.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Side = Callable[[], object]

SHORTEST_SAMPLE = 1e-3  # seconds; well above the clock's resolution and one scheduler hiccup
FEWEST_TURNS = 9
BUDGET = 1.0  # of each budget, this part is used: less for a quick look


def hurry() -> None:
    """A quick look: fewer turns, so that a ratio is right to some ten percent."""
    global BUDGET, FEWEST_TURNS
    BUDGET, FEWEST_TURNS = 0.1, 2


@dataclass(frozen=True)
class Timing:
    """``seconds[i]``: the median time of one call of side i; ``ratios[i]``: against side 0."""

    seconds: tuple[float, ...]
    ratios: tuple[float, ...]


def alternate(*sides: Side, budget: float = 1.5) -> Timing:
    """Times the sides in turns for about ``budget`` seconds in all, at least nine turns (two in a
    quick look).

    A side does its whole work, waiting for the device included, before it returns. Collections of
    garbage happen between the samples, never within one.
    """
    gc.collect()
    gc.freeze()  # what lives already is not looked at again, which makes each collection quick
    counts = [_calls_per_sample(side) for side in sides]
    samples: list[list[float]] = [[] for _ in sides]
    began = time.perf_counter()
    turn = 0
    while turn < FEWEST_TURNS or time.perf_counter() - began < budget * BUDGET:
        order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))
        for i in order:
            samples[i].append(_sample(sides[i], counts[i]))
        turn += 1
    gc.unfreeze()
    return Timing(
        tuple(statistics.median(times) for times in samples),
        tuple(
            statistics.median(own / base for own, base in zip(times, samples[0], strict=True))
            for times in samples
        ),
    )


def _calls_per_sample(side: Side) -> int:
    side()  # whatever compiles or fills a cache does it here
    count = 1
    while _sample(side, count) * count < SHORTEST_SAMPLE:
        count *= 2
    return count


def _sample(side: Side, count: int) -> float:
    """Seconds per call, over ``count`` calls in a row."""
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        for _ in range(count):
            side()
        return (time.perf_counter() - began) / count
    finally:
        gc.enable()
