"""What is searched: Optuna's distributions of config keys, and the overrides that a trial's values become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from morphtrain.errors import UserError


class SearchSpace:
    """The sweeper's `params` and the command line's overrides, told apart: those to search and those that stay.

    Args:
        overrides: Hydra's syntax of sweeps is searched (`key=interval(0,1)`, `key=a,b`); all others stay as they are.
        extend: the user's own search space: takes the config and an Optuna trial and lets it suggest more values.
        config: the sweep's composed config, for `extend` and for the values that keys have by default.
    """

    def __init__(
        self, overrides: Sequence[str], extend: Callable[[DictConfig, Trial], None] | None, config: DictConfig
    ) -> None:
        self.distributions, plain, other = create_params_from_overrides(list(overrides))
        self.fixed = [*(f"{key}={value}" for key, value in plain.items()), *other]
        for key in {key.lstrip("+") for key in plain} & set(self.distributions):
            del self.distributions[key]  # what the command line fixes is not searched
        self.extend = extend
        self.config = config

    def suggest(self, trial: Trial) -> list[str]:
        """The overrides of a trial, which gets its values from the study's sampler unless it has them."""
        for key, distribution in self.distributions.items():
            trial._suggest(key, distribution)
        if self.extend is not None:
            self.extend(self.config, trial)
        return [*self.fixed, *(f"{key}={value}" for key, value in trial.params.items())]

    def defaults(self) -> dict[str, Any]:
        """The composed config's own values of all searched keys, or none if one of them is out of its range."""
        values = {key: self._default(key) for key in self.distributions}
        inside = self.extend is None and all(
            _contains(distribution, values[key]) for key, distribution in self.distributions.items()
        )
        return values if inside else {}

    def _default(self, key: str) -> Any:
        choices = self.config.hydra.runtime.choices
        return choices[key] if key in choices else OmegaConf.select(self.config, key)

    def corners(self) -> list[list[str]]:
        """Overrides at both ends of all ranges, to see before any trial whether the config takes them."""
        ends = [{key: end(d) for key, d in self.distributions.items()} for end in (_low, _high)]
        return [[*self.fixed, *(f"{key}={value}" for key, value in values.items())] for values in ends]

    def grid(self) -> dict[str, list[Any]]:
        """All values of each key; raises `UserError` for a range that has no end of them."""
        return {key: _all_values(key, distribution) for key, distribution in self.distributions.items()}


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return isinstance(value, (int, float)) and distribution._contains(distribution.to_internal_repr(value))


def _low(distribution: Any) -> Any:
    return distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low


def _high(distribution: Any) -> Any:
    return distribution.choices[-1] if isinstance(distribution, CategoricalDistribution) else distribution.high


def _all_values(key: str, distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        steps = round((distribution.high - distribution.low) / distribution.step)
        return [distribution.low + i * distribution.step for i in range(steps + 1)]
    raise UserError(f"{key}={distribution}: a grid needs choices or a range with steps, as range(1,9) or 0.1,0.2")


def as_space(parameters: Mapping[str, Any] | None) -> list[str]:
    """The sweeper's `params` as overrides."""
    return [f"{key}={value}" for key, value in (parameters or {}).items()]
