"""Checks on every epoch's time: did other processes disturb it, and what would it be on a machine of steady speed?"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from morphtrain import schema, world
from morphtrain.errors import UserError
from morphtrain.timing.foreign import ForeignCpu, measurable
from morphtrain.timing.reference import Calibration, Reference
from morphtrain.timing.slot import Slot

FOREIGN_LIMIT = 0.1  # share of a run's cores that others may use
SLOWDOWN_LIMIT = 1.25  # of the reference against its fastest in this run; used where others' use cannot be measured

Record = Mapping[str, float]

log = logging.getLogger(__name__)


class Guard:
    """Adds to every epoch's record whether its times are comparable, and calibrated times.

    An epoch is `contended` if another run has claimed the same device or cores, if other processes used more than a
    tenth of its cores, or, where the system cannot tell (as on GPUs), if the reference workload is slower than before.
    Of several processes each looks at its own device and cores, and if it is for one, it is for all.
    Nothing is subtracted from the raw times.

    Args:
        slot: the devices and cores the run has claimed.
        timing: the config group `timing`.
        history: the earlier epochs' records, if the run was resumed.

    Raises:
        UserError: if times are to be calibrated and earlier epochs were not.
    """

    def __init__(self, slot: Slot, timing: schema.timing.Timing, history: Sequence[Record]) -> None:
        uncalibrated = [record["epoch"] for record in history if "calibrated_train_seconds" not in record]
        if timing.reference and uncalibrated:
            raise UserError(
                f"timing.reference={timing.reference:g}: epoch {uncalibrated[0]:.0f} was trained without it, so the "
                "sum of calibrated times is unknown; resume with timing.reference=0"
            )
        self.slot = slot
        self.share = timing.reference
        self.foreign = ForeignCpu(slot.cpus, slot.beside) if slot.cpus and measurable() else None
        if self.foreign is not None:
            self.foreign.begin()  # start early: a first epoch of a few kernel ticks is too short to measure
        self.calibration: Calibration | None = None
        self.others: list[int] = []

    def epoch_begins(self) -> None:
        """Prepare for an epoch; call this before its clock starts."""
        if self.share and self.calibration is None:
            self.calibration = Calibration(Reference(self.slot.device), self.share)
        self.others = self.slot.claim.others()
        if self.foreign is not None:
            self.foreign.begin()

    def judged(self, record: Record, history: Sequence[Record]) -> dict[str, float]:
        """The record of the epoch that has just ended, plus the guard's metrics; call this while no clock runs."""
        metrics = dict(record)
        if self.foreign is not None:
            metrics["foreign_cpu"] = self.foreign.share()
        if self.calibration is not None:
            metrics |= self._calibrated(self.calibration, record, history)
        everyone = world.gathered((metrics.get("foreign_cpu"), self._reasons()))
        if shares := [share for share, _ in everyone if share is not None]:
            metrics["foreign_cpu"] = max(shares)
        reasons = list(dict.fromkeys(reason for _, found in everyone for reason in found))
        if metrics.get("foreign_cpu", 0.0) > FOREIGN_LIMIT:
            reasons.append(f"others used {metrics['foreign_cpu']:.0%} of its cores")
        metrics["contended"] = float(bool(reasons))
        if reasons and not any(earlier["contended"] for earlier in history):
            _warn(record["epoch"], reasons)
        return metrics

    def _calibrated(self, calibration: Calibration, record: Record, history: Sequence[Record]) -> dict[str, float]:
        seconds = record["setup_seconds"] + record["epoch_seconds"] + record["morph_seconds"]
        calibration.trained(seconds)
        before = history[-1]["calibrated_train_seconds"] if history else 0.0
        return {
            "reference_seconds": calibration.seconds,
            "calibrated_seconds": calibration.calibrated(record["epoch_seconds"]),
            "calibrated_train_seconds": before + calibration.calibrated(seconds),
        }

    def _reasons(self) -> list[str]:
        """Why the epoch is contended in this process, besides its `foreign_cpu`; empty if it is not."""
        reasons = []
        if others := sorted({*self.others, *self.slot.claim.others()}):
            processes = "process {} trains" if len(others) == 1 else "processes {} train"
            reasons.append(f"{processes.format(', '.join(map(str, others)))} on the same device or cores")
        if self.calibration is not None and (self.foreign is None or self.slot.device.type != "cpu"):
            slowdown = self.calibration.fastest / self.calibration.rate
            if slowdown > SLOWDOWN_LIMIT:
                reasons.append(f"the reference workload takes {slowdown:.2f} times as long as before")
        return reasons


def _warn(epoch: float, reasons: Sequence[str]) -> None:
    log.warning(
        "epoch %.0f was contended: %s. Its times are not comparable, those calibrated by timing.reference may be; "
        "timing.when_busy=wait and timing.cores keep runs apart",
        epoch,
        "; ".join(reasons),
    )
