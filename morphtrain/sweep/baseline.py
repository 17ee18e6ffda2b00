"""Trial 0 of a study: what the searched trials are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from morphtrain.sweep.search_space import SearchSpace


class Baseline:
    """What the baseline runs with instead of searched values.

    Args:
        given: the overrides of `hydra.sweeper.baseline`; if empty, the composed config's own values.
        space: what the study searches.
    """

    def __init__(self, given: Sequence[str], space: SearchSpace) -> None:
        self.given = list(given)
        self.space = space

    def values(self) -> dict[str, Any]:
        """Trial 0's values of the searched keys; empty if it runs with overrides of its own."""
        return {} if self.given else self.space.defaults()

    def overrides(self) -> list[str]:
        """All overrides of the trial, for a baseline without values of the searched keys.

        If the baseline selects another option of a group, overrides of that group's keys are dropped, since the other
        option has other keys.
        """
        keys = [override.split("=", 1)[0].lstrip("+~") for override in self.given]

        def stays(override: str) -> bool:
            key = override.split("=", 1)[0].lstrip("+~")
            return not any(key == other or key.startswith(f"{other}.") for other in keys)

        return [*filter(stays, self.space.fixed), *self.given]
