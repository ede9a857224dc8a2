"""Limits and texts that both hosts share."""

import math

import pytest

from freevars._solvers.failures import Context, failure, option_matters
from freevars._solvers.verdict import Figures, Limits, accepted
from freevars.errors import NotASolutionError, SingularError

DOUBLE, SINGLE, HALF = 2.0**-52, 2.0**-23, 2.0**-10
GOOD = Figures(True, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
LIMITS = Limits.of(DOUBLE)


@pytest.mark.parametrize("eps", [DOUBLE, SINGLE, HALF, 2.0**-7])
def test_limits_are_ordered_and_grow_with_the_spacing(eps):
    limits, finer = Limits.of(eps), Limits.of(eps / 2)
    assert eps < limits.negligible <= limits.certain <= limits.step < 1
    assert all(a >= b for a, b in zip(limits, finer, strict=True))


def test_a_tolerance_of_the_users_own_asks_for_no_second_step():
    limits = Limits.of(DOUBLE, tol=0.3)
    assert accepted(GOOD._replace(step=0.3, change=1.0), limits)
    assert not accepted(GOOD._replace(step=0.31), limits)


def test_linear_algebra_in_a_finer_dtype_than_the_unknown():
    limits = Limits.of(HALF, SINGLE)
    assert limits.step == HALF**0.25
    assert limits.rcond == 10 * SINGLE


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"finite": False}, NotASolutionError, "not finite"),
        ({"step": 0.02}, NotASolutionError, "move a component by 2.0e-02, relative to its size"),
        ({"step": 1e-3, "change": 0.5}, NotASolutionError, "derivative changes by 5.0e-01"),
        ({"rcond": 1e-16, "conserved": 0.4}, SingularError, "conserved=lambda x"),
        ({"rcond": 1e-16}, SingularError, 'on_failure="least_squares" takes'),
        ({"residual": 0.1}, SingularError, "leaves a residual of 1.0e-01"),
        ({"asymmetry": 0.1}, SingularError, "not symmetric"),
    ],
)
def test_each_figure_has_a_limit_and_a_text(change, error, text):
    figures = GOOD._replace(**change)
    assert accepted(GOOD, LIMITS)
    assert not accepted(figures, LIMITS)
    assert isinstance(told := failure(figures, LIMITS, Context("solve", "root")), error)
    assert text in str(told)
    assert str(told).startswith("solve: ")


@pytest.mark.parametrize("name", ["step", "change", "rcond", "residual", "asymmetry"])
def test_nan_is_never_accepted(name):
    figures = GOOD._replace(step=1e-3)._replace(**{name: math.nan})
    assert not accepted(figures, LIMITS)


def test_least_squares_takes_a_gauge_freedom_and_refuses_kept_totals():
    singular = GOOD._replace(rcond=0.0)
    assert accepted(singular, LIMITS, least_squares=True)
    keeps = singular._replace(conserved=0.4)
    assert not accepted(keeps, LIMITS, least_squares=True)
    told = failure(keeps, LIMITS, Context("solve", "root", least_squares=True))
    assert "conserved=lambda x" in str(told)


def test_a_bound_is_named_and_no_longer_run_proposed():
    at_bound = Context("solve", "argmin", bounded=["x[1] = 0.0"])
    for told in (
        failure(GOOD._replace(step=0.5), LIMITS, at_bound),
        option_matters("solve", "argmin", 0.5, 0.01),
    ):
        text = str(told)
        assert text.startswith("solve: a bound or constraint is active")
        assert "check=False" not in text
        assert "longer" not in text
        assert "Karush-Kuhn-Tucker" in text


def test_a_start_that_came_back_is_told_apart():
    told = failure(GOOD._replace(step=0.5), LIMITS, Context("solve", "root", at_start=True))
    assert "returned its starting point" in str(told)


def test_advice_is_about_what_is_not_done_yet():
    stopped = GOOD._replace(step=0.5)
    advice = str(failure(stopped, LIMITS, Context("solve", "root")))
    assert "polish=True" in advice
    advice = str(failure(stopped, LIMITS, Context("solve", "root", polish=True)))
    assert "polish" not in advice
    assert "longer" in advice
