"""The table at the end of a multirun, against SciPy and against what the runs have recorded."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from conftest import SMALL, Command
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from morphtrain.evidence.analyses.values import mean
from morphtrain.evidence.repeats import estimate, geometric, paired_ratio, share
from morphtrain.sweep.multirun import FinishedRun, finished_runs, notes, table

VALUES = st.lists(st.floats(0.1, 100), min_size=1, max_size=9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=VALUES)
def test_an_interval_is_that_of_a_t_test(values: list[float]) -> None:
    found = estimate(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    if len(values) < 3:
        assert (found.low, found.high) == (None, None), "no spread is made up of one or two values"
    elif len(set(values)) > 1:
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx(tuple(expected))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pairs=st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=3, max_size=8))
def test_a_ratio_is_paired_and_its_inverse_is_the_inverse(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = ({seed: pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    ratio, inverse = paired_ratio(ours, theirs), paired_ratio(theirs, ours)
    assert ratio is not None and inverse is not None and ratio.low is not None and inverse.high is not None
    assert ratio.mean * inverse.mean == pytest.approx(1)
    assert ratio.low * inverse.high == pytest.approx(1)
    logs = [math.log(a / b) for a, b in pairs]
    assert ratio.mean == pytest.approx(stats.gmean([a / b for a, b in pairs]))
    if statistics.stdev(logs) > 1e-9:
        interval = stats.ttest_rel([math.log(a) for a, _ in pairs], [math.log(b) for _, b in pairs])
        assert math.log(ratio.low) == pytest.approx(interval.confidence_interval(0.95).low, abs=1e-6)
    assert paired_ratio({1: 2.0}, {2: 1.0}) is None, "no seed in common"


def test_means_have_intervals_of_possible_values() -> None:
    found, inverse = geometric([1.0, 4.0, 40.0]), geometric([1.0, 0.25, 0.025])
    assert found.low is not None and inverse.high is not None
    assert found.low > 0 and found.low * inverse.high == pytest.approx(1)
    assert (share([0.0, 0.0, 0.1]).low, share([1.0, 0.9, 1.0]).high) == (0, 1)
    assert mean("val_loss", "ratio", [1.0, 4.0]).mean == pytest.approx(2)
    assert mean("params", "difference", [1.0, 4.0]).mean == 2.5
    with pytest.raises(ValueError, match="above 0"):
        geometric([0.0, 1.0])


def run(
    option: str, seed: int, seconds: float, contended: bool = False, calibrated: float | None = None, measured: int = 2
) -> FinishedRun:
    record = {"val_accuracy": 0.9, "params": 10.0, "train_seconds": seconds, "contended": float(contended)}
    more = {} if calibrated is None else {"calibrated_train_seconds": calibrated}
    history = [{**record, **more, "changed": 0.0} for _ in range(2)]
    if calibrated is not None:
        history = [{**record, "reference_seconds": float(n % measured)} for n, record in enumerate(history)]
    return FinishedRun((f"prune={option}", "epochs=3"), seed, option != "none", history)


def printed(runs: list[FinishedRun]) -> list[str]:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table(runs, ["train_seconds"]))
    return [*capture.get().splitlines(), *notes(runs, unfinished=0)]


def test_under_contention_calibrated_times_stand_in_or_none() -> None:
    """Raw, pruning took half the time; the machine was busy while the others trained."""
    seeds = range(1, 4)
    calibrated = [run("none", s, 9.0, contended=True, calibrated=4.0) for s in seeds]
    calibrated += [run("prunetrain", s, 4.5, calibrated=4.0) for s in seeds]
    lines = printed(calibrated)
    (row,) = (line for line in lines if "prune=prunetrain" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["prune=prunetrain", "3", "4", "0.9", "10", "1"]
    assert "3 of 6 runs had contended epochs: calibrated times compare" in lines
    raw = [run("none", s, 9.0, contended=True) for s in seeds] + [run("prunetrain", s, 4.5) for s in seeds]
    lines = printed(raw)
    assert not any("time / first" in line for line in lines)
    assert "3 of 6 runs had contended epochs: times do not compare (timing.reference=0)" in lines
    seldom = [run("none", s, 9.0, contended=True, calibrated=4.0, measured=1) for s in seeds] + calibrated[3:]
    lines = printed(seldom)
    assert not any("time / first" in line for line in lines)
    why = "the machine was measured too seldom to calibrate them"
    assert f"3 of 6 runs had contended epochs: times do not compare ({why})" in lines


def test_a_multirun_over_seeds_ends_with_what_each_configuration_gave(command: Command, tmp_path: Path) -> None:
    small = [key for key in SMALL if not key.startswith("prune")]
    grid = ("-m", "prune=none,prunetrain", "seed=1,2,3", "epochs=2", "tracking=none", "hydra.sweep.dir=grid")
    result = command(*small, *grid, "model.blocks=1", "data.train_samples=64")
    assert result.returncode == 0, result.stderr
    assert "next:" not in result.stdout, "a multirun chooses the next run itself"
    end = result.stdout[result.stdout.index("6 runs of 2 configurations") :]
    runs, unfinished = finished_runs(tmp_path / "grid")
    assert (len(runs), unfinished) == (6, 0)
    accuracies = []
    for job in range(6):
        last = (tmp_path / "grid" / str(job) / "records.jsonl").read_text().splitlines()[-1]
        accuracies.append(json.loads(last)["val_accuracy"])
    for option, values in (("none", accuracies[::2]), ("prunetrain", accuracies[1::2])):
        (row,) = (line for line in end.splitlines() if f"prune={option}" in line)
        spread = stats.ttest_1samp(values, 0).confidence_interval(0.95).high - statistics.mean(values)
        assert f"{statistics.mean(values):.4g} ± {spread:.2g}" in row
    assert "3 of the 3 runs that were meant to change their network did not" in end, "start_epoch is above epochs"
    (tmp_path / "grid" / "5" / "run.png").unlink()
    assert finished_runs(tmp_path / "grid")[1] == 1
