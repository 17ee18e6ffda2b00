"""Whether calibrated times allow for what others did on the machine meanwhile. Light to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Times as the clock had them, and what stands for them where the machine was measured.
CALIBRATED = {
    "train_seconds": "calibrated_train_seconds",
    "epoch_seconds": "calibrated_seconds",
    "time_to_accuracy": "calibrated_time_to_accuracy",
}
RAW_TIMES = {*CALIBRATED, "data_seconds", "morph_seconds", "samples_per_second"}


def is_calibrated(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether the machine was measured again while these epochs of a run were trained.

    With the one measurement before them, their calibrated times are the clock's times a constant: what disturbed some
    epochs is in them as it is in the clock's.
    """
    measured = [record.get("reference_seconds") for record in history]
    return None not in measured and len(set(measured)) > 1
