"""A run from its config to its objective: epochs, morphs, evaluation, checkpoint, records, in this order."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from morphtrain import interrupts, morph, schema
from morphtrain.errors import UserError
from morphtrain.evidence.plots import plot_run
from morphtrain.evidence.records import LEFT_AT_THE_END
from morphtrain.evidence.strip import plot_widths
from morphtrain.memory_limit import named_if_out_of_memory, within_machine
from morphtrain.schema import Config
from morphtrain.state import Run
from morphtrain.timing.contention import Guard
from morphtrain.timing.slot import Slot, take_slot
from morphtrain.tracker import Tracker
from morphtrain.trainer import best, checkpoint, environment, records, trained
from morphtrain.trainer.build import build_run
from morphtrain.trainer.console import data_warning, epoch_line, progress_bar, show_end
from morphtrain.trainer.devices import possible_devices
from morphtrain.trainer.differences import flat
from morphtrain.trainer.directory import as_typed, occupied
from morphtrain.trainer.epoch import begin_epoch, finish_epoch, start
from morphtrain.trainer.loop import train_epoch
from morphtrain.trainer.process import prepare_process
from morphtrain.trainer.profiler import StepProfiler
from morphtrain.trainer.stored_network import StoredNetwork
from morphtrain.trainer.trackers import tracker_of
from morphtrain.world import agree, decide, is_main

log = logging.getLogger(__name__)

GENERAL = ("custom", "torchvision")  # options of which a name says little


def train(
    config: Config,
    run_dir: Path,
    tags: Mapping[str, str],
    on_epoch: Callable[[Mapping[str, float]], bool] | None = None,
) -> list[float]:
    """Train as `config` says, leave everything in `run_dir`, and return the metrics named in `config.objective`.

    Args:
        config: a checked config (`morphtrain.schema.parse`).
        run_dir: an existing directory; `resume=auto` continues a checkpoint in it, `resume=never` refuses one.
        tags: for the tracker; the names of the chosen options, and `name` for what to call the run.
        on_epoch: called with the record of every epoch; if it returns True, the run ends.

    Raises:
        UserError: for a mistake that the user can fix.
        OSError: if `run_dir` cannot be written.
        Interrupted: after SIGINT, SIGTERM or SIGHUP, which wait for the end of the step, and only in the main thread.
    """
    alone = occupied(run_dir) if is_main() else nullcontext()
    with alone, prepared(config) as slot, named_if_out_of_memory(sizes(config)):
        return _train(config, run_dir, tags, on_epoch, slot)


@contextmanager
def prepared(config: Config) -> Iterator[Slot]:
    """The process made ready for training, with a slot on this host and no more memory than the machine has."""
    prepare_process()
    with (
        take_slot(possible_devices(config.device), config.timing) as slot,
        within_machine() if slot.device.type == "cpu" else nullcontext(),  # drivers map more than the machine has
    ):
        yield slot


def sizes(config: Config) -> str:
    """What makes a run large, with the values, as a message says it."""
    return " ".join(schema.size_keys(group, getattr(config, group)) for group in ("batch_policy", "model", "data"))


def _train(
    config: Config,
    run_dir: Path,
    tags: Mapping[str, str],
    on_epoch: Callable[[Mapping[str, float]], bool] | None,
    slot: Slot,
) -> list[float]:
    run, stored = _start_or_resume(config, run_dir, slot.device)
    guard = Guard(slot, config.timing, run.history)
    alone = tags.get("study", "none") == "none"
    start(run, hint=alone)  # nobody reads the logs of a hundred runs, and their times are compared
    machine = environment.describe(run.device) | run.chosen | run.started_from
    if is_main():
        environment.write(run_dir, machine)
        records.begin(run_dir, run.history)
    tracker = tracker_of(config, stored.facts["tracking_id"] if stored else None)
    tags = {**tags, "seed": str(config.seed), **machine}
    with interrupts.deferred():
        tracker.start(flat(asdict(config)), tags, run_dir, config.resume != "never", run.history)
        _train_on(run, run_dir, tracker, guard, on_epoch, _called(run, tags))
    _check_objective(run)
    if is_main():
        show_end(run, run_dir, run_dir / checkpoint.LAST, tracker.view(), alone=alone)
    return [run.history[-1][metric] for metric in config.objective]


def _train_on(
    run: Run,
    run_dir: Path,
    tracker: Tracker,
    guard: Guard,
    on_epoch: Callable[[Mapping[str, float]], bool] | None,
    name: str,
) -> None:
    """Train the epochs that are left, and tell the tracker how it ended."""
    status = "FAILED"
    profiler = StepProfiler(run.config.timing.profile if is_main() else None, run_dir)
    try:
        unwanted = False
        if is_main() and not run.ended:  # one with more epochs than the last time has not come to its end yet
            (run_dir / LEFT_AT_THE_END).unlink(missing_ok=True)
        while not run.ended and not unwanted:
            interrupts.check()
            _advance(run, run_dir, tracker, guard, profiler)
            unwanted = agree(on_epoch is not None and on_epoch(run.history[-1]))
        if run.is_enough(run.history[-1]["val_accuracy"]) and run.epoch < run.config.epochs:
            log.info("stop_at=%g: reached after epoch %d of %d", run.config.stop_at, run.epoch, run.config.epochs)
        profiler.warn_of_none(run.history)
        interrupts.check()
        for hook in run.hooks("after_training"):
            hook(run)
        if is_main():
            _leave_artifacts(run, run_dir, tracker, name)
        interrupts.check()
        status = "KILLED" if unwanted else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        more = "" if run.config.trial is not None else f", {as_typed(run_dir)} and resume=auto"
        log.warning("interrupted; go on with the same command%s", more)
        raise
    finally:
        tracker.finish(status, run.history)


def _start_or_resume(config: Config, run_dir: Path, device: torch.device) -> tuple[Run, checkpoint.Checkpoint | None]:
    stored = decide(lambda: _stored(config, run_dir))  # other hosts may not have the file
    if stored is None:
        return new_run(config, device), None
    run = stored.restore(config, device)
    if is_main():
        best.carry_on(run, stored.path, run_dir)
    if config.stop_at is not None and run.ended and run.history:  # which its last epoch did not know
        enough = run.is_enough(run.history[-1]["val_accuracy"]) and run.epoch < config.epochs
        run.history[-1]["stopped_early"] = float(enough)
    log.info("going on after epoch %d of %s", run.epoch, stored.path)
    return run, stored


def _stored(config: Config, run_dir: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint that the run goes on from; None if it starts from epoch 1."""
    if config.resume == "never":
        if any((run_dir / name).exists() for name in (checkpoint.LAST, checkpoint.PREVIOUS)):
            raise UserError(
                f"{as_typed(run_dir)}: holds a checkpoint; resume=auto goes on from it, or choose another directory"
            )
        return None
    if config.resume == "auto":
        if (found := checkpoint.find(run_dir)) is None:
            log.info("no checkpoint in %s: starting from epoch 1", run_dir)
        return found
    if not Path(config.resume).is_file():
        raise UserError(f"resume={config.resume}: no such checkpoint; never, auto, or the path of one works")
    return checkpoint.Checkpoint(Path(config.resume), f"resume={config.resume}")


def new_run(config: Config, device: torch.device | None = None) -> Run:
    """A run before its first epoch, with the structure of `config.architecture` and the weights of `model.weights`.

    `device` is as in `build_run`.

    Raises:
        UserError: as `build_run`; if there is no such file, or it is of another model.
    """
    morph = None
    if (path := config.architecture) is not None:
        stored = decide(lambda: StoredNetwork(Path(path), f"architecture={path}"))
        morph = stored.architecture(config)
    if config.model.weights is None:
        return build_run(config, morph=morph, device=device)
    found = decide(lambda: trained.find(config))  # other hosts may not have the file
    run = build_run(config, morph=morph, device=device, start=trained.starter(config, found))
    run.started_from = trained.facts(config, found)
    return run


def _advance(run: Run, run_dir: Path, tracker: Tracker, guard: Guard, profiler: StepProfiler) -> None:
    """One epoch with everything that belongs to it: train, morph, evaluate, record, save, report."""
    guard.epoch_begins()
    begin_epoch(run)
    with progress_bar(run) as tick:
        train_epoch(run, tick, profiler.training_steps)
    record = finish_epoch(run, profiler.marked(guard.judged))
    profiled = profiler.write(run)
    if is_main():
        _keep(run, run_dir, tracker.run_id)
    _check_objective(run)
    log.info(epoch_line(record, run.config.epochs, run.change))
    if warning := data_warning(run.history, run.config.timing.warmup_epochs, run.data.advice):
        log.warning(warning)
    tracker.update(run.history)
    if run.change:
        tracker.artifact(_architecture_path(run, run_dir), "architecture")
    for path in profiled:
        tracker.artifact(path, "profile")


def _keep(run: Run, run_dir: Path, tracking_id: str | None) -> None:
    """Write what the last epoch leaves in the run directory."""
    if run.change:
        _write_architecture(run, run_dir)
    checkpoint.save(run, run_dir, tracking_id)
    best.keep(run, run_dir)
    records.append(run_dir, run.history[-1])


def _check_objective(run: Run) -> None:
    """Raise a `UserError` for an objective not recorded: what custom parts record is known only after an epoch."""
    for metric in run.config.objective:
        schema.check(metric in run.history[-1], "objective", metric, "one of " + ", ".join(run.history[-1]))


def _architecture_path(run: Run, run_dir: Path) -> Path:
    return run_dir / "architecture" / f"epoch_{run.epoch:04d}.json"


def _write_architecture(run: Run, run_dir: Path) -> None:
    path = _architecture_path(run, run_dir)
    path.parent.mkdir(exist_ok=True)
    facts = {"epoch": run.epoch, "change": run.change, **morph.describe(run.model)}
    path.write_text(json.dumps(facts, indent=1))


def _called(run: Run, tags: Mapping[str, str]) -> str:
    """What is trained on what, as it was typed; what an option only stands for is called by its class."""
    parts = {"model": run.model, "data": run.data}
    typed = {group: tags.get(group, "custom") for group in parts}
    names = (type(parts[group]).__name__ if name in GENERAL else name for group, name in typed.items())
    return " on ".join(names)


def _leave_artifacts(run: Run, run_dir: Path, tracker: Tracker, name: str) -> None:
    if len(run.changes) > 1:
        picture = run_dir / "widths.png"
        plot_widths(run.changes, run.epoch, picture, name)
        tracker.artifact(picture, "plots")
        interrupts.check()
    picture = run_dir / LEFT_AT_THE_END  # the last one: it says to a multirun that the run has ended
    plot_run(run.history, run.initial, picture, name)
    tracker.artifact(picture, "plots")
    tracker.artifact(run_dir / checkpoint.LAST)
    if best.is_another(run, run_dir):
        tracker.artifact(run_dir / best.BEST)
    for path in sorted((run_dir / "architecture").glob("*.json")):
        tracker.artifact(path, "architecture")
    resolved = run_dir / ".hydra" / "config.yaml"
    if resolved.exists():
        tracker.artifact(resolved, "config")
