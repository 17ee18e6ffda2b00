"""What a sampler sees of a study: not the trials without any searched value, such as a baseline of another option."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState


class SearchedTrials(BaseSampler):
    """Passes everything on to `sampler`, but hides finished trials without searched values from it.

    Samplers that model several keys at once (TPE, GP, NSGA, CMA-ES, QMC) model those that *all* trials have. A single
    trial without any, such as the baseline `prune=none` of a search among PruneTrain's keys, would leave them none, and
    they would draw every key by itself, all but TPE at random.
    """

    def __init__(self, sampler: BaseSampler) -> None:
        self.sampler = sampler

    def reseed_rng(self) -> None:
        """Draw other random numbers than another worker with the same seed."""
        self.sampler.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The keys whose values are drawn together."""
        return self.sampler.infer_relative_search_space(_View(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of these keys, drawn together."""
        return self.sampler.sample_relative(_View(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The value of one key, drawn by itself."""
        return self.sampler.sample_independent(_View(study), trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Called when a trial begins."""
        self.sampler.before_trial(_View(study), trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Called when a trial has ended."""
        self.sampler.after_trial(_View(study), trial, state, values)


class _View(optuna.Study):
    """A study without its finished trials that have no searched values."""

    def __init__(self, study: optuna.Study) -> None:
        super().__init__(study.study_name, study._storage, study.sampler, study.pruner)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy, states, use_cache)
        return [trial for trial in trials if trial.params or not trial.state.is_finished()]
