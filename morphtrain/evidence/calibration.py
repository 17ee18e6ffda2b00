"""Whether calibrated times allow for what others did on the machine meanwhile. Light to import."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

# Times as the clock had them, and what stands for them where the machine was measured.
CALIBRATED = {
    "train_seconds": "calibrated_train_seconds",
    "epoch_seconds": "calibrated_seconds",
    "time_to_accuracy": "calibrated_time_to_accuracy",
}
RAW_TIMES = {*CALIBRATED, "data_seconds", "morph_seconds", "samples_per_second"}


# A disturbed epoch whose calibrated time is longer than this many times that of undisturbed ones has not been
# calibrated. Two threads beside a stranger have trained 20 times as slowly, where the reference lost a third.
STEADY = 1.5
SAME_WORK = ("params", "batch_size", "image_size", "share_trained")  # of two epochs between two changes

Record = Mapping[str, float]


def is_calibrated(history: Sequence[Record]) -> bool:
    """Whether calibrated times of these epochs of a run allow for what disturbed some of them."""
    return not why_not_calibrated(history)


def why_not_calibrated(history: Sequence[Record]) -> str:
    """Why the calibrated times of these epochs of a run do not allow for what disturbed some; "" if they do.

    With one measurement of the machine, before them, calibrated times are the clock's times a constant. With more, they
    still show a disturbance that slows training down more than it does the reference.
    """
    measured = [record.get("reference_seconds") for record in history]
    if None in measured:
        return "timing.reference=0 calibrates none"
    if len(set(measured)) == 1:
        return "the machine was measured too seldom to calibrate them"
    if any(map(_is_disturbed, _same_work(history))):
        return "calibrated times still show what disturbed them"
    return ""


def _same_work(history: Sequence[Record]) -> list[list[Record]]:
    """The epochs after the warm-up that can be compared: of one network, with batches, images and data alike."""
    found: dict[tuple[float | None, ...], list[Record]] = defaultdict(list)
    network = 0.0
    for record in history:
        if not record.get("warmup"):
            found[(network, *map(record.get, SAME_WORK))].append(record)
        network += record.get("changed", 0.0)
    return list(found.values())


def _is_disturbed(epochs: Sequence[Record]) -> bool:
    """Whether an epoch that others disturbed is still too long when calibrated."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for record in epochs:
        if "calibrated_seconds" in record:
            times[bool(record.get("contended"))].append(record["calibrated_seconds"])
    return bool(times[False]) and max(times[True], default=0.0) > STEADY * statistics.median(times[False])
