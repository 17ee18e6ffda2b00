"""The judgement on every epoch's time: did others disturb it, and how long is it on a machine of steady speed?"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.timing.foreign import ForeignCpu, measurable
from morphtrain.timing.reference import Calibration, Reference
from morphtrain.timing.slot import Slot

FOREIGN_LIMIT = 0.1  # of a run's cores, that others may use
SLOWDOWN_LIMIT = 1.25  # of the reference, over its fastest in this run; the signal where there is no account of others

Record = Mapping[str, float]

log = logging.getLogger(__name__)


class Guard:
    """Adds to every epoch's record whether its times are comparable, and calibrated ones.

    An epoch is `contended` if another run has claimed the same device or cores, if other processes used more than a
    tenth of its cores, or, where the system keeps no account of that (on GPUs), if the reference workload is slower
    than it was. Nothing is subtracted from the raw times.

    Args:
        slot: the run's place.
        timing: the config.
        history: the records of the epochs before, of a resumed run.

    Raises:
        UserError: if calibrated times are wanted and some epochs before were trained without.
    """

    def __init__(self, slot: Slot, timing: schema.timing.Timing, history: Sequence[Record]) -> None:
        bare = [record["epoch"] for record in history if "calibrated_train_seconds" not in record]
        if timing.reference and bare:
            raise UserError(
                f"timing.reference={timing.reference:g}: epoch {bare[0]:.0f} was trained without, so the sum of "
                "calibrated times is not known; resume with timing.reference=0"
            )
        self.slot = slot
        self.share = timing.reference
        self.foreign = ForeignCpu(slot.cpus) if slot.cpus and measurable() else None
        if self.foreign is not None:
            self.foreign.begin()  # a first epoch of a few ticks of the kernel's clock is too short to judge by
        self.calibration: Calibration | None = None
        self.others: list[int] = []

    def epoch_begins(self) -> None:
        """To be called before an epoch's clock starts."""
        if self.share and self.calibration is None:
            self.calibration = Calibration(Reference(self.slot.device), self.share)
        self.others = self.slot.claim.others()
        if self.foreign is not None:
            self.foreign.begin()

    def judged(self, record: Record, history: Sequence[Record]) -> dict[str, float]:
        """The record of the epoch that has ended, with the guard's metrics; to be called when no clock runs."""
        metrics = dict(record)
        if self.foreign is not None:
            metrics["foreign_cpu"] = self.foreign.share()
        if self.calibration is not None:
            metrics |= self._calibrated(self.calibration, record, history)
        reasons = self._reasons(metrics)
        metrics["contended"] = float(bool(reasons))
        if reasons and not any(earlier["contended"] for earlier in history):
            _warn(record["epoch"], reasons)
        return metrics

    def _calibrated(self, calibration: Calibration, record: Record, history: Sequence[Record]) -> dict[str, float]:
        seconds = record["epoch_seconds"] + record["morph_seconds"]
        calibration.trained(seconds)
        before = history[-1]["calibrated_train_seconds"] if history else 0.0
        return {
            "reference_seconds": calibration.seconds,
            "calibrated_seconds": calibration.calibrated(record["epoch_seconds"]),
            "calibrated_train_seconds": before + calibration.calibrated(seconds),
        }

    def _reasons(self, metrics: Record) -> list[str]:
        """Why the epoch is contended; none if it is not."""
        reasons = []
        if others := sorted({*self.others, *self.slot.claim.others()}):
            reasons.append(f"process {', '.join(map(str, others))} trains on the same device or cores")
        if metrics.get("foreign_cpu", 0.0) > FOREIGN_LIMIT:
            reasons.append(f"others used {metrics['foreign_cpu']:.0%} of its cores")
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
