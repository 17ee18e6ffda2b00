"""Whether calibrated times of a run allow for what disturbed it."""

from __future__ import annotations

from typing import Any

import pytest

from morphtrain.evidence.calibration import is_calibrated, why_not_calibrated


def epochs(*calibrated: float, disturbed: int, **more: Any) -> list[dict[str, float]]:
    """Records with these calibrated times, the last `disturbed` of them contended, each after a measurement."""
    first = len(calibrated) - disturbed
    return [
        {
            **{"calibrated_seconds": seconds, "contended": float(number >= first), "reference_seconds": number / 100},
            **{name: values[number] for name, values in more.items()},
        }
        for number, seconds in enumerate(calibrated)
    ]


def test_a_disturbance_that_calibrating_has_left_in_is_found() -> None:
    """Two threads beside a stranger: training took 20 times as long, the reference 1.5 times."""
    assert is_calibrated(epochs(0.70, 0.62, 0.67, 0.72, disturbed=1))
    history = epochs(0.70, 0.62, 0.67, 10.6, disturbed=1)
    assert not is_calibrated(history)
    assert why_not_calibrated(history) == "calibrated times still show what disturbed them"
    assert not is_calibrated(epochs(0.70, 0.62, 10.6, 0.67, disturbed=2)), "whichever epoch it is"


def test_other_work_is_no_disturbance() -> None:
    slow = (0.2, 0.2, 0.7, 0.7)
    changed = epochs(*slow, disturbed=2, changed=[0.0, 1.0, 0.0, 0.0])
    assert is_calibrated(changed), "the wider network takes longer"
    assert is_calibrated(epochs(*slow, disturbed=2, image_size=[20.0, 20.0, 28.0, 28.0]))
    assert is_calibrated(epochs(*slow, disturbed=2, share_trained=[0.3, 0.3, 1.0, 1.0]))
    assert not is_calibrated(epochs(*slow, disturbed=2, share_trained=[0.3, 0.31, 0.32, 0.33])), "nearly as many images"
    assert is_calibrated(epochs(*slow, disturbed=2, batch_size=[256.0, 256.0, 32.0, 32.0]))
    assert not is_calibrated(epochs(*slow, disturbed=2, batch_size=[32.0] * 4))
    assert is_calibrated(epochs(*slow, disturbed=2, processes=[2.0, 2.0, 1.0, 1.0]))
    assert is_calibrated(epochs(0.2, 0.2, 0.9, disturbed=1, warmup=[0.0, 0.0, 1.0])), "warm-up is no measure"


def test_an_epoch_that_begins_something_takes_longer() -> None:
    """As the first one does, which is warm-up: code is compiled in it, or a resumed run begins with it."""
    begins = [0.0, 0.0, 8.5, 0.0]
    compiled = epochs(0.2, 0.2, 9.0, 0.1, disturbed=1, compile_seconds=begins)
    compiled[2]["contended"] = 1.0
    assert is_calibrated(compiled)
    slower = epochs(0.1, 0.1, 9.0, 0.2, disturbed=2, compile_seconds=begins)
    assert is_calibrated(slower), "the code is other code than before"
    resumed = epochs(0.2, 0.2, 0.5, 0.2, disturbed=2, setup_seconds=begins)
    assert is_calibrated(resumed)
    resumed[3]["calibrated_seconds"] = 9.0
    assert not is_calibrated(resumed), "later epochs are like those before"


def test_with_nothing_undisturbed_to_compare_with_the_measurements_count() -> None:
    assert is_calibrated(epochs(0.7, 2.0, disturbed=2))


@pytest.mark.parametrize("left_in", [0.62, 10.6])
def test_with_one_measurement_calibrated_times_are_the_clocks(left_in: float) -> None:
    history = [{**record, "reference_seconds": 0.01} for record in epochs(0.7, left_in, disturbed=1)]
    assert why_not_calibrated(history) == "the machine was measured too seldom to calibrate them"
    for record in history:
        del record["reference_seconds"]
    assert why_not_calibrated(history) == "timing.reference=0 calibrates none"
