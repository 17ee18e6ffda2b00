"""A run from its config to its objective: epochs, morphs, evaluation, checkpoint, records, in this order."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from morphtrain import morph
from morphtrain.errors import UserError
from morphtrain.evidence.plots import plot_run
from morphtrain.prune.reconfigure import live_channels
from morphtrain.schema import Config
from morphtrain.trainer import checkpoint
from morphtrain.trainer.console import epoch_line, progress_bar, show_end
from morphtrain.trainer.loop import evaluate, train_epoch
from morphtrain.trainer.process import prepare_process
from morphtrain.trainer.run import Run, build_run, count_weights, derived_seed, option

log = logging.getLogger(__name__)


def train(config: Config, run_dir: Path, tags: Mapping[str, str]) -> list[float]:
    """Train as `config` says, leave everything in `run_dir`, and return the metrics named in `config.objective`.

    Args:
        config: a checked config (`morphtrain.schema.parse`).
        run_dir: an existing directory; a checkpoint in it is continued with `resume=auto` and in the way otherwise.
        tags: for the tracker; the names of the chosen options.

    Raises:
        UserError: for what the user can put right.
        OSError: if `run_dir` cannot be written.
    """
    prepare_process()
    run, stored = _start_or_resume(config, run_dir)
    for hook in run.hooks("before_training"):
        hook(run)
    tracker = option("tracking", config.tracking)(config.tracking, stored.facts["tracking_id"] if stored else None)
    tags = {**tags, "seed": str(config.seed), "device": str(run.device)}
    tracker.start(checkpoint.flat(asdict(config)), tags, run_dir, resumed=config.resume != "never")
    status = "FAILED"
    try:
        while run.epoch < config.epochs:
            _advance(run, run_dir, tracker)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if status == "FINISHED":
            _leave_artifacts(run, run_dir, tracker)
        tracker.finish(status, run.history)
    show_end(run, run_dir, run_dir / checkpoint.LAST)
    return [run.history[-1][metric] for metric in config.objective]


def _start_or_resume(config: Config, run_dir: Path) -> tuple[Run, checkpoint.Checkpoint | None]:
    if config.resume == "never":
        if (run_dir / checkpoint.LAST).exists():
            raise UserError(
                f"hydra.run.dir={run_dir}: holds a checkpoint; go on from it with resume=auto, or choose another one"
            )
        return build_run(config), None
    auto = config.resume == "auto"
    stored = checkpoint.find(run_dir) if auto else checkpoint.Checkpoint(Path(config.resume))
    if stored is None:
        return build_run(config), None
    run = stored.restore(config)
    log.info("going on behind epoch %d of %s", run.epoch, stored.path)
    return run, stored


def _advance(run: Run, run_dir: Path, tracker: Any) -> None:
    """One epoch with everything that belongs to it."""
    config = run.config
    run.epoch += 1
    run.change = ""
    torch.manual_seed(derived_seed(config.seed, run.epoch))
    for hook in run.hooks("before_epoch"):
        hook(run)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    with (
        progress_bar(run.epoch, config.epochs, len(run.data.train)) as tick,
        run.clock.timed() as epoch_watch,
    ):
        train_epoch(run, tick)
    if not math.isfinite(run.train_loss):
        raise UserError(
            f"optimizer.lr={config.optimizer.lr}: training diverged in epoch {run.epoch}; try a smaller one"
        )
    metrics: dict[str, float] = {}
    with run.clock.timed() as morph_watch:
        for hook in run.hooks("after_epoch"):
            metrics.update(hook(run) or {})
    if run.change:
        run.count()
    with run.clock.timed() as eval_watch:
        val_loss, val_accuracy = evaluate(run)
    seconds = epoch_watch.seconds + morph_watch.seconds
    previous = run.history[-1] if run.history else None
    threshold = getattr(config.prune, "threshold", 0.0)
    record = {
        "epoch": run.epoch,
        "timestamp": time.time(),
        "train_loss": run.train_loss,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "epoch_seconds": epoch_watch.seconds,
        "morph_seconds": morph_watch.seconds,
        "train_seconds": seconds + (previous["train_seconds"] if previous else 0.0),
        "eval_seconds": eval_watch.seconds,
        "samples_per_second": len(run.data.train) / epoch_watch.seconds,
        "params": run.params,
        "macs": run.macs,
        "channel_density": live_channels(run.graph, threshold) / max(1, run.initial["channels"]),
        "weight_density": count_weights(run.model, threshold) / run.initial["weights"],
        "batch_size": run.batch_size,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "peak_memory_bytes": peak_memory(run.device),
        "warmup": float(run.epoch <= config.timing.warmup_epochs),
        **metrics,
    }
    run.history.append(record)
    if run.change:
        _write_architecture(run, run_dir)
    checkpoint.save(run, run_dir, tracker.run_id)
    log.info(epoch_line(record, config.epochs, run.change))
    tracker.update(run.history)
    if run.change:
        tracker.artifact(_architecture_path(run, run_dir), "architecture")


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
    tracker.artifact(run_dir / checkpoint.LAST)
    for path in sorted((run_dir / "architecture").glob("*.json")):
        tracker.artifact(path, "architecture")
    resolved = run_dir / ".hydra" / "config.yaml"
    if resolved.exists():
        tracker.artifact(resolved, "config")
