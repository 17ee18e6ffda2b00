"""The search space: Optuna distributions of config keys, and a trial's values as overrides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial, FrozenTrial, Trial

from morphtrain import schema
from morphtrain.errors import UserError, first_line


class SearchSpace:
    """The sweeper's `params` and the command line's overrides, sorted into searched and fixed ones.

    Args:
        overrides: those in Hydra's sweep syntax (`key=interval(0,1)`, `key=a,b`) are searched, all others are fixed.
        extend: the user's own search space: a function of the config and an Optuna trial that suggests more values.
        config: the sweep's composed config, for `extend` and for the default values of keys.
    """

    def __init__(
        self, overrides: Sequence[str], extend: Callable[[DictConfig, Trial], None] | None, config: DictConfig
    ) -> None:
        self.distributions, plain, other = _sorted(overrides)
        self.fixed = [*(f"{key}={value}" for key, value in plain.items()), *other]
        for key in {key.lstrip("+") for key in plain} & set(self.distributions):
            del self.distributions[key]  # what the command line fixes is not searched
        self.extend = extend
        self.config = config

    def suggest(self, trial: Trial) -> list[str]:
        """The overrides of a trial; values that it does not have yet come from the study's sampler.

        Raises:
            UserError: see `overrides`.
        """
        try:
            for key, distribution in self.distributions.items():
                trial._suggest(key, distribution)
            if self.extend is not None:
                self.extend(self.config, trial)
        except ValueError as error:  # Optuna's, for a value in the study that is of no choice or of another type
            raise UserError(f"the study gives it a value that is not searched: {first_line(error)}") from error
        return self.overrides(trial)

    def overrides(self, trial: Trial | FrozenTrial) -> list[str]:
        """The overrides of a trial that has all its values: those of the searched keys, and no others.

        Whoever can write to the study can give a trial any keys and values. So neither decides anything here: the keys
        are those searched on this machine, and so are the values, numbers within a range or one of the choices.

        Raises:
            UserError: if a searched key lacks a value or has one that is not searched.
        """
        searched = dict(self.distributions)
        if self.extend is not None:
            searched |= self._extended(trial)
        return [*self.fixed, *(f"{key}={_value(key, d, trial.params)}" for key, d in searched.items())]

    def _extended(self, trial: Trial | FrozenTrial) -> Mapping[str, BaseDistribution]:
        """What `extend` searches, given the values that the trial has."""
        assert self.extend is not None
        asked = FixedTrial(trial.params, trial.number)
        try:
            self.extend(self.config, asked)  # type: ignore[arg-type]  # it can suggest, which is what `extend` is for
        except ValueError as error:
            raise UserError(f"the study gives it a value that is not searched: {first_line(error)}") from error
        return asked.distributions

    def defaults(self) -> dict[str, Any]:
        """The composed config's values of all searched keys; empty if one is out of its range or `extend` is given."""
        values = {key: self._default(key) for key in self.distributions}
        inside = self.extend is None and all(
            _contains(distribution, values[key]) for key, distribution in self.distributions.items()
        )
        return values if inside else {}

    def _default(self, key: str) -> Any:
        choices = self.config.hydra.runtime.choices
        return choices[key] if key in choices else OmegaConf.select(self.config, key)

    def corners(self) -> list[list[str]]:
        """Overrides with all ranges at their low and all at their high end, to check the config before any trial."""
        ends = [{key: end(d) for key, d in self.distributions.items()} for end in (_low, _high)]
        return [[*self.fixed, *(f"{key}={value}" for key, value in values.items())] for values in ends]

    def grid(self) -> dict[str, list[Any]]:
        """All values of each key; raises `UserError` for a range without steps."""
        return {key: _all_values(key, distribution) for key, distribution in self.distributions.items()}


def _sorted(overrides: Sequence[str]) -> tuple[dict[str, BaseDistribution], dict[str, Any], list[str]]:
    """What is searched, what is fixed, and what is deleted; raises `UserError` for a range that cannot be searched."""
    for override in overrides:
        try:
            create_params_from_overrides([override])
        except (ValueError, NotImplementedError) as error:  # Optuna's: a log range from 0, an empty range
            raise UserError(f"{override}: cannot be searched: {first_line(error)}") from error
    return create_params_from_overrides(list(overrides))


def _value(key: str, distribution: BaseDistribution, params: Mapping[str, Any]) -> Any:
    """The trial's value of `key`: a number, or one of the choices as they were given on this machine."""
    value = params.get(key)
    inside = key in params and _contains(distribution, value)
    schema.check(inside, key, value, f"what this sweep searches, {distribution}")
    return distribution.to_external_repr(distribution.to_internal_repr(value))


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    try:
        return isinstance(value, (int, float)) and distribution._contains(distribution.to_internal_repr(value))
    except ValueError:  # not a number; not above 0 on a log scale
        return False


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
    raise UserError(f"{key}={distribution}: a grid needs choices or a range with steps, such as 0.1,0.2 or range(1,9)")


def as_space(parameters: Mapping[str, Any] | None) -> list[str]:
    """The sweeper's `params` as overrides."""
    return [f"{key}={value}" for key, value in (parameters or {}).items()]
