"""An epoch from its first hook to its record; `loop.train_epoch` runs between the two halves.

start(run)
begin_epoch(run)
train_epoch(run)
record = finish_epoch(run)
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from morphtrain import averaging, schema, slices, world
from morphtrain.cost.params import count_params, count_weights
from morphtrain.errors import UserError
from morphtrain.processes.digest import check_replicas
from morphtrain.schema.config import COMMUNICATED, TO_ACCURACY
from morphtrain.state import Run, derived_seed
from morphtrain.timing.summaries import median_epoch_seconds, time_to_accuracy
from morphtrain.trainer import auto, format_hint
from morphtrain.trainer.devices import peak_memory, reset_peak_memory
from morphtrain.trainer.loop import evaluate
from morphtrain.trainer.underflow import underflow_share
from morphtrain.world import agree, decide, gathered, largest, largest_of, traffic

log = logging.getLogger(__name__)

METRIC = re.compile(r"[\w\-./ ]+")  # a name that trackers take
UNDERFLOW = "underflow_share"
DENSITIES = {"channel_density", "weight_density"}  # a method may measure them by a threshold of its own
UNCLIPPED = 0.03  # learning rate of SGD with which weight norm trained the digits without clipping; at 0.1 it did not

Record = dict[str, float]  # the metrics of an epoch, by name
Judge = Callable[[Mapping[str, float], Sequence[Mapping[str, float]]], Record]  # record, those before it


def start(run: Run, hint: bool = False) -> None:
    """Settle what is `auto`, start the norm, and let the methods look at a run that has just been built or restored.

    Args:
        hint: whether to say what 16 bits would give (`format_hint`).
    """
    _check_objective(run)
    with run.clock.timed("setup_seconds"):
        if run.epoch == 0:
            auto.choose(run)
            if run.config.model.weights is None:  # they would no longer be the trained ones
                run.start_norm()
            if hint:
                format_hint.say(run)
        for hook in run.hooks("before_training"):
            hook(run)
        if run.epoch > 0 and world.size() > 1:
            run.check_single()  # it may have been trained by another number of processes
    _warn_of_one_chunk(run)
    _warn_of_one_process(run)
    _warn_of_long_steps(run)
    if run.config.ema is not None and run.epoch == 0:
        steps = -(-len(run.data.train) // max(1, run.batch_size))
        log.info("%s", averaging.described(run.config.ema, steps))
    if len(run.optimizer.param_groups) != len(run.base_lrs):
        raise UserError("a method has added a parameter group in before_training; after_build is the place for it")


def _warn_of_one_chunk(run: Run) -> None:
    norm, images = run.config.norm, slices.sizes(run.batch_size)[0]
    if isinstance(norm, schema.norm.GhostNorm) and norm.ghost_batch_size >= images > 0:
        log.warning(
            "norm.ghost_batch_size=%d: a batch of %d images%s is one chunk, so that it is plain batch norm; "
            "a larger batch_policy.batch_size makes a difference",
            *(norm.ghost_batch_size, images, " in each process" if world.size() > 1 else ""),
        )


def _warn_of_one_process(run: Run) -> None:
    if run.config.norm.name == "sync" and world.size() == 1:
        log.warning("norm=sync: in one process it is plain batch norm; processes=2, or torchrun, makes a difference")


def _check_objective(run: Run) -> None:
    """Raise a `UserError` for an objective that only several processes record."""
    wanted = [metric for metric in run.config.objective if metric in COMMUNICATED]
    if wanted and world.size() == 1:
        raise UserError(f"objective={wanted[0]}: one process sends nothing; processes=2, or another metric, works")


def _warn_of_long_steps(run: Run) -> None:
    config = run.config
    if not isinstance(config.optimizer, schema.optimizer.SGD) or config.optimizer.lr <= UNCLIPPED:
        return
    if isinstance(config.norm, schema.norm.WeightNorm) and config.clip_norm is None and run.epoch == 0:
        log.warning(
            "norm=weight: without batch norm, steps of optimizer.lr=%g may be too long to learn from; clip_norm=1, or "
            "optimizer.lr=%g, trained on the digits",
            *(config.optimizer.lr, UNCLIPPED),
        )


def begin_epoch(run: Run) -> None:
    """Begin the next epoch: its number, its random numbers, the methods' hooks.

    Raises:
        UserError: for a run that has not been started, or whose batch policy has not set a batch size.
    """
    if run.batch_size < 1:
        name = run.config.batch_policy.name
        raise UserError(f"batch_policy={name}: no batch size is set; before_training does it, called by start(run)")
    run.epoch += 1
    run.change = ""
    if run.infobatch is not None:
        run.infobatch.take_all()  # as in a run that is resumed here
    torch.manual_seed(derived_seed(run.config.seed, run.epoch))
    reset_peak_memory(run.device)
    for hook in run.hooks("before_epoch"):
        hook(run)
    traffic.bytes, traffic.seconds = 0, 0.0


def finish_epoch(run: Run, judged: Judge | None = None) -> Record:
    """Finish a trained epoch: methods change the network, it is settled and evaluated, and everything is recorded.

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
    communication = _communication()  # of training
    peak = _peak_memory(run)  # likewise: evaluation has a batch size of its own
    batch_size = run.batch_size  # of this epoch: a policy may change it for the next
    with run.clock.timed("morph_seconds"):
        run.agree_buffers()  # before methods go by them
        added = _of_methods(run, "after_epoch")
    check_replicas(run)
    if run.change:
        _after_change(run)
    elif count_params(run.model) != run.params:
        raise UserError("a method has changed the network without saying so; run.shape_changed(...) does")
    with run.clock.timed("settle_seconds"):
        run.settle()
        run.settle_averages()
    with run.clock.timed("eval_seconds"):
        evaluated = _evaluated(run)
        of_precision = _of_precision(run)
    run.clock.agree()
    record = _record(run) | {"batch_size": batch_size, **evaluated}
    record |= communication | ({} if peak is None else {"peak_memory_bytes": peak})
    if run.config.stop_at is not None:
        record["stopped_early"] = float(run.is_enough(record["val_accuracy"]) and run.epoch < run.config.epochs)
    record |= auto.metrics(run) | _of_compiling(run)
    for metrics in (of_precision, added, _of_methods(run, "measure")):
        if taken := sorted(metrics.keys() & record.keys() - DENSITIES):
            raise UserError(f"a method records {taken[0]}, which is recorded already; another name works")
        record |= metrics
    run.stopped = agree(run.stopped)  # `measure` may have measured it
    if _is_last(run, record["val_accuracy"]) and getattr(run.data, "test", None):
        with run.averaged():
            record["test_loss"], record["test_accuracy"] = evaluate(run, "test")
    record = judged(record, run.history) if judged is not None else record
    run.history.append(agree(record))  # the same for all who decide by it
    run.history[-1].update(_summaries(run))
    run.clock.seconds["setup_seconds"] = 0.0  # is counted now
    return run.history[-1]


def _evaluated(run: Run) -> Record:
    """Loss and accuracy on the validation images: with `ema` of the averaged network, and of that as trained, too."""
    found: Record = {}
    if run.config.ema is not None:
        found["raw_val_loss"], found["raw_val_accuracy"] = evaluate(run)
    with run.averaged():
        found["val_loss"], found["val_accuracy"] = evaluate(run)
    return found


def _communication() -> Record:
    """What this process has sent while it trained, one way, and the longest that any has waited; nothing of one."""
    if world.size() == 1:
        return {}
    found = largest_of({"comm_seconds": traffic.seconds, "comm_bytes": traffic.bytes})
    return found | {"comm_bytes": int(found["comm_bytes"])}


def _peak_memory(run: Run) -> int | None:
    """That of the process that takes the most; None where a system does not say."""
    peaks = [peak for peak in gathered(peak_memory(run.device)) if peak is not None]
    return max(peaks, default=None)


def _is_last(run: Run, val_accuracy: float) -> bool:
    return run.stopped or run.epoch == run.config.epochs or run.is_enough(val_accuracy)


def _summaries(run: Run) -> Record:
    """Metrics of all epochs so far."""
    found = {"median_epoch_seconds": median_epoch_seconds(run.history)}
    target = run.config.timing.target_accuracy
    for metric, clock in TO_ACCURACY.items():
        if target is not None and all(clock in record for record in run.history):
            found[metric] = time_to_accuracy(run.history, target, clock)
    return found


def _of_methods(run: Run, hook: str) -> Record:
    """The metrics that a hook of all methods returns."""
    found: Record = {}
    for name, method in run.methods.items():
        metrics: Mapping[str, Any] = (getattr(method, hook)(run) or {}) if method.implements(hook) else {}
        found |= _checked(name, metrics)
    return found


def _of_precision(run: Run) -> Record:
    """What the number format records of the epoch, such as its loss scale."""
    precision, config = run.precision, run.config.precision
    found = _checked(f"precision={config.name}", precision.metrics()) if hasattr(precision, "metrics") else {}
    if isinstance(config, schema.Option) and UNDERFLOW in config.metrics:
        found[UNDERFLOW] = decide(lambda: underflow_share(run))
    return found


def _checked(name: str, metrics: Mapping[str, Any]) -> Record:
    """Metrics as numbers; raises a `UserError` beginning with `name`, that of what has them, for other things."""
    found: Record = {}
    for metric, value in metrics.items():
        number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if not METRIC.fullmatch(metric):
            raise UserError(f"{name}: its metric {metric!r} needs a name of letters, digits and _-./ or spaces")
        if not isinstance(number, Real):
            raise UserError(f"{name}: its metric {metric} is a {type(value).__name__}; a number works")
        found[metric] = int(number) if isinstance(number, int) else float(number)
    return found


def _after_change(run: Run) -> None:
    run.follow_change()
    run.note(run.change, run.renamed)
    run.count()
    for hook in run.hooks("after_change"):
        hook(run)


def _of_compiling(run: Run) -> Record:
    """What compiling took in this epoch; with it goes the decision about the next."""
    if run.compilation is None:
        return {}
    seconds = run.clock.seconds["epoch_seconds"] - run.clock.seconds["data_seconds"]
    run.compilation.end_epoch(run.epoch, run.config.epochs, seconds, bool(run.change), run.usual_pass)
    return {"compile_seconds": largest(run.compilation.spent_seconds)}


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
        "train_seconds": before + seconds["setup_seconds"] + seconds["epoch_seconds"] + seconds["morph_seconds"],
        "samples_per_second": run.epoch_images / seconds["epoch_seconds"],
        "params": run.params,
        "macs": run.macs,
        "channel_density": channels / run.initial["channels"] if channels else 1.0,
        "weight_density": count_weights(run.model) / run.initial["weights"],
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "changed": float(bool(run.change)),
        "warmup": float(run.epoch <= run.config.timing.warmup_epochs),
        **({"processes": world.size()} if world.size() > 1 else {}),
        **_curriculum(run),
    }


def _curriculum(run: Run) -> Record:
    """What the epoch showed of the training images, where that is not all of them at full size in every epoch."""
    height, _ = run.small_size(run.epoch) or run.data.input_shape[1:]
    shown = {"image_size": height, "share_trained": run.epoch_images / len(run.data.train)}
    return {metric: shown[metric] for metric in run.config.data.recorded}
