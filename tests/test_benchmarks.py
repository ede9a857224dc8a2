"""The benchmarks' own parts: turns are timed, and a figure over its target is shown as missed."""

import subprocess
import sys
import time

import pytest

from benchmarks._table import Row, seconds, show
from benchmarks._timing import alternate


def test_a_ratio_is_against_the_first_side() -> None:
    timing = alternate(lambda: time.sleep(0.002), lambda: time.sleep(0.01), budget=0.0)
    assert timing.ratios[0] == 1.0
    assert timing.ratios[1] > 2.0
    assert timing.seconds[1] > 0.01


def test_a_miss_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    rows = show(
        "title", [Row("good", 1.1, 1.25), Row("bad", 1.2501, 1.25), Row("nan", float("nan"), 1)]
    )
    assert [row.met for row in rows] == [True, False, False]
    *_, good, bad, nan = capsys.readouterr().out.splitlines()
    assert "| yes" in good
    assert "| MISSED" in bad
    assert "| MISSED" in nan


def test_times_are_shown_for_a_reader() -> None:
    assert [seconds(t) for t in (1.234e-5, 0.0456, 7.0)] == ["12.3 us", "45.6 ms", "7 s"]


@pytest.mark.slow
def test_memory_of_one_side_is_measured_in_its_own_process() -> None:
    command = [sys.executable, "-m", "benchmarks.memory", "Closure", "converted"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(printed.stdout) < 20.0
