"""What a user sees: a bar while an epoch runs, a line when it is done, a table at the end."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from morphtrain.schema import Custom
from morphtrain.state import Run
from morphtrain.trainer import best

WINDOW = 5  # epochs a median is taken over
SHOWN_SHARE, WARNED_SHARE = 0.05, 0.25  # of an epoch, spent waiting for data

Record = dict[str, float]


@contextmanager
def progress_bar(epoch: int, epochs: int, samples: int) -> Iterator[Callable[[int], None] | None]:
    """A bar for one epoch on a terminal; None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("epoch {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Two refreshes a second: the drawing thread shares the interpreter with what is being timed.
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as bar:
        task = bar.add_task(f"{epoch}/{epochs}", total=samples)
        yield lambda images: bar.update(task, advance=images)


def data_share(record: Record) -> float:
    """The share of an epoch (0 to 1) in which the training process waited for its next batch."""
    return record["data_seconds"] / record["epoch_seconds"]


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


def closing_table(history: Sequence[Record], initial: Mapping[str, int], warmup_epochs: int) -> Table:
    """The dense network the run started with against the one it ended with, each clocked over a few epochs."""
    clocked = history[warmup_epochs:] or history
    window = max(1, min(WINDOW, len(clocked) // 2))
    first, last = clocked[:window], clocked[-window:]
    table = Table(title=f"after {len(history)} epochs, {history[-1]['train_seconds']:.1f} s of training")
    table.add_column("")
    for name in ("dense", "final", "final / dense"):
        table.add_column(name, justify="right")
    for key, name in (("params", "parameters"), ("macs", "MACs a sample")):
        end = last[-1][key]
        table.add_row(name, str(initial[key]), f"{end:.0f}", f"{end / initial[key]:.3f}")
    dense, final = (statistics.median(r["epoch_seconds"] for r in records) for records in (first, last))
    name = f"seconds an epoch (median of epochs {_span(first)}, {_span(last)})"
    table.add_row(name, f"{dense:.3f}", f"{final:.3f}", f"{final / dense:.3f}")
    dense, final = (statistics.median(map(data_share, records)) for records in (first, last))
    table.add_row("waiting for data, share of an epoch", f"{dense:.3f}", f"{final:.3f}", "")
    early, late = first[-1], last[-1]
    name = f"validation accuracy (after epoch {early['epoch']:.0f}, {late['epoch']:.0f})"
    table.add_row(name, f"{early['val_accuracy']:.4f}", f"{late['val_accuracy']:.4f}", "")
    if contended := sum(bool(record["contended"]) for record in history):
        table.add_row("contended epochs (times not comparable)", "", f"{contended} of {len(history)}", "")
    return table


def _span(records: Sequence[Record]) -> str:
    first, last = records[0]["epoch"], records[-1]["epoch"]
    return f"{first:.0f}" if first == last else f"{first:.0f}-{last:.0f}"


def show_end(run: Run, run_dir: Path, checkpoint: Path) -> None:
    """Print the closing table, where the results are, and what to type next."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(closing_table(run.history, run.initial, run.config.timing.warmup_epochs))
    other = "none, the baseline" if run.config.prune.name != "none" else "prunetrain"
    print(f"run directory: {_short(run_dir)}")
    print(f"use it:        {_how_to_load(run, checkpoint)}")
    if best.is_another(run, run_dir):
        record = best.best(run.history)
        what = f"epoch {record['epoch']:.0f}, val_accuracy {record['val_accuracy']:.4f}"
        print(f"the best:      {_short(run_dir / best.BEST)} ({what})")
    print(f"next:          the same command with prune={other}; then `make ui` to compare")


def _how_to_load(run: Run, checkpoint: Path) -> str:
    """What to type, or to write where a function has to be passed."""
    if isinstance(run.config.norm, Custom):
        made = f"make(**keywords) builds the model and applies {run.config.norm.name}"
        return f"morphtrain.load('{_short(checkpoint)}', make)  # {made}"
    own = getattr(run.config.model, "_target_", "")
    more, given = (f", {own.rpartition('.')[0]}", f", {own}") if own else ("", "")
    return f"python -c \"import morphtrain{more}; print(morphtrain.load('{_short(checkpoint)}'{given}))\""


def _short(path: Path) -> Path:
    """The path relative to the current directory, if it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
