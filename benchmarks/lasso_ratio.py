"""Does a ratio carry over, and which groups should it weigh? PruneTrain on the digits, 30 epochs, by the real command.

    python lasso_ratio.py [seeds]     # 5 seeds, or their numbers: 4,5; a quarter of an hour on one core

First accuracy at equal MACs, for both values of `prune.group_weight`: every seed's runs at several ratios, linearly
interpolated in the MACs that they end with. Then the share of parameters that the same ratio leaves in networks and
runs of different sizes and under other optimizers (one seed).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from morphtrain.evidence.records import read_records

COMMON = ("epochs=30", "prune=prunetrain", "prune.interval=2", "tracking=none", "device=cpu")
LOSS = ("prune.lasso_ratio_of=loss", "prune.lasso_ratio=0.7")
CASES = {
    "resnet8": (),
    "resnet20": ("model=resnet20",),
    "resnet32": ("model=resnet32",),
    "resnet8, width 8": ("model.width=8",),
    "resnet8, 90 epochs": ("epochs=90",),
    "resnet8, adamw": ("optimizer=adamw",),
    "resnet8, lars": ("optimizer=lars",),
}
RATIOS = {"none": (6, 9, 13), "sqrt_size": (9, 13, 18)}
TARGET = 0.25  # of the MACs, at which accuracies are compared


def ends(*overrides: str) -> tuple[float, float, float]:
    """(parameters, MACs, both as shares of the start; accuracy on held-out images) of a run's last epoch."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "morphtrain.run", *COMMON, *overrides, f"hydra.run.dir={directory}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        history = read_records(Path(directory))
    first, last = history[0], history[-1]
    return last["params"] / first["params"], last["macs"] / first["macs"], last["val_accuracy"]


def carry_over() -> None:
    """Print what the same ratio leaves of different runs: of the initial norm, then the paper's."""
    print("parameters left, accuracy: prune.lasso_ratio=4 of the initial norm | 0.7 of the loss")
    for name, overrides in CASES.items():
        of_norm, of_loss = ends("prune.lasso_ratio=4", *overrides), ends(*LOSS, *overrides)
        print(f"{name:20} {of_norm[0]:.3f} {of_norm[2]:.4f} | {of_loss[0]:.3f} {of_loss[2]:.4f}", flush=True)


def equal_macs(seeds: list[int]) -> None:
    """Print the accuracies of the two weightings where `TARGET` of the MACs is left."""
    found: dict[str, list[float]] = {}
    for weight, ratios in RATIOS.items():
        found[weight] = []
        for seed in seeds:
            options = (f"seed={seed}", f"prune.group_weight={weight}")
            runs = sorted(ends(*options, f"prune.lasso_ratio={ratio}")[1:] for ratio in ratios)
            macs, accuracies = zip(*runs, strict=True)
            found[weight].append(float(np.interp(TARGET, macs, accuracies)))
            print(f"{weight} seed {seed}: " + ", ".join(f"{a:.4f} at {m:.3f}" for m, a in runs), flush=True)
    for weight, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        print(f"{weight}: accuracy {statistics.mean(values):.4f}, standard deviation {spread:.4f}, n={len(values)}")


if __name__ == "__main__":
    equal_macs([int(seed) for seed in sys.argv[1].split(",")] if len(sys.argv) > 1 else [1, 2, 3, 4, 5])
    carry_over()
