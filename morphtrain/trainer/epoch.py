"""An epoch from its first hook to its record; `loop.train_epoch` runs between the two halves.

start(run)
begin_epoch(run)
train_epoch(run)
record = finish_epoch(run)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from morphtrain.cost.params import count_weights
from morphtrain.errors import UserError
from morphtrain.state import Run, derived_seed
from morphtrain.trainer.devices import peak_memory
from morphtrain.trainer.loop import evaluate
from morphtrain.world import agree

Record = dict[str, float]  # the metrics of an epoch, by name
Judge = Callable[[Mapping[str, float], Sequence[Mapping[str, float]]], Record]  # record, those before it


def start(run: Run) -> None:
    """Let the methods look at a run that has just been built or restored."""
    for hook in run.hooks("before_training"):
        hook(run)


def begin_epoch(run: Run) -> None:
    """Begin the next epoch: its number, its random numbers, the methods' hooks."""
    run.epoch += 1
    run.change = ""
    torch.manual_seed(derived_seed(run.config.seed, run.epoch))
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    for hook in run.hooks("before_epoch"):
        hook(run)


def finish_epoch(run: Run, judged: Judge | None = None) -> Record:
    """Finish a trained epoch: methods change the network, it is evaluated, and everything is recorded.

    Args:
        judged: returns the record with what it adds; it is given the record and those before it.

    Returns:
        the record, which is also the last of `run.history`.

    Raises:
        UserError: if training has diverged.
    """
    if not agree(math.isfinite(run.train_loss)):
        lr = run.base_lrs[0]
        raise UserError(f"optimizer.lr={lr}: training diverged in epoch {run.epoch}; a smaller value may work")
    metrics: Record = {"batch_size": run.batch_size}  # of this epoch: a policy may change it for the next
    with run.clock.timed("morph_seconds"):
        for hook in run.hooks("after_epoch"):
            metrics |= hook(run) or {}
    if run.change:
        _settle_change(run)
    with run.clock.timed("eval_seconds"):
        metrics["val_loss"], metrics["val_accuracy"] = evaluate(run)
    record = _record(run) | metrics
    for hook in run.hooks("measure"):
        record |= hook(run) or {}
    run.history.append(judged(record, run.history) if judged is not None else record)
    return run.history[-1]


def _settle_change(run: Run) -> None:
    run.note(run.change)
    run.count()
    for hook in run.hooks("after_change"):
        hook(run)


def _record(run: Run) -> Record:
    """The metrics of the epoch that has just ended, except for those of evaluation and of the methods."""
    seconds = run.clock.seconds
    before = run.history[-1]["train_seconds"] if run.history else 0.0
    channels = sum(space.size for space in run.graph.spaces)
    return {
        "epoch": run.epoch,
        "timestamp": time.time(),
        "train_loss": run.train_loss,
        "train_accuracy": run.train_accuracy,
        **seconds,  # data_seconds are a part of epoch_seconds
        "train_seconds": before + seconds["epoch_seconds"] + seconds["morph_seconds"],
        "samples_per_second": len(run.data.train) / seconds["epoch_seconds"],
        "params": run.params,
        "macs": run.macs,
        "channel_density": channels / run.initial["channels"] if channels else 1.0,
        "weight_density": count_weights(run.model) / run.initial["weights"],
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "peak_memory_bytes": peak_memory(run.device),
        "warmup": float(run.epoch <= run.config.timing.warmup_epochs),
    }
