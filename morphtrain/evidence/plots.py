"""Pictures of one run: how accurate, how fast and how large it was, and what a learning rate range test found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morphtrain.evidence import style, words
from morphtrain.evidence.style import INK, SERIES, Look
from morphtrain.wording import counted

Record = Mapping[str, float]

RUN_SIZE = (13.0, 4.0)  # inches
KINDS = {"undisturbed": ".", "warm-up": "o", "profiled": "+", "contended": "x"}  # of epochs, and their marks
SIZES = {"params": "parameters", "macs": "MACs", "channels": "live channels"}
FEW = 30  # epochs that get a mark each
BEYOND = 3.0  # times the longest usual epoch: longer ones would flatten all others


def plot_run(history: Sequence[Record], initial: Mapping[str, float], path: Path, name: str = "") -> None:
    """Plot the accuracy, epoch time and size of one run over its epochs, as a PNG.

    Args:
        history: the records of all epochs, at least one.
        initial: `params` and `macs` of the network that the run started with.
        path: of the PNG.
        name: of the run, as its title says it: `resnet8 on digits`.
    """
    with style.figure(RUN_SIZE) as figure:
        draw_run(figure, history, initial, name)
        style.save(figure, path, _told(history, initial, name))


def draw_run(figure: Any, history: Sequence[Record], initial: Mapping[str, float], name: str = "") -> None:
    """What `plot_run` writes, on an empty figure."""
    accuracy, seconds, size = figure.subplots(1, 3, sharex=True)
    style.headline(figure, title(history, initial, name))
    last = history[-1]["epoch"]
    seconds.set_xlim(-0.02 * last, 1.02 * last)  # of all three
    _accuracy(accuracy, history)
    _seconds(seconds, history)
    _sizes(size, history, initial)
    for axes in (accuracy, seconds, size):
        style.whole_epochs(axes)


def title(history: Sequence[Record], initial: Mapping[str, float], name: str = "") -> str:
    """What a run came to: `resnet8 on digits: 297k to 10.4k parameters in 120 epochs, test accuracy 0.969`."""
    end = history[-1]
    first, last = words.compact(initial["params"]), words.compact(end["params"])
    size = first if first == last else f"{first} to {last}"
    tested = f", test accuracy {end['test_accuracy']:.3f}" if "test_accuracy" in end else ""
    before = f"{style.shortened(name, 60)}: " if name else ""
    return f"{before}{size} parameters in {counted(end['epoch'], 'epoch')}{tested}"


def _told(history: Sequence[Record], initial: Mapping[str, float], name: str) -> str:
    """The picture of a run for those who cannot see it."""
    best = max(history, key=lambda record: record["val_accuracy"])
    end = history[-1]
    kinds = [_kind(record) for record in history]
    disturbed = f", {kinds.count('contended')} of them contended" if "contended" in kinds else ""
    return (
        f"{title(history, initial, name)}. Three panels over the epochs. Validation accuracy: "
        f"{end['val_accuracy']:.4f} at the end, at best {best['val_accuracy']:.4f} in epoch {best['epoch']:.0f}. "
        f"Time of an epoch: {history[0]['epoch_seconds']:.3g} s in the first, {end['epoch_seconds']:.3g} s in the last "
        f"of {counted(len(history), 'epoch')}{disturbed}. Size at the end, as a share of the first network's: "
        f"{end['params'] / initial['params']:.3f} of the parameters, {end['macs'] / initial['macs']:.3f} of the MACs, "
        f"{end['channel_density']:.3f} of the channels."
    )


def _accuracy(axes: Any, history: Sequence[Record]) -> None:
    """From 0 to 1, with the best epoch marked."""
    values = [record["val_accuracy"] for record in history]
    best = max(history, key=lambda record: record["val_accuracy"])
    _over_epochs(axes, [record["epoch"] for record in history], values, Look(SERIES[0], "o", "-"))
    axes.plot(best["epoch"], best["val_accuracy"], "D", color=INK, markerfacecolor="none", markersize=9)
    at = "" if best is history[-1] else f", best {best['val_accuracy']:.3f} (epoch {best['epoch']:.0f})"
    axes.set_title(f"Validation accuracy\n{values[-1]:.3f} at the end{at}")
    axes.set(xlabel="epoch", ylabel="accuracy", ylim=(-0.02, 1.02))


def _seconds(axes: Any, history: Sequence[Record]) -> None:
    """A mark an epoch, by whether its time counts; what would flatten all others stands at the edge and is named."""
    usual = [r["epoch_seconds"] for r in history if _kind(r) == "undisturbed"] or [r["epoch_seconds"] for r in history]
    most = BEYOND * max(usual)
    beyond = [r for r in history if r["epoch_seconds"] > most]
    top = 1.08 * max(r["epoch_seconds"] for r in history if r["epoch_seconds"] <= most)
    for (kind, mark), colour in zip(KINDS.items(), (*SERIES[:1] * 3, SERIES[1]), strict=True):
        shown = [r for r in history if _kind(r) == kind and r["epoch_seconds"] <= most]
        places = [r["epoch"] for r in shown], [r["epoch_seconds"] for r in shown]
        axes.plot(*places, mark, color=colour, markerfacecolor=colour if mark == "." else "none", label=kind)
    if beyond:
        longest = max(r["epoch_seconds"] for r in beyond)
        edge = [r["epoch"] for r in beyond], [top] * len(beyond)
        axes.plot(*edge, "^", color=SERIES[1], clip_on=False, label=f"longer, up to {longest:.3g} s")
    axes.set(title="Time of an epoch", ylim=(0, top), xlabel="epoch", ylabel="seconds")
    drawn = [line for line in axes.lines if len(line.get_xdata())]
    if any(line.get_label() != "undisturbed" for line in drawn):
        axes.legend(handles=drawn, loc="lower left")


def _kind(record: Record) -> str:
    if record["contended"]:
        return "contended"
    if record.get("profiled"):
        return "profiled"
    return "warm-up" if record.get("warmup") else "undisturbed"


def _sizes(axes: Any, history: Sequence[Record], initial: Mapping[str, float]) -> None:
    """Shares of the first network, named where they end; strokes at the axis are changes of structure."""
    epochs = [0.0, *(record["epoch"] for record in history)]
    shares = {
        "params": [record["params"] / initial["params"] for record in history],
        "macs": [record["macs"] / initial["macs"] for record in history],
        "channels": [record["channel_density"] for record in history],
    }
    looks = style.looks(SIZES.values())
    for key, name in SIZES.items():
        _over_epochs(axes, epochs, [1.0, *shares[key]], looks[name], name)
    changed = [record["epoch"] for record in history if record.get("changed")]
    if changed:  # nothing, unclipped, would take all room in the layout
        axes.plot(changed, [0.0] * len(changed), "|", color=INK, markersize=12, clip_on=False)
    axes.set_xlabel("after epoch (|: structure changed)" if changed else "after epoch")
    axes.set(title="Size", ylabel="multiple of the first network's", ylim=(0, None))
    style.label_ends(
        axes, [(shares[key][-1], f"{name} {shares[key][-1]:.3g}", looks[name]) for key, name in SIZES.items()]
    )


def _over_epochs(axes: Any, epochs: Sequence[float], values: Sequence[float], look: Look, name: str = "") -> None:
    """A line, with a mark at each of few epochs and at some of many."""
    every = 1 if len(epochs) <= FEW else len(epochs) // 8
    axes.plot(
        epochs, values, color=look.color, linestyle=look.linestyle, marker=look.marker, markevery=every, label=name
    )


def plot_learning_rates(steps: Sequence[tuple[float, float, float]], suggested: float, path: Path) -> None:
    """Plot the loss of a learning rate range test, as a PNG.

    Args:
        steps: in order, each with the learning rate, the loss of its batch, and the smoothed loss.
        suggested: the rate that is marked.
        path: of the PNG.
    """
    with style.figure() as figure:
        draw_learning_rates(figure, steps, suggested)
        low, high = steps[0][0], steps[-1][0]
        rises = f"the learning rate rises from {low:.3g} to {high:.3g}"
        style.save(figure, path, f"Training loss while {rises}; {suggested:.2g} is suggested.")


def draw_learning_rates(figure: Any, steps: Sequence[tuple[float, float, float]], suggested: float) -> None:
    """What `plot_learning_rates` writes, on an empty figure."""
    rates, losses, smoothed = zip(*steps, strict=True)
    lowest = min(range(len(steps)), key=lambda number: smoothed[number])
    top = max(1.5 * max(smoothed[0], min(smoothed)), 0.1)
    cut = sum(loss > top for loss in losses)
    axes = figure.subplots()
    axes.plot(rates, losses, ".", color=SERIES[5], markersize=4, label="a batch")
    axes.plot(rates, smoothed, "-", color=SERIES[0], label="smoothed")
    axes.plot(rates[lowest], smoothed[lowest], "D", color=INK, label=f"lowest, at {rates[lowest]:.2g}")
    axes.axvline(suggested, color=SERIES[1], linestyle="--", label=f"suggested, a tenth of that: {suggested:.2g}")
    above = f"\n({cut} of {len(losses)} batches lie above the axis)" if cut else ""
    axes.set(xscale="log", xlabel="learning rate (log scale)", ylabel=f"training loss{above}", ylim=(0, top))
    axes.set_title(f"Learning rate range test: {suggested:.2g} is suggested")
    style.log_ticks(axes.xaxis)
    axes.legend()
