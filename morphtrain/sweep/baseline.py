"""Trial 0 of a study: what the searched trials are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from morphtrain.sweep.search_space import SearchSpace


class Baseline:
    """What the baseline runs with in place of searched values.

    Args:
        given: overrides, `hydra.sweeper.baseline`; none of them: the composed config's own values.
        space: what the study searches.
    """

    def __init__(self, given: Sequence[str], space: SearchSpace) -> None:
        self.given = list(given)
        self.space = space

    def values(self) -> dict[str, Any]:
        """What trial 0 has of the searched keys: nothing where it runs with overrides of its own."""
        return {} if self.given else self.space.defaults()

    def overrides(self) -> list[str]:
        """Those of the whole trial, if it has no values of the searched keys.

        Where the baseline chooses another option of a group, overrides of that group's keys go: it has others.
        """
        keys = [override.split("=", 1)[0].lstrip("+~") for override in self.given]

        def stays(override: str) -> bool:
            key = override.split("=", 1)[0].lstrip("+~")
            return not any(key == other or key.startswith(f"{other}.") for other in keys)

        return [*filter(stays, self.space.fixed), *self.given]
