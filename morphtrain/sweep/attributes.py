"""What a trial's worker and job store with it in the study. Its heartbeats are in `workers.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from morphtrain.plain_data import mismatch

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

BASELINE_ATTR = "baseline"  # trial 0 only: it runs as the baseline
NAME_ATTR = "baseline_name"  # of a baseline beside trial 0
OVERRIDES_ATTR = "overrides"  # that its job was started with
SIGNATURE_ATTR = "signature"  # of what it trains
SAME_RUN_ATTR = "same_run_as"  # the number of the trial whose values it took, since it would have trained the same
RUN_DIR_ATTR = "run_dir"
ERROR_ATTR = "error"  # why it failed
EXCLUDED_ATTR = "excluded"  # it failed because its options exclude one another
METRICS_ATTR = "metrics"  # the record of its last epoch
EPOCHS_ATTR = "epochs"  # trial 0 only: number, accuracy and clocks of each
STOPPED_ATTR = "stopped_at"  # the epoch after which the pruner stopped it
CONTENDED_ATTR = "contended_epochs"  # those that other processes disturbed; absent if none
REFERENCES_ATTR = "reference_seconds"  # the first two values of it that differ; absent with timing.reference=0
CHANGED_ATTR = "changed_epochs"  # those after which its network changed; only if it was meant to

FIRST = "baseline"  # what trial 0 is called if it runs as one


class Attributes:
    """A trial's attributes as they are read everywhere.

    Whoever can write to the study can store anything under these names, so what has another type counts as absent, and
    only the first trial is one that others are relative to.
    """

    def __init__(self, trial: FrozenTrial | Trial) -> None:
        self._stored: dict[str, Any] = trial.user_attrs
        self._number = trial.number

    @property
    def is_baseline(self) -> bool:
        return self._number == 0 and self._stored.get(BASELINE_ATTR) is True

    @property
    def baseline(self) -> str | None:
        """The name of the baseline that it runs as, that of trial 0 is `FIRST`; None if its values are searched."""
        name = FIRST if self.is_baseline else self._stored.get(NAME_ATTR)
        return name if isinstance(name, str) else None

    @property
    def signature(self) -> str | None:
        signature = self._stored.get(SIGNATURE_ATTR)
        return signature if isinstance(signature, str) else None

    @property
    def same_run_as(self) -> int | None:
        """The number of the trial whose values it took; None if it was trained itself."""
        number = self._stored.get(SAME_RUN_ATTR)
        return number if type(number) is int else None

    @property
    def error(self) -> str | None:
        error = self._stored.get(ERROR_ATTR)
        return error if isinstance(error, str) else None

    @property
    def excluded(self) -> bool:
        """Whether it failed because its options exclude one another."""
        return self._stored.get(EXCLUDED_ATTR) is True

    @property
    def run_dir(self) -> str | None:
        run_dir = self._stored.get(RUN_DIR_ATTR)
        return run_dir if isinstance(run_dir, str) else None

    @property
    def stopped(self) -> bool:
        """Whether the pruner has stopped it."""
        return _is_number(self._stored.get(STOPPED_ATTR))

    @property
    def metrics(self) -> dict[str, float]:
        """Empty until its first epoch was reported."""
        metrics = self._stored.get(METRICS_ATTR)
        return {k: v for k, v in metrics.items() if _is_number(v)} if isinstance(metrics, dict) else {}

    @property
    def epochs(self) -> list[dict[str, float]]:
        """Number, accuracy and clocks of each epoch of trial 0, in their order; empty for other trials."""
        stored = self._stored.get(EPOCHS_ATTR)
        fits = not mismatch(stored, list[dict[str, float]], "it")
        return [record for record in stored or [] if {"epoch", "val_accuracy"} <= record.keys()] if fits else []

    @property
    def contended(self) -> list[int]:
        return self._epochs(CONTENDED_ATTR) or []

    @property
    def changed(self) -> list[int] | None:
        """None if its network was not meant to change."""
        return self._epochs(CHANGED_ATTR)

    @property
    def references(self) -> list[float]:
        """Different values of `reference_seconds` in its epochs, two at most."""
        found = self._stored.get(REFERENCES_ATTR)
        return [value for value in found if _is_number(value)] if isinstance(found, list) else []

    def _epochs(self, name: str) -> list[int] | None:
        epochs = self._stored.get(name)
        return [epoch for epoch in epochs if type(epoch) is int] if isinstance(epochs, list) else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
