"""A job's side of a sweep: what it reports to its trial while it trains, and whether to stop early."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from morphtrain.errors import UserError, first_line
from morphtrain.schema.config import TO_ACCURACY
from morphtrain.schema.sweeper import study_name
from morphtrain.sweep.attributes import (
    CHANGED_ATTR,
    CONTENDED_ATTR,
    EPOCHS_ATTR,
    METRICS_ATTR,
    REFERENCES_ATTR,
    STOPPED_ATTR,
    Attributes,
)
from morphtrain.sweep.storage import open_storage

log = logging.getLogger(__name__)

NO_NUMBER = "null; hydra/sweeper=morphtrain numbers its trials"  # what `trial` must be where somebody types it

FLAGS = {CONTENDED_ATTR: "contended", CHANGED_ATTR: "changed"}  # metrics whose epochs are stored
# Metrics of the whole run so far, of which only the latest value counts; the clocks never decrease.
LATEST = ("train_seconds", "calibrated_train_seconds", "median_epoch_seconds", *TO_ACCURACY)


def make_pruner(node: Any) -> Any:
    """The pruner of a config node (group `hydra/sweeper/pruner`): Optuna's or ours; those of others are refused."""
    try:
        return instantiate(node, _execution_whitelist_=("optuna.pruners.*", "morphtrain.sweep.overtaken.*"))
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise


class TrialReporter:
    """Reports every epoch's objective to the study's storage, and asks the study's pruner.

    Args:
        sweeper: the job's config node `hydra.sweeper`.
        number: of the trial in its study.
        objective: names of the metrics to optimise; with more than one, no trial is stopped early.
        epochs: of the trial, if its pruner need not be asked after the last.
        reshapes: whether the trial's network is meant to change.

    Raises:
        UserError: if the storage cannot be opened.
    """

    def __init__(
        self, sweeper: DictConfig, number: int, objective: list[str], epochs: int | None = None, reshapes: bool = False
    ) -> None:
        import optuna

        pruner = make_pruner(sweeper.pruner)
        self.storage = open_storage(sweeper.storage)
        self.study = optuna.load_study(study_name=study_name(sweeper), storage=self.storage, pruner=pruner)
        self.trial_id = self.storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)
        self.objective, self.epochs_planned = objective, epochs
        attributes = Attributes(self._frozen())
        self.is_first, self.is_searched = attributes.is_baseline, attributes.baseline is None
        self.kept = attributes.epochs
        self.epochs = {CONTENDED_ATTR: set(attributes.contended), CHANGED_ATTR: set(attributes.changed or [])}
        self.references = attributes.references
        if reshapes and attributes.changed is None:
            self.storage.set_trial_user_attr(self.trial_id, CHANGED_ATTR, [])

    def __call__(self, record: Mapping[str, float]) -> bool:
        """Report an epoch's record; True if the run should stop here."""
        try:
            return self._report(record)
        except Exception as error:  # noqa: BLE001 (databases fail in too many ways to name; training goes on)
            log.warning("epoch %d could not be reported to the study: %s", record["epoch"], first_line(error))
            return False

    def _report(self, record: Mapping[str, float]) -> bool:
        epoch = int(record["epoch"])
        self.storage.set_trial_user_attr(self.trial_id, METRICS_ATTR, dict(record))
        if self.is_first:
            self._keep(record, epoch)
        for attr, metric in FLAGS.items():
            if record.get(metric):
                self.epochs[attr].add(epoch)
                self.storage.set_trial_user_attr(self.trial_id, attr, sorted(self.epochs[attr]))
        reference = record.get("reference_seconds")
        if reference is not None and reference not in self.references and len(self.references) < 2:
            self.references.append(reference)
            self.storage.set_trial_user_attr(self.trial_id, REFERENCES_ATTR, self.references)
        if len(self.objective) > 1:
            return False
        self.storage.set_trial_intermediate_value(self.trial_id, epoch, record[self.objective[0]])
        if epoch == self.epochs_planned or record.get("stopped_early") or not self.is_searched:
            return False
        if not self.study.pruner.prune(self.study, self._trial_for_pruner(record)):
            return False
        self.storage.set_trial_user_attr(self.trial_id, STOPPED_ATTR, epoch)
        log.info("stopped early after epoch %d: other trials of the study were better at this point", epoch)
        return True

    def _keep(self, record: Mapping[str, float], epoch: int) -> None:
        """Store what tells the time to any accuracy; an epoch that was not in the checkpoint comes again."""
        names = ("epoch", "val_accuracy", *TO_ACCURACY.values())
        kept = {name: record[name] for name in names if name in record}
        self.kept = [*(earlier for earlier in self.kept if earlier["epoch"] < epoch), kept]
        self.storage.set_trial_user_attr(self.trial_id, EPOCHS_ATTR, self.kept)

    def _trial_for_pruner(self, record: Mapping[str, float]) -> Any:
        """The trial as its pruner should see it.

        Optuna's percentile pruners go by the best value that a trial has reported. For accumulated time that is always
        the first epoch's; it should be the last one's, so for such metrics this replaces all values by that. Ours goes
        by the least that a time can still become.
        """
        import optuna

        from morphtrain.sweep.overtaken import Overtaken, least

        trial, metric = self._frozen(), self.objective[0]
        values = trial.intermediate_values
        if isinstance(self.study.pruner, Overtaken):
            trial.intermediate_values = {trial.last_step: least(metric, record)}
        elif metric in LATEST and isinstance(self.study.pruner, optuna.pruners.PercentilePruner):
            trial.intermediate_values = dict.fromkeys(values, values[trial.last_step])
        return trial

    def _frozen(self) -> Any:
        return self.storage.get_trial(self.trial_id)
