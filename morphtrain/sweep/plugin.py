"""The sweeper as Hydra sees it: `hydra/sweeper=morphtrain`. Light to import; the work is in `sweeper.py`."""

from __future__ import annotations

from typing import Any

from hydra.errors import InstantiationException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig

from morphtrain.errors import UserError
from morphtrain.schema import check_sweeper, typed
from morphtrain.schema.sweeper import Confirm
from morphtrain.sweep.trial import make_pruner


class MorphTrainSweeper(Sweeper):
    """Hydra's Optuna sweeper, with studies that can be resumed and shared and trials that can be stopped early.

    Args:
        sampler: config node of an Optuna sampler, or of one of the user's own (group `hydra/sweeper/sampler`).
        pruner: config node of an Optuna pruner (group `hydra/sweeper/pruner`).
        baseline: overrides that trial 0 runs with instead of the searched ones; empty for the config's own values, None
            for no such trial.
        more_baselines: baselines that run next, by name; `{sooner: {epochs: 0.5}}` is trial 0 with half of the epochs.
        shares: what to search as shares of the values that the config has.
        confirm: how many of the best trials run again at the end (`best`), with how many fresh seeds (`seeds`).
        min_accuracy: lowest final `val_accuracy` (0..1) of a feasible trial; "baseline-0.01": 0.01 below trial 0's;
            None if all are feasible.
        heartbeat_seconds: how often a worker reports that it is alive. A worker on another machine that has been silent
            for four times as long is considered dead; if its lock file is visible here, that file decides at once.
        repeat: whether a trial is trained that another one has trained already, rather than taking its values.
        custom_search_space: dotted path of a function of the config and an Optuna trial that suggests more values.
        plain: the keys of Hydra's own Optuna sweeper.

    Raises:
        UserError: naming the key, if a value has a wrong type or range.
    """

    def __init__(
        self,
        *,
        sampler: Any,
        pruner: Any,
        baseline: Any,
        more_baselines: Any,
        shares: Any,
        confirm: Any,
        min_accuracy: float | str | None,
        repeat: bool,
        heartbeat_seconds: float,
        custom_search_space: str | None,
        **plain: Any,
    ) -> None:
        own = {"baseline": baseline, "more_baselines": more_baselines, "shares": shares, "confirm": confirm}
        check_sweeper({**plain, **own, "repeat": repeat, "heartbeat_seconds": heartbeat_seconds})
        from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl

        from morphtrain.sweep.baseline import parse_more
        from morphtrain.sweep.sampler import make_sampler
        from morphtrain.sweep.sweeper import StudySweeper

        extend = None
        if custom_search_space is not None:
            node = {"_target_": custom_search_space, "_partial_": True}
            try:
                extend = instantiate(node, _execution_whitelist_=(custom_search_space,))
            except InstantiationException as error:
                reason = " ".join(str(error.__cause__ or error).split())
                raise UserError(f"hydra.sweeper.custom_search_space={custom_search_space}: {reason}") from error
        self.study_sweeper = StudySweeper(
            OptunaSweeperImpl(sampler=make_sampler(sampler), custom_search_space=None, **plain),
            extend=extend,
            pruner=make_pruner(pruner),
            baseline=None if baseline is None else list(baseline),
            min_accuracy=min_accuracy,
            heartbeat_seconds=heartbeat_seconds,
            more_baselines=parse_more(more_baselines),
            shares=shares,
            confirm=typed(Confirm, confirm, "hydra.sweeper.confirm"),
            repeat=repeat,
        )

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.study_sweeper.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep; `arguments` are the command line's overrides."""
        self.study_sweeper.sweep(arguments)
