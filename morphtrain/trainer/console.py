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

from morphtrain.trainer.run import Run

WINDOW = 5  # epochs a median is taken over

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


def epoch_line(record: Record, epochs: int, change: str) -> str:
    """An epoch in a line."""
    line = (
        f"epoch {record['epoch']:>4.0f}/{epochs}  loss {record['train_loss']:.4f}  "
        f"val_accuracy {record['val_accuracy']:.4f}  {record['epoch_seconds']:.2f} s  "
        f"{record['macs'] / 1e6:.3g} M MACs  {record['params']:.0f} params"
    )
    return f"{line}  [{change}]" if change else line


def closing_table(history: Sequence[Record], initial: Mapping[str, int], warmup_epochs: int) -> Table:
    """The network at the start of the run against the one at its end, each over a few epochs."""
    clocked = list(history[warmup_epochs:]) or list(history)
    window = max(1, min(WINDOW, len(clocked) // 2))
    first, last = clocked[:window], clocked[-window:]
    table = Table(title=f"after {len(history)} epochs, {history[-1]['train_seconds']:.1f} s of training")
    table.add_column("")
    for records, name in ((first, "dense"), (last, "final")):
        span = f"{records[0]['epoch']:.0f}-{records[-1]['epoch']:.0f}" if window > 1 else f"{records[0]['epoch']:.0f}"
        table.add_column(f"{name} (epoch {span})", justify="right")
    table.add_column("final / dense", justify="right")
    _add_row(table, "parameters", initial["params"], last[-1]["params"], "{:.0f}")
    _add_row(table, "MACs a sample", initial["macs"], last[-1]["macs"], "{:.0f}")
    dense, final = (statistics.median(r["epoch_seconds"] for r in records) for records in (first, last))
    _add_row(table, "seconds an epoch (median)", dense, final, "{:.3f}")
    _add_row(table, "validation accuracy", first[-1]["val_accuracy"], last[-1]["val_accuracy"], "{:.4f}")
    return table


def _add_row(table: Table, name: str, dense: float, final: float, form: str) -> None:
    ratio = f"{final / dense:.3f}" if dense else "-"
    table.add_row(name, form.format(dense), form.format(final), ratio)


def show_end(run: Run, run_dir: Path, checkpoint: Path) -> None:
    """The closing table, where the results are, and what to type next."""
    console = Console()
    console.print(closing_table(run.history, run.initial, run.config.timing.warmup_epochs))
    print(f"checkpoint: {checkpoint}   everything else: {run_dir}")
    print(f"use it:     python -c \"import morphtrain; print(morphtrain.load('{checkpoint}'))\"")
    if run.config.prune.name == "none":
        print("next:       the same command with prune=prunetrain; then `make ui` to compare")
    else:
        print("next:       the same command with prune=none, the baseline; then `make ui` to compare")
