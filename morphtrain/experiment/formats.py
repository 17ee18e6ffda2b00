"""What `precision=auto` and `memory_format=auto` stand for in an experiment: one choice for each network in it.

A choice is measured in two seconds, and noise may turn it. So the first run of a network chooses for all others of it:
the other seeds of its arm, and arms with another method or schedule, which are compared with it. An arm with another
network or batch (narrower, from scratch) may rightly be faster in another format, and chooses for itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from morphtrain.evidence.experiment import Arm, Experiment
from morphtrain.experiment.declaration import is_of, key_of, merged
from morphtrain.experiment.runs import Run

# Groups and keys that say which network takes its steps, on what, and what is chosen for it; and groups of which the
# option matters, but no other key.
STEP = (
    *("model", "norm", "batch_policy", "data.image_size", "optimizer.fused", "precision", "memory_format", "device"),
    "processes",
)
CHOICES = ("data", "optimizer")
AUTO = ("precision=auto", "memory_format=auto")


class Choices:
    """The choices that the runs of an experiment share.

    Args:
        found: all runs of the experiment, in their order.
    """

    def __init__(self, experiment: Experiment, found: Sequence[Run]) -> None:
        self.found = found
        self.steps = {name: _step(experiment, name, arm) for name, arm in experiment.arms.items()}

    def in_turn(self, starting: Sequence[Run]) -> list[Run]:
        """Those of runs that can start which do not wait for one of the others to choose for them."""
        turn: dict[tuple[str, ...], Run] = {}
        for run in starting:
            turn.setdefault(self.steps[run.arm], run)
        return [run for run in starting if turn[self.steps[run.arm]] is run or not self._waits(run)]

    def override(self, run: Run) -> list[str]:
        """What tells a run what has been chosen for its network; nothing if it is to choose."""
        chosen = self._chosen(run)
        typed = ",".join(f"{key}:{value}" for key, value in chosen.items())
        return [f"chosen={{{typed}}}"] if chosen else []

    def _waits(self, run: Run) -> bool:
        return any(override in self.steps[run.arm] for override in AUTO) and not self._chosen(run)

    def _chosen(self, run: Run) -> dict[str, str]:
        alike = (other for other in self.found if other.ended and self.steps[other.arm] == self.steps[run.arm])
        return next(filter(None, (other.chosen() for other in alike)), {})


def _step(experiment: Experiment, name: str, arm: Arm) -> tuple[str, ...]:
    """The overrides that a training step of an arm depends on; arms with the same take the same steps at first."""
    overrides = merged(experiment.overrides, arm.overrides)
    deciding = [o for o in overrides if is_of(key_of(o), STEP) or key_of(o) in CHOICES]
    return (*sorted(deciding), *([name] if arm.of is not None else []))
