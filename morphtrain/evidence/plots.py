"""Pictures of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_run(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Accuracy, epoch time, and size over the epochs of one run, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [record["epoch"] for record in history]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, seconds, size = figure.subplots(1, 3)
    accuracy.plot(epochs, [r["val_accuracy"] for r in history])
    accuracy.set(title="Validation accuracy", xlabel="epoch", ylabel="accuracy")
    seconds.plot(epochs, [r["epoch_seconds"] for r in history], ".", markersize=4)
    seconds.set(title="Time of an epoch", xlabel="epoch", ylabel="seconds", ylim=(0, None))
    for key in ("params", "macs"):
        size.plot(epochs, [r[key] / history[0][key] for r in history], label=key)
    size.plot(epochs, [r["channel_density"] for r in history], label="live channels")
    size.set(title="Size, as a share of the first epoch's", xlabel="epoch", ylim=(0, None))
    size.legend()
    figure.savefig(path, dpi=110)
