"""The table at the end of a run: the network it started with against the one it ended with."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from morphtrain.evidence.calibration import is_calibrated, why_not_calibrated
from morphtrain.timing.summaries import NEVER
from morphtrain.wording import counted

Record = dict[str, float]
Row = tuple[str, str, str, str]  # name, of the first network, of the last network, last / first

ACCURACIES = {"val_accuracy": "validation accuracy at the end", "test_accuracy": "test accuracy at the end"}

# Metrics that the title and the rows of any table show, under other names.
SHOWN = {"train_seconds", "params", "macs", "batch_size", "epoch_seconds", "calibrated_seconds", *ACCURACIES}


def data_share(record: Record) -> float:
    """The share of an epoch (0 to 1) in which the training process waited for its next batch."""
    return record["data_seconds"] / record["epoch_seconds"]


def waiting_share(record: Record) -> float:
    """The share of an epoch (0 to 1) in which one of several processes waited for the others' sums."""
    return record["comm_seconds"] / record["epoch_seconds"]


def closing_table(
    history: Sequence[Record], initial: Mapping[str, int], warmup_epochs: int, objective: Sequence[str] = ()
) -> Table:
    """Size and speed of the first and the last network of a run, and the accuracy that the run ended with.

    The first network is the one that the run started with: the full one if it was pruned, the narrow one if it grew.
    Each is timed by the median of the epochs that trained it, at one batch and image size, without those of the warm-up
    or with profiled steps and, if others are left, without contended ones; an epoch that left images out, as if it had
    gone on at its speed.
    Accuracy is only the end's: early in a run it says nothing of a network.

    Args:
        history: the records of all epochs, at least one.
        initial: `params` and `macs` of the first network.
        warmup_epochs: number of first epochs whose times do not count.
        objective: metrics that the run was made for, shown as they are at its end if nothing else here shows them.
    """
    end = history[-1]
    stages = _stages(history, initial)
    changed = len(stages) > 1 or _size(end) != _size(initial)
    trained_last = stages[-1] if len(stages) > 1 or not changed else []  # changed after the last epoch: never trained
    first, last = _clocked(stages[0], warmup_epochs), _clocked(trained_last, warmup_epochs)
    sizes = ("params", "parameters"), ("macs", "MACs a sample")
    rows = [(name, str(initial[key]), f"{end[key]:.0f}", f"{end[key] / initial[key]:.3f}") for key, name in sizes]
    if len({stage[0]["batch_size"] for stage in stages}) > 1:
        rows.append(("batch size", f"{history[0]['batch_size']:.0f}", f"{end['batch_size']:.0f}", ""))
    if len({stage[0].get("image_size") for stage in stages}) > 1:
        rows.append(("pixels a side", f"{history[0]['image_size']:.0f}", f"{end['image_size']:.0f}", ""))
    rows += _time_rows(first, last)
    rows += [(name, "", f"{end[key]:.4f}", "") for key, name in ACCURACIES.items() if key in end]
    rows += [(name, "", _at_end(end[name]), "") for name in objective if name in end and name not in SHOWN]
    if contended := sum(bool(record["contended"]) for record in history):
        rows.append(("contended epochs", "", f"{contended} of {len(history)}", ""))
    if profiled := sum(bool(record.get("profiled")) for record in history):
        rows.append(("profiled epochs", "", f"{profiled} of {len(history)}", ""))
    title = f"after {counted(len(history), 'epoch')}, {end['train_seconds']:.1f} s of training"
    if "processes" in end:
        title += f" in {end['processes']:.0f} processes"
    note = why_incomparable(first, last) if changed else ""
    if len(stages) > 1 and _size(end) != _size(history[-2]):
        note = note or f"The last network's times are those before the change after epoch {end['epoch']:.0f}."
    return _drawn(title, rows, note, changed)


def _size(record: Mapping[str, float]) -> tuple[float, float]:
    return record["params"], record["macs"]


def _stages(history: Sequence[Record], initial: Mapping[str, int]) -> list[list[Record]]:
    """The epochs, split where the network, the batch size or the image size changed."""
    trained = [_size(initial), *map(_size, history[:-1])]  # a record has the size after the change that follows it
    keys = [
        (size, record["batch_size"], record.get("image_size"))  # not recorded where it never changes
        for size, record in zip(trained, history, strict=True)
    ]
    groups = itertools.groupby(zip(keys, history, strict=True), key=lambda pair: pair[0])
    return [[record for _, record in group] for _, group in groups]


def _clocked(stage: Sequence[Record], warmup_epochs: int) -> list[Record]:
    """The epochs of a stage whose times count."""
    warm = [record for record in stage if record["epoch"] > warmup_epochs and not record.get("profiled")]
    return [record for record in warm if not record["contended"]] or warm


def why_incomparable(first: Sequence[Record], last: Sequence[Record]) -> str:
    """Why the times of two stages cannot be compared; "" if they can."""
    if not first or not last:
        return f"No ratio of times: no epoch after the warm-up trained the {'last' if first else 'first'} network."
    if first[0].get("image_size") != last[0].get("image_size"):
        return "No ratio of times: the networks were trained on images of different sizes."
    why = why_not_calibrated([*first, *last])
    if why and any(record["contended"] for record in (*first, *last)):
        return f"No ratio of times: epochs were contended, and {why}."
    return ""


def _time_rows(first: Sequence[Record], last: Sequence[Record]) -> list[Row]:
    """Medians over the clocked epochs; the ratio stands where it is the truest known, if it is known at all."""
    known = not why_incomparable(first, last)
    calibrated = is_calibrated([*first, *last])

    def row(name: str, metric: Callable[[Record], float], with_ratio: bool) -> Row:
        before, after = (statistics.median(map(metric, stage)) if stage else None for stage in (first, last))
        ratio = f"{after / before:.3f}" if with_ratio and known and before and after else ""
        return name, _seconds(before), _seconds(after), ratio

    rows = [row("seconds an epoch", lambda record: _of_all(record, "epoch_seconds"), not calibrated)]
    if calibrated:
        rows.append(row("seconds an epoch, calibrated", lambda record: _of_all(record, "calibrated_seconds"), True))
    rows.append(row("share of an epoch spent waiting for data", data_share, False))
    if all("comm_seconds" in record for record in (*first, *last)) and (first or last):
        rows.append(row("share of an epoch spent waiting for others", waiting_share, False))
    return [*rows, ("  (medians of epochs)", _span(first), _span(last), "")]


def _of_all(record: Record, seconds: str) -> float:
    """What the epoch would have taken with all images."""
    return record[seconds] / record.get("share_trained", 1.0)


def _at_end(value: float) -> str:
    return "not reached" if value >= NEVER else f"{value:.5g}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _span(records: Sequence[Record]) -> str:
    if not records:
        return "-"
    first, last = (int(record["epoch"]) for record in (records[0], records[-1]))
    span = f"{first}" if first == last else f"{first}-{last}"
    return span if len(records) == last - first + 1 else f"{len(records)} of {span}"


def _drawn(title: str, rows: Sequence[Row], note: str, changed: bool) -> Table:
    table = Table(title=title, caption=note or None, caption_justify="left")
    table.add_column("")
    for name in ("first network", "last network", "last / first") if changed else ("network",):
        table.add_column(name, justify="right")
    for name, first, last, ratio in rows:
        table.add_row(name, *((first, last, ratio) if changed else (last,)))
    return table
