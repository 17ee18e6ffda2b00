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
# Of two epochs between two changes of the network, or of the code that is compiled for it. The share of the images that
# InfoBatch trains on is another in each.
SAME_WORK = ("params", "batch_size", "image_size", "processes")

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
    """The epochs after the warm-up whose times for an image can be compared: one network, batches and sizes alike.

    Not those in which something was compiled or profiled, or with which a process began to train: they take longer.
    """
    found: dict[tuple[float | None, ...], list[Record]] = defaultdict(list)
    changes = 0
    for record in history:
        compiled = record.get("compile_seconds", 0) > 0
        longer = record.get("warmup") or record.get("profiled") or record.get("setup_seconds", 0) > 0
        if not (longer or compiled):
            found[(changes, *map(record.get, SAME_WORK))].append(record)
        changes += compiled or bool(record.get("changed"))
    return list(found.values())


def _is_disturbed(epochs: Sequence[Record]) -> bool:
    """Whether an epoch that others disturbed is still too long when calibrated."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for record in epochs:
        if "calibrated_seconds" in record:
            seconds = record["calibrated_seconds"] / record.get("share_trained", 1.0)
            times[bool(record.get("contended"))].append(seconds)
    return bool(times[False]) and max(times[True], default=0.0) > STEADY * statistics.median(times[False])
