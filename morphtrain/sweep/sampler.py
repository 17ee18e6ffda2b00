"""The sampler of a study: Optuna's or the user's own, and what it sees: only trials with searched values."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Container, Sequence
from typing import Any

import optuna
from hydra.utils import instantiate
from omegaconf import DictConfig
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from morphtrain import schema
from morphtrain.errors import UserError, first_line

KEY = "hydra.sweeper.sampler"
KNOWN = ("optuna.samplers.*", "hydra_plugins.hydra_optuna_sweeper.*")  # whose classes a config may name anywhere


def make_sampler(node: Any) -> Any:
    """The sampler of a config node (group `hydra/sweeper/sampler`), or what makes it of the values of a grid.

    Raises:
        UserError: if its `_target_` is neither Optuna's nor a sampler of the user's own, or does not take its keys.
    """
    is_node = isinstance(node, DictConfig) and "_target_" in node
    schema.check(is_node, KEY, node, "a node with a _target_, as hydra/sweeper/sampler=tpe makes it")
    target = str(node._target_)
    known = any(target.startswith(prefix.removesuffix("*")) for prefix in KNOWN)
    if not known:
        _check_own(target)
    try:
        sampler = instantiate(node, _execution_whitelist_=KNOWN if known else (*KNOWN, target))
    except Exception as error:  # whatever a constructor raises
        raise UserError(f"{KEY}._target_={target}: {first_line(error.__cause__ or error)}") from error
    if not (known or isinstance(sampler, BaseSampler)):
        made = type(sampler).__name__
        raise UserError(f"{KEY}._target_={target}: makes a {made}, not an optuna.samplers.BaseSampler")
    return sampler


def _check_own(target: str) -> None:
    """Raise a `UserError` unless a dotted path names a sampler's class, or a function that could make one."""
    module, _, name = target.rpartition(".")
    _refuse_pythons_own(target, module)  # which has no sampler, but much that harms when it is called
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing a module can raise anything
        raise UserError(f"{KEY}._target_={target}: {first_line(error)}") from error
    _refuse_pythons_own(target, str(getattr(found, "__module__", "")))  # it may have been imported from there
    is_sampler = isinstance(found, type) and issubclass(found, BaseSampler)
    if not (is_sampler or inspect.isfunction(found)):
        wanted = "a subclass of optuna.samplers.BaseSampler, or a function that makes one"
        raise UserError(f"{KEY}._target_={target}: must be {wanted}")


def _refuse_pythons_own(target: str, module: str) -> None:
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"{KEY}._target_={target}: is of Python's own module {module}; name a sampler of yours")


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
