"""The sweeper as Hydra sees it: `hydra/sweeper=morphtrain`. Light to import; the work is in `sweeper.py`."""

from __future__ import annotations

from typing import Any

from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
from omegaconf import DictConfig

from morphtrain.sweep.trial import make_pruner


class MorphTrainSweeper(OptunaSweeper):
    """Hydra's Optuna sweeper whose study can be resumed, shared and stopped early.

    Args:
        pruner: node of an Optuna pruner (group `hydra/sweeper/pruner`).
        baseline: overrides that trial 0 runs with in place of the searched ones; None for no such trial.
        min_accuracy: final `val_accuracy` (0..1) that makes a trial feasible; None if all are.
        heartbeat_seconds: how often a worker says that it is alive; one of another machine that has been silent four
            times as long is taken for dead. Of a worker whose lock file can be seen, that file tells at once.
        custom_search_space: dotted path of a function of config and Optuna trial that suggests more values.
        plain: the keys of Hydra's own Optuna sweeper.
    """

    def __init__(
        self,
        *,
        pruner: Any,
        baseline: Any,
        min_accuracy: float | None,
        heartbeat_seconds: float,
        custom_search_space: str | None,
        **plain: Any,
    ) -> None:
        super().__init__(custom_search_space=None, **plain)
        from morphtrain.sweep.sweeper import StudySweeper

        extend = None
        if custom_search_space is not None:
            own = {"_target_": custom_search_space, "_partial_": True}
            extend = instantiate(own, _execution_whitelist_=(custom_search_space,))
        self.study_sweeper = StudySweeper(
            self.sweeper,
            extend=extend,
            pruner=make_pruner(pruner),
            baseline=None if baseline is None else list(baseline),
            min_accuracy=min_accuracy,
            heartbeat_seconds=heartbeat_seconds,
        )

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.study_sweeper.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        self.study_sweeper.sweep(arguments)
