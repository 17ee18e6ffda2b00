"""The search for the largest batch: exact where it should be, sparing with trials, and never an untested answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphtrain.cost.search import largest_fitting
from morphtrain.cost.throughput import knee


class Device:
    """Holds batches up to `limit`, and remembers what was tried."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tried: list[int] = []

    def fits(self, batch_size: int) -> bool:
        self.tried.append(batch_size)
        return batch_size <= self.limit


@given(st.integers(0, 5000), st.integers(1, 5000), st.sampled_from([0, 0.01, 0.2]))
def test_the_answer_was_tried_and_what_lies_beyond_it_fails(limit: int, guess: int, tolerance: float) -> None:
    device = Device(limit)
    found = largest_fitting(device.fits, guess, tolerance)
    assert found <= limit
    assert limit < found + max(1, tolerance * found) + 1e-9
    assert found in device.tried or found == 0
    assert len(set(device.tried)) == len(device.tried)
    assert min(device.tried) >= 1
    if tolerance == 0:
        assert found == limit


@pytest.mark.parametrize(("error", "trials"), [(0.0, 5), (0.03, 5), (-0.03, 6), (-0.2, 8), (0.3, 9)])
def test_a_good_guess_needs_few_trials(error: float, trials: int) -> None:
    device = Device(1000)
    found = largest_fitting(device.fits, round(1000 * (1 + error)))
    assert 990 <= found <= 1000
    assert len(device.tried) <= trials


def test_where_not_even_one_sample_fits_there_is_none() -> None:
    assert largest_fitting(Device(0).fits, 700) == 0


def test_the_knee_is_the_smallest_of_the_fast() -> None:
    assert knee({2: 10, 4: 94, 8: 96, 16: 100, 32: 99}) == 8
    assert knee({2: 100, 4: 90, 8: 80}) == 2
    assert knee({64: 5}) == 64
