"""Times that sum up a run so far in one number, for comparing and searching."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

NEVER = 1e9  # seconds, 32 years: longer than any run takes

Record = Mapping[str, float]


def median_epoch_seconds(history: Sequence[Record]) -> float:
    """Median seconds of the last half of the epochs after warm-up: how fast the network is that the run comes to.

    They are calibrated if all of these epochs are. Epochs with profiled steps do not count either. Until there are
    others, all count.
    """
    clocked = [r for r in history if not (r["warmup"] or r.get("profiled"))] or history
    last = clocked[len(clocked) // 2 :]
    calibrated = all("calibrated_seconds" in record for record in last)
    return statistics.median(record["calibrated_seconds" if calibrated else "epoch_seconds"] for record in last)


def time_to_accuracy(history: Sequence[Record], target: float, clock: str = "train_seconds") -> float:
    """What metric `clock` was when `val_accuracy` reached `target` (0..1) for good: it has not been below since.

    If it is below now: `NEVER` times (1 + what is missing). So any run that gets there is better than all that do not,
    and those are ordered by how close they come.
    """
    missing = target - history[-1]["val_accuracy"]
    if missing > 0:
        return NEVER * (1 + missing)
    below = [number for number, record in enumerate(history) if record["val_accuracy"] < target]
    return history[below[-1] + 1 if below else 0][clock]
