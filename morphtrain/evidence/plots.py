"""Plots of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_run(history: Sequence[Mapping[str, float]], initial: Mapping[str, float], path: Path) -> None:
    """Plot the accuracy, epoch time and size of one run over its epochs, as a PNG.

    Args:
        history: the records of all epochs, at least one.
        initial: `params` and `macs` of the network that the run started with.
        path: of the PNG.
    """
    run_figure(history, initial).savefig(path, dpi=110)


def run_figure(history: Sequence[Mapping[str, float]], initial: Mapping[str, float]) -> Any:
    """The figure that `plot_run` writes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [record["epoch"] for record in history]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, seconds, size = figure.subplots(1, 3)
    accuracy.plot(epochs, [r["val_accuracy"] for r in history])
    accuracy.set(title="Validation accuracy", xlabel="epoch", ylabel="accuracy")
    for contended, style, colour in ((0.0, ".", "C0"), (1.0, "x", "C3")):
        marked = [r for r in history if r["contended"] == contended]
        times = [r["epoch"] for r in marked], [r["epoch_seconds"] for r in marked]
        seconds.plot(*times, style, color=colour, markersize=4, label="contended" if contended else "undisturbed")
    seconds.set(title="Time of an epoch", xlabel="epoch", ylabel="seconds", ylim=(0, None))
    if any(r["contended"] for r in history):
        seconds.legend()
    for key in ("params", "macs"):
        size.plot([0, *epochs], [1.0, *(r[key] / initial[key] for r in history)], label=key)
    size.plot([0, *epochs], [1.0, *(r["channel_density"] for r in history)], label="live channels")
    size.set(title="Size, as a share of the first network's", xlabel="after epoch", ylim=(0, None))
    size.legend()
    return figure


def plot_widths(changes: Sequence[Mapping[str, Any]], epochs: int, path: Path) -> None:
    """Plot the width of every channel space over the epochs of one run, with the changes of structure, as a PNG.

    Args:
        changes: in order, each with `epoch`, `event` ("" for the start) and `widths`, by the names of channel spaces.
        epochs: number of epochs that the run has trained.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for change in changes for name in change["widths"]))
    first = {name: next(c["widths"][name] for c in changes if name in c["widths"]) for name in names}
    columns = []  # per epoch: width after it / first width of each space, NaN where the space does not exist
    for epoch in range(epochs + 1):
        widths = [c for c in changes if c["epoch"] <= epoch][-1]["widths"]
        columns.append([widths[name] / first[name] if name in widths else float("nan") for name in names])
    shares = [list(row) for row in zip(*columns, strict=True)]
    figure = Figure(figsize=(max(7.0, 4 + 0.08 * epochs), 2 + 0.22 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap="RdBu", vmin=0, vmax=2)
    figure.colorbar(image, label="width, as a multiple of the first", shrink=0.8, extend="max")
    last = changes[-1]["widths"]
    axes.set_yticks(range(len(names)), [f"{name}  {first[name]} to {last.get(name, 0)}" for name in names], fontsize=7)
    axes.set(xlabel="epoch", title="Widths of the channel spaces")
    events = [change for change in changes if change["event"]]
    for number, change in enumerate(events, 1):
        axes.axvline(change["epoch"] - 0.5, color="black", linewidth=0.7)
        axes.annotate(str(number), (change["epoch"] - 0.5, -0.5), fontsize=6, ha="center", va="bottom")
    key = "\n".join(f"{n}  epoch {c['epoch']}: {_short(c['event'])}" for n, c in enumerate(events[:20], 1))
    axes.text(0, -0.14 - 0.3 / len(names), key, transform=axes.transAxes, fontsize=6, va="top")
    figure.savefig(path, dpi=110)


def _short(event: str) -> str:
    return event if len(event) <= 110 else event[:107] + "..."


def plot_learning_rates(steps: Sequence[tuple[float, float, float]], suggested: float, path: Path) -> None:
    """Plot the loss of a learning rate range test, as a PNG.

    Args:
        steps: in order, each with the learning rate, the loss of its batch, and the smoothed loss.
        suggested: the rate that is marked.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rates, losses, smoothed = zip(*steps, strict=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(rates, losses, ".", color="C7", markersize=3, alpha=0.5, label="a batch")
    axes.plot(rates, smoothed, color="C0", label="smoothed")
    axes.axvline(suggested, color="C3", linestyle="--", label=f"a tenth of the lowest's rate: {suggested:.2g}")
    top = 1.5 * max(smoothed[0], min(smoothed))
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", ylim=(0, max(top, 0.1)))
    axes.set_title("Learning rate range test")
    axes.legend()
    figure.savefig(path, dpi=110)
