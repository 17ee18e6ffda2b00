"""The regressions agree with scipy's, an independent implementation, and say what they cannot do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from morphtrain.evidence.regressions import (
    fit_line,
    inverse_batch_against_blocks,
    memory_against_batch,
    params_against_blocks,
)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 40), st.integers(0, 2**32 - 1), st.floats(0.5, 0.999))
def test_a_line_is_the_one_of_scipy(points: int, seed: int, confidence: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-5, 5, points)
    y = rng.normal(size=points) + rng.normal() * x + rng.normal()
    line = fit_line(list(x), list(y), names=("x", "y"), confidence=confidence, robust=False)
    wanted = stats.linregress(x, y)
    assert line.slope.value == pytest.approx(wanted.slope)
    assert line.intercept.value == pytest.approx(wanted.intercept)
    assert line.slope.p == pytest.approx(wanted.pvalue, rel=1e-6)
    assert line.r_squared == pytest.approx(wanted.rvalue**2)
    assert line.f == pytest.approx(line.slope.t**2)
    assert line.f_p == pytest.approx(wanted.pvalue, rel=1e-6)
    quantile = stats.t.ppf((1 + confidence) / 2, points - 2)
    for found, value, error in (
        (line.slope, wanted.slope, wanted.stderr),
        (line.intercept, wanted.intercept, wanted.intercept_stderr),
    ):
        assert found.standard_error == pytest.approx(error)
        assert found.t == pytest.approx(value / error)
        assert found.p == pytest.approx(2 * stats.t.sf(abs(value / error), points - 2), rel=1e-6)
        assert (found.low, found.high) == pytest.approx((value - quantile * error, value + quantile * error))


def test_one_over_the_batch_is_linear_in_the_blocks() -> None:
    """B = M / (stem + n * block), rounded down as batches are."""
    memory, stem, block = 8e9, 3e5, 4e5
    blocks = range(1, 12)
    line = inverse_batch_against_blocks(blocks, [math.floor(memory / (stem + n * block)) for n in blocks])
    assert line.slope.value == pytest.approx(block / memory, rel=1e-3)
    assert line.intercept.low < stem / memory < line.intercept.high
    assert line.r_squared > 0.9999
    assert not line.exact


def test_a_law_is_told_from_a_sample() -> None:
    line = params_against_blocks([1, 2, 3, 4], [7642, 14650, 21658, 28666])
    assert line.slope.value == pytest.approx(7008)
    assert line.intercept.value == pytest.approx(634)
    assert line.exact
    assert "a law, not a sample" in str(line)


def test_a_line_reads_well() -> None:
    text = str(memory_against_batch([64, 128, 256], [70.1, 133.8, 262.4], confidence=0.9))
    first, slope, intercept, _ = text.splitlines()
    assert "bytes against batch (3 points, R^2 = 0.99" in first
    assert "intervals of 90%" in first
    assert slope.startswith("  slope     1.0")
    for part in ("[", "t = ", "p = "):
        assert part in slope
        assert part in intercept


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2], "2 points.* 3 or more"),
        ([1, 2, 3], [1, 2], "3 values of x and 2 of y"),
        ([1, 1, 1], [1, 2, 3], "every x is 1"),
        ([1, 2, 3], [2, 2, 2], "every y is 2"),
        ([1, 2, 3], [1, math.nan, 3], "not every number in x and y is finite"),
    ],
)
def test_what_has_no_line_is_refused(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_line(x, y, names=("x", "y"))


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        inverse_batch_against_blocks([1, 2, 3], [10, 5, 0])


# NIST's data set Norris (StRD, linear regression, low difficulty), with the certified values.
NORRIS_Y = (
    "0.1 338.8 118.1 888.0 9.2 228.1 668.5 998.5 449.1 778.9 559.2 0.3 0.1 778.1 668.8 339.3 448.9 10.8 557.7 228.3 "
    "998.0 888.8 119.6 0.3 0.6 557.6 339.3 888.0 998.5 778.9 10.2 117.6 228.9 668.4 449.2 0.2"
)
NORRIS_X = (
    "0.2 337.4 118.2 884.6 10.1 226.5 666.3 996.3 448.6 777.0 558.2 0.4 0.6 775.5 666.9 338.0 447.5 11.6 556.0 228.1 "
    "995.8 887.6 120.2 0.3 0.3 556.8 339.1 887.2 999.0 779.0 11.1 118.3 229.2 669.1 448.9 0.5"
)


def test_norris_as_nist_has_certified_it() -> None:
    x, y = ([float(value) for value in text.split()] for text in (NORRIS_X, NORRIS_Y))
    line = fit_line(x, y, names=("x", "y"), robust=False)
    assert line.intercept.value == pytest.approx(-0.262323073774029, rel=1e-8)
    assert line.intercept.standard_error == pytest.approx(0.232818234301152, rel=1e-8)
    assert line.slope.value == pytest.approx(1.00211681802045, rel=1e-8)
    assert line.slope.standard_error == pytest.approx(0.429796848199937e-03, rel=1e-8)
    assert line.r_squared == pytest.approx(0.999993745883712, rel=1e-8)
    assert line.f == pytest.approx(5436385.54079785, rel=1e-8)


def scattered(points: int = 30, growing: bool = False) -> tuple[np.ndarray, np.ndarray]:
    x = np.linspace(1, 10, points)
    return x, 2 * x + np.random.default_rng(0).normal(size=points) * (x**2 / 10 if growing else 1)


def test_intervals_of_the_line_and_of_a_new_point_are_the_closed_forms() -> None:
    x, y = scattered()
    found = fit_line(x, y, names=("x", "y"), robust=False).predict(7.5)
    wanted = stats.linregress(x, y)
    rest = y - wanted.intercept - wanted.slope * x
    variance = (rest**2).sum() / (len(x) - 2)
    error = variance * (1 / len(x) + (7.5 - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
    reach, reach_new = stats.t.ppf(0.975, len(x) - 2) * np.sqrt([error, error + variance])
    mean = wanted.intercept + wanted.slope * 7.5
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - reach, mean + reach), rel=1e-8)
    assert (found.new_low, found.new_high) == pytest.approx((mean - reach_new, mean + reach_new), rel=1e-8)


def test_diagnostics_are_the_closed_forms() -> None:
    x, y = scattered()
    found = fit_line(x, y, names=("x", "y")).diagnostics
    assert found is not None
    wanted = stats.linregress(x, y)
    rest = y - wanted.intercept - wanted.slope * x
    lagrange = len(x) * stats.linregress(x, rest**2).rvalue ** 2
    assert found.breusch_pagan == pytest.approx(stats.chi2.sf(lagrange, 1), rel=1e-8)
    assert found.shapiro_wilk == pytest.approx(stats.shapiro(rest).pvalue, rel=1e-8)
    leverage = 1 / len(x) + (x - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    distance = rest**2 / (2 * (rest**2).sum() / (len(x) - 2)) * leverage / (1 - leverage) ** 2
    assert found.cooks_distance == pytest.approx(distance.max(), rel=1e-8)
    assert found.furthest == distance.argmax()
    assert found.influential == tuple(np.flatnonzero(distance > 4 / len(x)))


def test_unequal_scatter_gets_hc3_errors_and_says_so() -> None:
    x, y = scattered(growing=True)
    line = fit_line(x, y, names=("x", "y"))
    assert line.robust and "errors and tests are HC3" in str(line)
    design = np.column_stack([np.ones_like(x), x])
    inverse = np.linalg.inv(design.T @ design)
    leverage = np.einsum("ij,jk,ik->i", design, inverse, design)
    rest = y - design @ (line.intercept.value, line.slope.value)
    covariance = inverse @ (design.T * (rest / (1 - leverage)) ** 2) @ design @ inverse
    errors = line.intercept.standard_error, line.slope.standard_error
    assert errors == pytest.approx(tuple(np.sqrt(np.diag(covariance))), rel=1e-8)
    assert line.f == pytest.approx(line.slope.t**2, rel=1e-8)
    equal = fit_line(*scattered(), names=("x", "y"))
    assert not equal.robust and "HC3" not in str(equal)


def test_few_points_are_not_checked_and_the_line_says_so() -> None:
    line = fit_line([1, 2, 3, 4], [1.1, 1.9, 3.2, 3.9], names=("x", "y"))
    assert line.diagnostics is None and not line.robust
    assert "not checked: the scatter of fewer than 8 points shows nothing" in str(line)
    with pytest.raises(ValueError, match="one point alone decides the slope"):
        fit_line([1, 1, 1, 2], [1, 2, 3, 4], names=("x", "y"), robust=True)
