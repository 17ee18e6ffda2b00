"""Whether calibrated times allow for what others did on the machine meanwhile. Light to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def is_calibrated(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether the machine was measured again while these epochs of a run were trained.

    With the one measurement before them, their calibrated times are the clock's times a constant: what disturbed some
    epochs is in them as it is in the clock's.
    """
    measured = [record.get("reference_seconds") for record in history]
    return None not in measured and len(set(measured)) > 1
