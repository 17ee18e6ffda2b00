"""rliable's aggregates, against scipy and their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from morphtrain.evidence.aggregates import interquartile_mean, probability_of_improvement

TASKS = st.lists(st.lists(st.integers(0, 9).map(float), min_size=2, max_size=6), min_size=1, max_size=3)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(tasks=TASKS)
def test_the_interquartile_mean_is_that_of_all_runs(tasks: list[list[float]]) -> None:
    found = interquartile_mean(tasks)
    every = sorted(value for runs in tasks for value in runs)
    cut = len(every) // 4
    assert found.effect == pytest.approx(np.mean(every[cut : len(every) - cut]), rel=1e-8, abs=1e-8)
    assert found.low <= found.high
    assert (found.n, found.tasks) == (len(every), len(tasks))


def test_one_run_that_failed_does_not_move_it() -> None:
    runs = [0.8, 0.81, 0.82, 0.83]
    assert interquartile_mean([runs]).effect == interquartile_mean([[-100.0, *runs[1:]]]).effect


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data(), tasks=TASKS)
def test_the_probability_of_improvement_is_mann_and_whitneys_u(data: st.DataObject, tasks: list[list[float]]) -> None:
    run = st.lists(st.integers(0, 9).map(float), min_size=2, max_size=6)
    theirs = data.draw(st.lists(run, min_size=len(tasks), max_size=len(tasks)))
    shares = [stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(tasks, theirs, strict=True)]
    found = probability_of_improvement(tasks, theirs)
    assert found.effect == pytest.approx(np.mean(shares), rel=1e-8, abs=1e-8)
    assert 0 <= found.low <= found.high <= 1
    assert found.effect + probability_of_improvement(theirs, tasks).effect == pytest.approx(1)


def test_runs_are_resampled_within_their_task() -> None:
    """Each task's runs are alike, the tasks are far apart: nothing but the choice of tasks could scatter."""
    found = interquartile_mean([[1.0] * 4, [5.0] * 4])
    assert (found.low, found.effect, found.high) == (3.0, 3.0, 3.0)


def test_what_cannot_be_resampled_is_refused() -> None:
    with pytest.raises(ValueError, match="two or more finite numbers"):
        interquartile_mean([[1.0]])
    with pytest.raises(ValueError, match="1 tasks and 2"):
        probability_of_improvement([[1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]])
