"""Which trials are the same run: each has a signature of what it trains (the idea of Facebook Research's dora)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from optuna.trial import FrozenTrial, TrialState

from morphtrain.sweep.attributes import Attributes

NOT_TRAINED = ("tracking", "trial", "resume", "process_timeout")  # change neither what is computed nor its time


def signature(config: DictConfig) -> str:
    """16 hexadecimal digits that two runs' configs have in common if both train the same: model, seed, threads, all.

    Args:
        config: of a run, without Hydra's own. A whole number counts as the same whether it is written 1 or 1.0.
    """
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    trained = {key: _plain(value) for key, value in resolved.items() if key not in NOT_TRAINED}
    text = json.dumps(trained, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def same_run(trials: Iterable[FrozenTrial], own: str) -> FrozenTrial | None:
    """The first of these trials that has this signature, and values that another trial may take; None if there is none.

    A trial has them if it was trained to its end and nothing disturbed it. What failed may work the next time, and what
    the pruner stopped was judged by the trials that there were then.
    """
    for trial in trials:
        attributes = Attributes(trial)
        trained = trial.state == TrialState.COMPLETE and attributes.same_run_as is None and not attributes.contended
        if trained and attributes.signature == own and "val_accuracy" in attributes.metrics:
            return trial
    return None
