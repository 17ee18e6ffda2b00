"""The search space: Optuna distributions of config keys, and a trial's values as overrides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.trial import FixedTrial, FrozenTrial, Trial

from morphtrain import schema
from morphtrain.errors import UserError, first_line
from morphtrain.experiment.declaration import key_of, merged
from morphtrain.wording import as_yaml


@dataclass(frozen=True)
class Branch:
    """What only those trials have in which `key` is `option`: keys that are searched, and overrides."""

    key: str
    option: str
    distributions: Mapping[str, BaseDistribution]
    fixed: Sequence[str]


class SearchSpace:
    """The sweeper's `params` and the command line's overrides, sorted into searched and fixed ones.

    Args:
        overrides: those in Hydra's sweep syntax (`key=interval(0,1)`, `key=a,b`) are searched, all others are fixed; of
            a key that is there twice the last one counts.
        extend: the user's own search space: a function of the config and an Optuna trial that suggests more values.
        config: the sweep's composed config, for `extend`, for the default values of keys, and for shares of them.
        branches: keys that only some trials have; a typed range or value of such a key replaces that of all branches.
        shares: what is searched as a share of the value that the config has, `key: interval(0.25,1)`; null is not.
    """

    def __init__(
        self,
        overrides: Sequence[str],
        extend: Callable[[DictConfig, Trial], None] | None,
        config: DictConfig,
        branches: Sequence[Branch] = (),
        shares: Mapping[str, Any] | None = None,
    ) -> None:
        searched, plain, other = _sorted(merged(overrides))
        self.fixed = [*(f"{key}={value}" for key, value in plain.items()), *other]
        self.typed = {key.lstrip("+"): value for key, value in plain.items()}
        searched = {key: d for key, d in searched.items() if key not in self.typed}  # what is fixed is not searched
        theirs = {key for branch in branches for key in (*branch.distributions, *map(key_of, branch.fixed))}
        self.branches = [self._typed(branch, searched) for branch in branches]
        _check_alike(self.branches)
        self.distributions = {key: d for key, d in searched.items() if key not in theirs}
        for key, share in (shares or {}).items():
            if share is not None and key not in self.distributions:
                self.distributions[key] = _of_share(key, str(share), config)
        self.extend = extend
        self.config = config

    def _typed(self, branch: Branch, searched: Mapping[str, BaseDistribution]) -> Branch:
        """The branch in the ranges that were typed, without the keys that somebody has fixed."""
        own = {**branch.distributions, **{key: searched[key] for key in map(key_of, branch.fixed) if key in searched}}
        found = {key: searched.get(key, d) for key, d in own.items() if key not in self.typed}
        return replace(branch, distributions=found, fixed=[o for o in branch.fixed if key_of(o) not in found])

    def suggest(self, trial: Trial) -> list[str]:
        """The overrides of a trial; values that it does not have yet come from the study's sampler.

        Raises:
            UserError: see `overrides`.
        """
        try:
            for key, distribution in self.distributions.items():
                trial._suggest(key, distribution)
            for branch in self._taken(trial.params):
                for key, distribution in branch.distributions.items():
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
        searched, fixed = self._of(trial.params)
        if self.extend is not None:
            searched |= self._extended(trial)
        return merged(fixed, [f"{key}={_value(key, d, trial.params)}" for key, d in searched.items()])

    def _taken(self, values: Mapping[str, Any]) -> Iterator[Branch]:
        """The branches that a trial with these values takes."""
        for branch in self.branches:
            if as_yaml(values.get(branch.key, self.typed.get(branch.key))) == branch.option:
                yield branch

    def _of(self, values: Mapping[str, Any]) -> tuple[dict[str, BaseDistribution], list[str]]:
        """What is searched, and what is fixed, in a trial with these values."""
        taken = list(self._taken(values))
        searched = dict(self.distributions)
        for branch in taken:
            searched |= branch.distributions
        return searched, merged(*(branch.fixed for branch in taken), self.fixed)

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
        searched, _ = self._of({key: self._default(key) for key in self.distributions})
        values = {key: self._default(key) for key in searched}
        inside = self.extend is None and all(_contains(d, values[key]) for key, d in searched.items())
        return values if inside else {}

    def _default(self, key: str) -> Any:
        choices = self.config.hydra.runtime.choices
        return choices[key] if key in choices else OmegaConf.select(self.config, key)

    def corners(self) -> list[list[list[str]]]:
        """Overrides at the ends of all ranges, to check the config before any trial; of each list, one has to do.

        The first two are the low and the high ends with the first options. Then come, for each branch, the low and the
        high ends of its own keys, each with both ends of all others: what is too little for a short run may do for a
        long one.
        """
        ends = (_low, _high)
        branches = [branch for branch in self.branches if branch.option in self._options(branch.key)]
        found = [[self._corner({}, end, end)] for end in ends]
        for branch in branches:
            chosen = {branch.key: branch.option}
            found += [[self._corner(chosen, end, rest) for rest in (end, other)] for end, other in (ends, ends[::-1])]
        return found

    def _options(self, key: str) -> list[str]:
        """What is searched of a key that has options; what was typed may be fewer than there are branches."""
        return [as_yaml(option) for option in getattr(self.distributions.get(key), "choices", ())]

    def _corner(self, chosen: Mapping[str, Any], own: Callable[[Any], Any], rest: Callable[[Any], Any]) -> list[str]:
        """With keys of branches at one end, and the `rest` at another."""
        values = {key: rest(d) for key, d in self.distributions.items()} | dict(chosen)
        searched, fixed = self._of(values)
        return merged(fixed, [f"{key}={values.get(key, own(d))}" for key, d in searched.items()])

    def grid(self) -> dict[str, list[Any]]:
        """All values of each key; raises `UserError` for a range without steps, or a key that not all trials have."""
        for branch in self.branches:
            for key in branch.distributions:
                raise UserError(
                    f"hydra/sweeper/sampler=grid: only trials with {branch.key}={branch.option} have {key}, and those "
                    "of a grid have the same keys; grouped_tpe or random works"
                )
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


def _check_alike(branches: Sequence[Branch]) -> None:
    """Raise a `UserError` for a key that two branches search in ways that no study can hold together."""
    first: dict[str, BaseDistribution] = {}
    for branch in branches:
        for key, distribution in branch.distributions.items():
            try:
                check_distribution_compatibility(first.setdefault(key, distribution), distribution)
            except ValueError as error:
                at = f"hydra.sweeper.params.{branch.key}.{branch.option}.{key}={distribution}"
                raise UserError(f"{at}: must be of the kind and scale, or the choices, of {first[key]}") from error


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


def _of_share(key: str, share: str, config: DictConfig) -> BaseDistribution:
    """A key's values as shares of the one that the config has; of a whole number, whole ones from 1 on.

    Raises:
        UserError: if the share is nothing that can be searched, or the value no number.
    """
    at = f"hydra.sweeper.shares.{key}"
    searched, _, _ = _sorted([f"{key}={share}"])
    found: Any = searched.get(key)
    ends = [] if found is None else [_low(found), _high(found)]
    right = len(ends) > 0 and all(isinstance(end, (int, float)) and end > 0 for end in ends)
    schema.check(right, at, share, "shares above 0 to search, such as interval(0.25,1) or 0.5,0.75,1")
    full = OmegaConf.select(config, key)
    is_number = isinstance(full, (int, float)) and not isinstance(full, bool) and full > 0
    schema.check(is_number, key, full, f"a number above 0, since {at} searches shares of it; null there leaves it out")
    whole = isinstance(full, int)

    def value(share: float) -> float:
        return max(1, round(share * full)) if whole else share * full

    if isinstance(found, CategoricalDistribution) or (isinstance(found, FloatDistribution) and found.step is not None):
        return CategoricalDistribution(tuple(dict.fromkeys(value(choice) for choice in _all_values(key, found))))
    kind: Any = IntDistribution if whole else FloatDistribution
    return kind(*map(value, ends), log=found.log)


def as_space(parameters: Mapping[str, Any] | None) -> list[str]:
    """The sweeper's `params` as overrides; of options with keys of their own, the options."""
    found = {key: value for key, value in (parameters or {}).items() if value is not None}
    return [f"{key}={','.join(map(as_yaml, v)) if isinstance(v, Mapping) else v}" for key, v in found.items()]


def branches_of(parameters: Mapping[str, Any] | None) -> list[Branch]:
    """The keys that options in the sweeper's `params` have of their own: `prune: {none: {}, prunetrain: {...}}`.

    Raises:
        UserError: for what are no keys with values, or no keys at all.
    """
    found = []
    for key, options in (parameters or {}).items():
        if isinstance(options, Mapping):
            schema.check(len(options) > 0, f"hydra.sweeper.params.{key}", "{}", "options, each with its own keys")
            found += [_branch(key, as_yaml(option), own) for option, own in options.items()]
    return found


def _branch(key: str, option: str, own: Any) -> Branch:
    at, keys = f"hydra.sweeper.params.{key}.{option}", {} if own is None else own
    plain = isinstance(keys, Mapping) and not any(isinstance(value, Mapping) for value in keys.values())
    schema.check(plain, at, own, "keys with what to search, as {prune.interval: range(1,10)}, or {}")
    distributions, fixed, other = _sorted(as_space(keys))
    return Branch(key, option, distributions, [*(f"{name}={value}" for name, value in fixed.items()), *other])
