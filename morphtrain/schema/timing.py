"""Options of the group `timing`."""

from __future__ import annotations

from dataclasses import dataclass

from morphtrain.schema.checks import check, check_one_of
from morphtrain.schema.option import Option


@dataclass
class Timing(Option, group="timing", plain=("default",)):
    """How a run is clocked, and on what cores."""

    sync: str
    warmup_epochs: int
    cores: int | None
    when_busy: str
    reference: float
    target_accuracy: float | None
    profile: list[int] | None = None

    def __post_init__(self) -> None:
        check_one_of("timing.sync", self.sync, ("edges", "each", "none"))
        check(self.warmup_epochs >= 0, "timing.warmup_epochs", self.warmup_epochs, "0 or more epochs")
        check(self.cores is None or self.cores >= 1, "timing.cores", self.cores, "1 or more, or null")
        check_one_of("timing.when_busy", self.when_busy, ("mark", "wait", "refuse"))
        in_range = self.target_accuracy is None or 0 < self.target_accuracy <= 1
        check(in_range, "timing.target_accuracy", self.target_accuracy, "a val_accuracy above 0 and at most 1, or null")
        check(0 <= self.reference <= 1, "timing.reference", self.reference, "a share of the training time, 0 to 1")
        pair = self.profile is None or (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1])
        wanted = "the first and the last step to profile, counted over the run from 1, as [101,110], or null"
        check(pair, "timing.profile", self.profile, wanted)

    def check_comparable(self, what: str) -> None:
        """Raise a `UserError` if steps of `what` are to be profiled, which take longer, and its times are compared."""
        check(
            self.profile is None, "timing.profile", self.profile, f"null in {what}: it compares times; profile one run"
        )
