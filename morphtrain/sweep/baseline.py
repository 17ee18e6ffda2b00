"""The baselines of a study: what the searched trials are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig
from optuna.trial import FrozenTrial, Trial

from morphtrain import schema
from morphtrain.errors import UserError
from morphtrain.evidence.experiment import NAME
from morphtrain.experiment.declaration import key_of, merged, shared
from morphtrain.schema.sweeper import MoreBaseline
from morphtrain.sweep.attributes import FIRST, Attributes
from morphtrain.sweep.search_space import SearchSpace

KEY = "hydra.sweeper.more_baselines"


def parse_more(nodes: Mapping[str, Any]) -> dict[str, MoreBaseline]:
    """What is below the key `hydra.sweeper.more_baselines`, by name; null takes one away.

    Raises:
        UserError: naming the key that is wrong.
    """
    found = {}
    for name, node in nodes.items():
        at = f"{KEY}.{name}"
        free = NAME.fullmatch(str(name)) is not None and name != FIRST and not str(name).startswith("trial_")
        schema.check(free, KEY, name, f"names of letters, digits, _, ., + and -, other than {FIRST} and trial_...")
        if node is not None:
            schema.check(isinstance(node, Mapping), at, node, "keys with values, as {epochs: 0.5}, or null")
            found[str(name)] = schema.typed(MoreBaseline, {**asdict(MoreBaseline()), **node}, at)
            found[str(name)].check(at)
    return found


class Baselines:
    """What the baselines run with instead of searched values.

    Args:
        given: the overrides of `hydra.sweeper.baseline`, for trial 0; if empty, the composed config's own values; None
            for no baselines.
        more: those of `hydra.sweeper.more_baselines`, by name.
        space: what the study searches.
        composed: makes the config of a run from its overrides, of whose values the further baselines have shares.

    Raises:
        UserError: for a share of a value that is no whole number.
    """

    def __init__(
        self,
        given: Sequence[str] | None,
        more: Mapping[str, MoreBaseline],
        space: SearchSpace,
        composed: Callable[[Sequence[str]], DictConfig],
    ) -> None:
        self.given = given
        self.space = space
        self.roles = {name: keys.role for name, keys in more.items()}
        self.more = {name: self._overrides(keys, composed) for name, keys in more.items()}

    def _overrides(self, keys: MoreBaseline, composed: Callable[[Sequence[str]], DictConfig]) -> list[str]:
        like_it = self.instead_of(self.space.fixed, keys.overrides)
        return merged(like_it, shared(keys.epochs, keys.width, lambda: composed(like_it)))

    def values(self) -> dict[str, Any] | None:
        """Trial 0's values of the searched keys; empty if it has overrides of its own, None if it is no baseline."""
        if self.given is None:
            return None
        return {} if self.given else self.space.defaults()

    def overrides(self, trial: Trial | FrozenTrial) -> list[str] | None:
        """All overrides of a baseline without values of the searched keys; None for any other trial.

        Raises:
            UserError: for a baseline that only the study knows.
        """
        attributes = Attributes(trial)
        if attributes.is_baseline:
            return None if self.values() else self.first()
        if attributes.baseline is None:
            return None
        if attributes.baseline not in self.more:
            raise UserError(f"the study calls it the baseline {attributes.baseline}, which this sweep has not")
        return self.more[attributes.baseline]

    def first(self) -> list[str]:
        """All overrides of trial 0, if it has no values of the searched keys."""
        return self.instead_of(self.space.fixed)

    def instead_of(self, overrides: Sequence[str], more: Sequence[str] = ()) -> list[str]:
        """The overrides of a run with the first baseline's, and perhaps `more`, in place of what is in their way.

        If they select another option of a group, overrides of that group's keys are dropped, since the other option has
        other keys.
        """
        own = merged(self.given or [], more)
        keys = [key_of(override) for override in own]

        def stays(override: str) -> bool:
            key = key_of(override)
            return not any(key == other or key.startswith(f"{other}.") for other in keys)

        return [*filter(stays, overrides), *own]
