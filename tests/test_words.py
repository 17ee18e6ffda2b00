"""Numbers are read with as many digits as they are known to."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphtrain.evidence import words


@given(st.floats(-1e4, 1e4), st.floats(1e-5, 1e3), st.booleans())
def test_an_interval_has_two_digits_of_its_width(value: float, width: float, signed: bool) -> None:
    low, high = value - width / 3, value + 2 * width / 3
    numbers = [
        float(text.replace(",", ""))
        for text in re.findall(r"[-+]?[\d.,]*\d(?:e[-+]\d+)?", words.interval(value, low, high, signed=signed))
    ]
    assert len(numbers) == 3
    assert all(
        abs(number - true) <= 0.05 * width + 1e-6 * abs(value)
        for number, true in zip(numbers, (value, low, high), strict=True)
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (77850.0, "77,850"),
        (0.99632, "0.9963"),
        (12345.6, "12,346"),
        (3.0, "3"),
        (1.5e-6, "1.5e-06"),
        (math.nan, words.UNKNOWN),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert words.number(value) == text


def test_what_has_no_interval_shows_none() -> None:
    assert words.interval(0.5, None, None, signed=True) == "+0.5"
    assert words.interval(7008.0, 7008.0, 7008.0) == "7008 [7008, 7008]"


def test_p_is_never_zero() -> None:
    assert words.p_value(0.0) == "p < 0.0001"
    assert words.p_value(0.0123) == "p = 0.012"


def test_which_direction_is_better() -> None:
    found = [words.better(name) for name in ("val_loss", "test_accuracy", "time_to_accuracy", "batch_size")]
    assert found == ["less is better", "more is better", "less is better", ""]


def test_lists_read_as_sentences() -> None:
    assert [words.listed(["a", "b", "c"][:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
