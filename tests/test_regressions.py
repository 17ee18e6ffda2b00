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
    line = fit_line(list(x), list(y), names=("x", "y"), confidence=confidence)
    wanted = stats.linregress(x, y)
    assert line.slope.value == pytest.approx(wanted.slope)
    assert line.intercept.value == pytest.approx(wanted.intercept)
    assert line.slope.p == pytest.approx(wanted.pvalue, rel=1e-6)
    assert line.r_squared == pytest.approx(wanted.rvalue**2)
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
    first, slope, intercept = text.splitlines()
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
        ([1, 2, 3], [1, math.nan, 3], "not every number in x and y is finite"),
    ],
)
def test_what_has_no_line_is_refused(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_line(x, y, names=("x", "y"))


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        inverse_batch_against_blocks([1, 2, 3], [10, 5, 0])
