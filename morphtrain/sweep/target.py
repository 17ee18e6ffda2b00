"""What a search for the least time to an accuracy aims at, where `timing.target_accuracy` is null: its floor.

With `hydra.sweeper.min_accuracy=baseline-0.005` that is known when trial 0 has ended, which therefore runs without a
target. Its time to it is read off its epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig, ListConfig, OmegaConf
from optuna.trial import FrozenTrial

from morphtrain.errors import UserError
from morphtrain.schema.config import TO_ACCURACY
from morphtrain.sweep.attributes import Attributes
from morphtrain.sweep.floor import KEY, Floor
from morphtrain.timing.summaries import time_to_accuracy


@dataclass(frozen=True)
class Target:
    """The target of a study's trials.

    Args:
        objective: the study's metrics.
        floor: the accuracy below which a trial is infeasible, and which is the target; None if there is nothing to add
            to the trials' own config.
        given: `timing.target_accuracy`, if the objective is a time to it.
    """

    objective: Sequence[str]
    floor: Floor | None
    given: float | None

    @classmethod
    def of(cls, config: DictConfig, floor: Floor | None) -> Target:
        """The target of a sweep with this composed config and floor; nonsense in the config is refused elsewhere."""
        named = config.objective
        objective = list(named) if isinstance(named, ListConfig) else []
        given = OmegaConf.select(config, "timing.target_accuracy")
        if not any(name in TO_ACCURACY for name in objective):
            return cls(objective, None, None)
        return cls(objective, floor if given is None else None, given if isinstance(given, (int, float)) else None)

    @property
    def to_check(self) -> list[str]:
        """Overrides with which a config is checked before the target is known."""
        return [] if self.floor is None else ["timing.target_accuracy=1"]

    def overrides(self, trials: Sequence[FrozenTrial]) -> list[str]:
        """What a trial of a study with these trials gets: the target, or, for the trial that sets it, a plain clock.

        Raises:
            UserError: if the floor is so far below what trial 0 reached that every accuracy is above it.
        """
        if self.floor is None:
            return []
        if not self.floor.is_known(trials):
            return [f"objective=[{TO_ACCURACY.get(self.objective[0], self.objective[0])}]"]
        accuracy = self.floor.accuracy(trials)
        if accuracy <= 0:
            raise UserError(f"{KEY}: {accuracy:g} is what it makes, the target; give less below the baseline's")
        return [f"timing.target_accuracy={accuracy!r}"]

    def accuracy(self, trials: Sequence[FrozenTrial], floor: Floor | None) -> float | None:
        """What a run has to reach to count: the target, and the study's floor; None if there is neither."""
        known = [self.given, None if floor is None else floor.accuracy(trials)]
        return max((accuracy for accuracy in known if accuracy is not None), default=None)

    def sets(self, trial: FrozenTrial) -> bool:
        """Whether the target follows from this trial, so that it has run without one."""
        return self.floor is not None and self.floor.relative and Attributes(trial).is_baseline

    def times(self, trial: FrozenTrial) -> dict[str, float]:
        """The times to the target of the trial that sets it; empty if its epochs are not all known."""
        attributes = Attributes(trial)
        epochs, accuracy = attributes.epochs, attributes.metrics.get("val_accuracy")
        assert self.floor is not None
        if accuracy is None or len(epochs) != attributes.metrics.get("epoch"):
            return {}
        clocks = {name: clock for name, clock in TO_ACCURACY.items() if all(clock in epoch for epoch in epochs)}
        return {name: time_to_accuracy(epochs, accuracy - self.floor.value, clock) for name, clock in clocks.items()}
