"""The benchmarks of the rules still run: every row is there and every figure is a number.

One turn of each side, on small data; nothing is judged by time.
"""

import functools
import math
import re
import warnings
from pathlib import Path

import jax
import pytest

import freevars.jax as fv
from benchmarks import _timing

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # jaxopt's, about itself
    from benchmarks import behaviour, torch_behaviour

PAGE = Path(__file__).parents[2] / "docs" / "behaviour.md"
OURS = "freevars"


pytestmark = pytest.mark.slow  # each test compiles rules with their systems and checks


@pytest.fixture
def one_turn(monkeypatch):
    """Each side runs three times: to compile, to be counted and to be timed."""
    monkeypatch.setattr(_timing, "FEWEST_TURNS", 1)
    monkeypatch.setattr(_timing, "SHORTEST_SAMPLE", 0.0)
    return lambda *sides, **_: _timing.alternate(*sides, budget=0.0)


def _figures(rows):
    return {row.case: [row.figure, *(value for _, value in row.peers)] for row in rows}


def _all_finite(figures):
    return all(math.isfinite(x) and x > 0 for values in figures.values() for x in values)


def test_the_table_of_rules(monkeypatch, one_turn):
    from benchmarks import rules

    small = {"alternate": one_turn, "SAMPLES": 20, "FEATURES": 3, "X0": rules.X0[:3]}
    for name, value in small.items():
        monkeypatch.setattr(rules, name, value)
    monkeypatch.setattr(rules, "installed", lambda _: False)  # the peers take long to compile
    monkeypatch.setattr(rules, "memory", lambda: iter(()))  # processes of their own; see below
    figures = _figures(rules.rows())
    assert len(figures) == 4
    assert _all_finite(figures)
    used = {name: rules.compiled_memory(name, 100) for name in rules.MEMORY}
    assert 0 < used[OURS] < used["unrolled"]


def test_the_table_of_host_solvers(monkeypatch, one_turn):
    pytest.importorskip("sklearn")
    from benchmarks import host

    def few():
        return jax.tree.map(lambda a: a[:60], whole())

    whole = host.load
    monkeypatch.setattr(host, "load", few)
    monkeypatch.setattr(host, "alternate", one_turn)
    figures = _figures(host.rows())
    assert len(figures) == 10
    assert _all_finite(figures)


def test_the_table_of_integrals(monkeypatch, one_turn):
    from benchmarks import integrals

    monkeypatch.setattr(integrals, "alternate", one_turn)
    figures = _figures(integrals.rows())
    assert len(figures) == 3 + sum(map(integrals.installed, ("diffrax", "torchdiffeq")))
    assert _all_finite(figures)


def test_the_table_of_quadratic_programs(monkeypatch, one_turn):
    pytest.importorskip("clarabel")
    from benchmarks import torch_qps

    monkeypatch.setattr(torch_qps, "alternate", one_turn)
    figures = _figures(torch_qps.rows())
    assert len(figures) == 2
    assert _all_finite(figures)


def test_the_table_of_torch_rules(monkeypatch, one_turn):
    from benchmarks import torch_rules

    monkeypatch.setattr(torch_rules, "alternate", one_turn)
    figures = _figures(torch_rules.rows())
    assert len(figures) == 4
    assert _all_finite(figures)


def test_the_table_of_torch_conversions_on_a_device(monkeypatch, one_turn):
    import torch

    from benchmarks import torch_convert

    monkeypatch.setattr(torch_convert, "alternate", one_turn)
    monkeypatch.setattr(torch_convert, "finished", lambda side, _: side)  # nothing is launched
    figures = _figures(torch_convert.on(torch.device("cpu")))
    assert len(figures) == len(list(torch_convert.cases()))
    assert _all_finite(figures)


def test_a_conversion_without_names():
    from benchmarks import captures, convert

    plain = convert.chain(6, [convert.X, 2 * convert.X])
    with captures.without_names():
        bare = fv.Closure(plain, convert.X)
    assert len(bare.values) == 2
    assert jax.tree.structure(bare) == jax.tree.structure(fv.Closure(plain, convert.X))


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def test_a_cell_tells_a_wrong_number_and_an_error():
    wrong = lambda _: [3.0]
    value = behaviour.COMPOSITIONS["value"]
    assert behaviour.cell(value, wrong).startswith("wrong: 3.0")
    assert behaviour.cell(value, lambda _: {}["nothing"]) == "KeyError"


def test_the_page_is_what_the_script_prints():
    """Its titles, columns and rows, and that ours passes all; the peers' cells need the peers."""
    tables = re.findall(r"(?:^\|.*\n)+", PAGE.read_text(), re.MULTILINE)
    cells = [
        [[c.strip() for c in line.split("|")[1:-1]] for line in t.splitlines()] for t in tables
    ]
    want = [
        (behaviour.COMPOSITIONS, behaviour.ROWS),
        (behaviour.KINDS, behaviour.ROWS),
        (behaviour.COMPOSITIONS | behaviour.KINDS, behaviour.ON_HOST),
        (torch_behaviour.COLUMNS, torch_behaviour.ROWS),
    ]
    assert len(cells) == len(want)
    for (head, _, *lines), (columns, rows) in zip(cells, want, strict=True):
        assert [line[0] for line in lines] == list(columns)
        assert head[1] == OURS
        assert all(line[1] == "ok" for line in lines)
        # A peer that is not installed here is in the page all the same.
        assert [name for name in head[1:] if name in rows] == list(rows)
    values = functools.reduce(
        list.__add__, ([c for line in t[2:] for c in line[1:]] for t in cells)
    )
    assert set(values) - {"ok"}
    assert all(re.fullmatch(r"ok|wrong: .*|\w+", v) for v in values)
