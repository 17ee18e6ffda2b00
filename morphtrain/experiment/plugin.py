"""The sweeper as Hydra sees it: `+experiment=...`. Light to import; the work is in `sweeper.py`."""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

CHOSEN = "+experiment="  # what the argument begins with that asks for an experiment


class ExperimentSweeper(Sweeper):
    """Runs the arms of an experiment, seed by seed; see `conf/hydra/sweeper/experiment.yaml` for the keys.

    Raises:
        UserError: if the declaration or one of its arms cannot be run.
    """

    def __init__(self, **keys: Any) -> None:
        from morphtrain.experiment.sweeper import ArmsSweeper

        self.arms = ArmsSweeper(keys)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.arms.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Run what is left of the experiment; `arguments` are the command line's overrides."""
        self.arms.sweep(arguments)
