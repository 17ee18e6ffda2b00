"""What a user sees: a bar while an epoch runs, a line when it is done, a table at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from morphtrain import interrupts, terminal, world
from morphtrain.errors import Incompatible
from morphtrain.schema import Config, Custom
from morphtrain.schema.model import Torchvision
from morphtrain.state import Run
from morphtrain.tracking.store import from_home
from morphtrain.trainer import best
from morphtrain.trainer.closing import closing_table, data_share

# Of conf/experiment/recipe.yaml, for networks, data and losses of which it is known that they can do it all.
RECIPE = ("prune=early", "data.progressive=0.7", "data.infobatch=0.5")
RECIPE_EPOCHS = 4  # fewer leave parts of it nothing to do
SHOWN_SHARE, WARNED_SHARE = 0.05, 0.25  # of an epoch, spent waiting for data

Record = dict[str, float]


@contextmanager
def progress_bar(run: Run) -> Iterator[Callable[[int], None] | None]:
    """A bar for the present epoch on a terminal; None where there is none, and for one of several jobs at once."""
    if not sys.stderr.isatty() or not world.is_main() or interrupts.is_worker():
        yield None
        return
    columns = (TextColumn("epoch {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Two refreshes a second: the drawing thread shares the interpreter with what is being timed.
    with Progress(*columns, console=terminal.drawing(), transient=True, refresh_per_second=2) as bar:
        task = bar.add_task(f"{run.epoch}/{run.config.epochs}", total=run.epoch_images)
        yield lambda images: bar.update(task, advance=images, total=run.epoch_images)  # known once it has begun


def data_warning(history: Sequence[Record], warmup_epochs: int, advice: str) -> str | None:
    """The warning after the first clocked epoch that waited too long for data; None after all others."""
    slow = [record for record in history[warmup_epochs:] if data_share(record) > WARNED_SHARE]
    if len(slow) != 1 or slow[0] is not history[-1]:
        return None
    return f"{data_share(slow[0]):.0%} of epoch {slow[0]['epoch']:.0f} was waiting for data: {advice}"


def epoch_line(record: Record, epochs: int, change: str) -> str:
    """One line about an epoch."""
    share = data_share(record)
    waited = f" ({share:.0%} waiting for data)" if share >= SHOWN_SHARE else ""
    line = (
        f"epoch {record['epoch']:>4.0f}/{epochs}  loss {record['train_loss']:.4f}  "
        f"val_accuracy {record['val_accuracy']:.4f}  {record['epoch_seconds']:.2f} s{waited}  "
        f"{record['macs'] / 1e6:.3g} M MACs  {record['params']:.0f} params"
    )
    return f"{line}  [{change}]" if change else line


def show_end(run: Run, run_dir: Path, checkpoint: Path, view: str, alone: bool) -> None:
    """Print the closing table, where the results are, and what to type next.

    Args:
        view: shows the tracker's records.
        alone: False for a job of a multirun, which chooses the next one itself.
    """
    console = Console(width=None if sys.stdout.isatty() else 110)
    with console.capture() as table:
        console.print(closing_table(run.history, run.initial, run.config.timing.warmup_epochs, run.config.objective))
    print(table.get(), end="")  # as all other lines: a console of its own would write into the line of a sweep
    print(f"run directory: {from_home(run_dir)}")
    print(f"use it:        {_how_to_load(run, checkpoint)}")
    if best.is_another(run, run_dir):
        record = best.best(run.history)
        what = f"epoch {record['epoch']:.0f}, val_accuracy {record['val_accuracy']:.4f}"
        print(f"the best:      {from_home(run_dir / best.BEST)} ({what})")
    if alone and (next_ones := _next(run, view)):
        print(f"next:          {next_ones}")


def _next(run: Run, view: str) -> str:
    """What to type next; "" if nothing is known that would do."""
    counterpart = _counterpart(run)
    parts = (f"the same command with {counterpart}" if counterpart else "", f"to compare: {view}" if view else "")
    return "; ".join(filter(None, parts))


def _counterpart(run: Run) -> str:
    """The overrides that make the run to compare this one with: without its methods, or with those that pay."""
    chosen = [f"{group}=none" for group in ("prune", "grow", "gradient") if getattr(run.config, group).name != "none"]
    plain = {"progressive": 1.0, "infobatch": 0.0}
    chosen += [f"data.{key}={off:g}" for key, off in plain.items() if getattr(run.config.data, key) != off]
    if chosen:
        return f"{' '.join(chosen)}, the baseline"
    config = run.config
    own = any(isinstance(part, (Custom, Torchvision)) for part in (config.model, config.data, config.loss))
    fits = bool(run.graph.spaces) and config.epochs >= RECIPE_EPOCHS and world.size() == 1 and _goes_with(config)
    return f"{' '.join(RECIPE)}, the recipe" if fits and not own else ""


def _goes_with(config: Config) -> bool:
    """Whether no option excludes the recipe, as mixed images exclude InfoBatch."""
    try:
        replace(config, data=replace(config.data, infobatch=0.5))
    except Incompatible:
        return False
    return True


def _how_to_load(run: Run, checkpoint: Path) -> str:
    """What to type, or to write where a function has to be passed."""
    if isinstance(run.config.norm, Custom):
        made = f"make(**keywords) builds the model and applies {run.config.norm.name}"
        return f"morphtrain.load('{from_home(checkpoint)}', make)  # {made}"
    own = getattr(run.config.model, "_target_", "")
    more, given = (f", {own.rpartition('.')[0]}", f", {own}") if own else ("", "")
    return f"python -c \"import morphtrain{more}; print(morphtrain.load('{from_home(checkpoint)}'{given}))\""
