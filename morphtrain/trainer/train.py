"""A run from its config to its objective: epochs, morphs, evaluation, checkpoint, records, in this order."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from morphtrain import morph
from morphtrain.errors import UserError
from morphtrain.evidence.plots import plot_run, plot_widths
from morphtrain.prune.reconfigure import live_channels
from morphtrain.schema import Config
from morphtrain.timing.guard import Guard
from morphtrain.timing.slot import Slot, take_slot
from morphtrain.trainer import checkpoint
from morphtrain.trainer.console import data_warning, epoch_line, progress_bar, show_end
from morphtrain.trainer.loop import evaluate, train_epoch
from morphtrain.trainer.process import prepare_process
from morphtrain.trainer.run import Run, build_run, count_weights, derived_seed, option, possible_devices

log = logging.getLogger(__name__)


def train(
    config: Config,
    run_dir: Path,
    tags: Mapping[str, str],
    on_epoch: Callable[[Mapping[str, float]], bool] | None = None,
) -> list[float]:
    """Train as `config` says, leave everything in `run_dir`, and return the metrics named in `config.objective`.

    Args:
        config: a checked config (`morphtrain.schema.parse`).
        run_dir: an existing directory; a checkpoint in it is continued with `resume=auto` and in the way otherwise.
        tags: for the tracker; the names of the chosen options.
        on_epoch: hears the record of every epoch; the run ends behind it if it says True.

    Raises:
        UserError: for what the user can put right.
        OSError: if `run_dir` cannot be written.
    """
    prepare_process()
    with take_slot(possible_devices(config.device), config.timing) as slot:
        return _train(config, run_dir, tags, on_epoch, slot)


def _train(
    config: Config,
    run_dir: Path,
    tags: Mapping[str, str],
    on_epoch: Callable[[Mapping[str, float]], bool] | None,
    slot: Slot,
) -> list[float]:
    run, stored = _start_or_resume(config, run_dir, slot.device)
    guard = Guard(slot, config.timing, run.history)
    for hook in run.hooks("before_training"):
        hook(run)
    tracker = option("tracking", config.tracking)(config.tracking, stored.facts["tracking_id"] if stored else None)
    tags = {**tags, "seed": str(config.seed), "device": str(run.device)}
    tracker.start(checkpoint.flat(asdict(config)), tags, run_dir, config.resume != "never", run.history)
    status = "FAILED"
    try:
        unwanted = False
        while run.epoch < config.epochs and not run.stopped and not unwanted:
            _advance(run, run_dir, tracker, guard)
            unwanted = on_epoch is not None and on_epoch(run.history[-1])
        _leave_artifacts(run, run_dir, tracker)
        status = "KILLED" if unwanted else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        log.warning("interrupted; go on with the same command, hydra.run.dir=%s and resume=auto", run_dir)
        raise
    finally:
        tracker.finish(status, run.history)
    show_end(run, run_dir, run_dir / checkpoint.LAST)
    return [run.history[-1][metric] for metric in config.objective]


def _start_or_resume(config: Config, run_dir: Path, device: torch.device) -> tuple[Run, checkpoint.Checkpoint | None]:
    if config.resume == "never":
        if (run_dir / checkpoint.LAST).exists():
            raise UserError(
                f"hydra.run.dir={run_dir}: holds a checkpoint; go on from it with resume=auto, or choose another one"
            )
        return _start(config, device), None
    auto = config.resume == "auto"
    stored = checkpoint.find(run_dir) if auto else checkpoint.Checkpoint(Path(config.resume))
    if stored is None:
        log.info("no checkpoint in %s: starting anew", run_dir)
        return _start(config, device), None
    run = stored.restore(config, device)
    log.info("going on behind epoch %d of %s", run.epoch, stored.path)
    return run, stored


def _start(config: Config, device: torch.device) -> Run:
    if config.architecture is None:
        return build_run(config, device=device)
    stored = checkpoint.Checkpoint(Path(config.architecture))
    return build_run(config, morph=stored.architecture(config), device=device)


def _advance(run: Run, run_dir: Path, tracker: Any, guard: Guard) -> None:
    """One epoch with everything that belongs to it: train, morph, evaluate, record, save, report."""
    guard.epoch_begins()
    _begin_epoch(run)
    progress = progress_bar(run.epoch, run.config.epochs, len(run.data.train))
    with progress as tick, run.clock.timed("epoch_seconds"):
        train_epoch(run, tick)
    if not math.isfinite(run.train_loss):
        lr = run.config.optimizer.lr
        raise UserError(f"optimizer.lr={lr}: training diverged in epoch {run.epoch}; a smaller one may work")
    metrics: dict[str, float] = {"batch_size": run.batch_size}  # of this epoch: its policy may change it for the next
    with run.clock.timed("morph_seconds"):
        for hook in run.hooks("after_epoch"):
            metrics.update(hook(run) or {})
    if run.change:
        run.note(run.change)
        run.count()
        for hook in run.hooks("after_change"):
            hook(run)
    with run.clock.timed("eval_seconds"):
        metrics["val_loss"], metrics["val_accuracy"] = evaluate(run)
    run.history.append(guard.judged(_record(run) | metrics, run.history))
    if run.change:
        _write_architecture(run, run_dir)
    checkpoint.save(run, run_dir, tracker.run_id)
    log.info(epoch_line(run.history[-1], run.config.epochs, run.change))
    if warning := data_warning(run.history, run.config.timing.warmup_epochs, run.data.advice):
        log.warning(warning)
    tracker.update(run.history)
    if run.change:
        tracker.artifact(_architecture_path(run, run_dir), "architecture")


def _begin_epoch(run: Run) -> None:
    run.epoch += 1
    run.change = ""
    torch.manual_seed(derived_seed(run.config.seed, run.epoch))
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    for hook in run.hooks("before_epoch"):
        hook(run)


def _record(run: Run) -> dict[str, float]:
    """The metrics of the epoch that has just ended, but for those of evaluation and of the methods."""
    seconds = run.clock.seconds
    before = run.history[-1]["train_seconds"] if run.history else 0.0
    threshold = getattr(run.config.prune, "threshold", 0.0)
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
        "channel_density": live_channels(run.graph, threshold) / run.initial["channels"] if run.graph.spaces else 1.0,
        "weight_density": count_weights(run.model, threshold) / run.initial["weights"],
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "peak_memory_bytes": peak_memory(run.device),
        "warmup": float(run.epoch <= run.config.timing.warmup_epochs),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: of the epoch's tensors on a CUDA device; elsewhere the process' largest resident size so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _architecture_path(run: Run, run_dir: Path) -> Path:
    return run_dir / "architecture" / f"epoch_{run.epoch:04d}.json"


def _write_architecture(run: Run, run_dir: Path) -> None:
    path = _architecture_path(run, run_dir)
    path.parent.mkdir(exist_ok=True)
    facts = {"epoch": run.epoch, "change": run.change, **morph.describe(run.model)}
    path.write_text(json.dumps(facts, indent=1))


def _leave_artifacts(run: Run, run_dir: Path, tracker: Any) -> None:
    picture = run_dir / "run.png"
    plot_run(run.history, picture)
    tracker.artifact(picture, "plots")
    if len(run.changes) > 1:
        picture = run_dir / "widths.png"
        plot_widths(run.changes, run.epoch, picture)
        tracker.artifact(picture, "plots")
    tracker.artifact(run_dir / checkpoint.LAST)
    for path in sorted((run_dir / "architecture").glob("*.json")):
        tracker.artifact(path, "architecture")
    resolved = run_dir / ".hydra" / "config.yaml"
    if resolved.exists():
        tracker.artifact(resolved, "config")
