"""Does it pay to grow? A narrow ResNet-8 on a part of Fashion-MNIST that becomes wider or deeper halfway, or by rules,
against the structure it ended with, trained from scratch for the same number of seconds.

    python growth.py [seeds [arms]]     # 5 seeds, or their numbers: 4,5; eight minutes a seed on one core

Arms of one seed run one after the other, and a structure's own control directly after it; the seconds are those of
`train_seconds` (epochs and structural changes). From scratch the schedule ends where the seconds do.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from scipy import stats

from morphtrain.evidence.records import read_records

COMMON = ("data.train_samples=3000", "model.width=8", "batch_policy.batch_size=64")
EPOCHS, MIDDLE = 12, 6
PRUNE = (
    "prune=prunetrain",
    "prune.lasso_ratio=0.3",
    "prune.lasso_ratio_of=loss",
    "prune.interval=2",
    "prune.start_epoch=2",
)
ARMS = {
    "narrow": (),
    "wider": ("grow=wider", f"grow.at_epochs=[{MIDDLE}]"),
    "deeper": ("grow=deeper", f"grow.at_epochs=[{MIDDLE}]"),
    "selective": (*PRUNE, "grow=selective", f"grow.at_epochs=[{MIDDLE}]", "grow.target=3", "grow.operator=auto"),
    "adaptive": (*PRUNE, "grow=adaptive", "grow.patience=3", "grow.step=2"),
    "adaptive, constant": (
        *(*PRUNE, "grow=adaptive", "grow.patience=3", "grow.step=2"),
        *("schedule=constant", "optimizer.lr=0.05"),
    ),
}


def train(directory: Path, *overrides: str) -> list[dict[str, float]]:
    """The records of a run through the real command."""
    run = ("data=fashion_mnist", "tracking=none", f"hydra.run.dir='{directory}'")  # quoted: names hold commas
    command = [sys.executable, "-m", "morphtrain.run", *overrides, *run]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_records(directory)


def seconds_of(records: list[dict[str, float]]) -> float:
    return statistics.median(record["epoch_seconds"] for record in records)


def compare(seed: int, arms: list[str], place: Path) -> dict[str, dict[str, float]]:
    """Every arm and its control: final accuracy, seconds, parameters."""
    found = {}
    for name in arms:
        overrides = ARMS[name]
        history = train(place / name, *COMMON, f"epochs={EPOCHS}", f"seed={seed}", *overrides)
        found[name] = history[-1]
        if name == "narrow":
            continue
        # The time of an epoch after the last change tells how many epochs of the final structure the seconds allow.
        final = [record for record in history if record["params"] == history[-1]["params"]][1:] or history[-1:]
        epochs = max(1, round(history[-1]["train_seconds"] / seconds_of(final)))
        start = (f"architecture={place / name / 'last.pt'}", f"epochs={epochs}", f"seed={seed}")
        found[f"{name}, from scratch"] = train(place / f"{name}_scratch", *COMMON, *start)[-1]
    for name, record in found.items():
        print(f"growth: seed {seed}: {name:24}: {line(record)}", flush=True)
    return found


def line(record: dict[str, float]) -> str:
    return (
        f"val_accuracy {record['val_accuracy']:.4f}, {record['train_seconds']:6.1f} s, {record['params']:7.0f} params, "
        f"{record['macs'] / 1e6:.2f} M MACs, epoch {record['epoch']:.0f}"
    )


def interval(values: list[float]) -> str:
    """Mean and half of the 95 % t interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4g} +- {half:.2g}"


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else "5"
    seeds = [int(seed) for seed in wanted.split(",")] if "," in wanted else range(1, int(wanted) + 1)
    arms = sys.argv[2].split(";") if len(sys.argv) > 2 else list(ARMS)
    results = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as place:
            results.append(compare(seed, arms, Path(place)))
    print(f"growth: means of {len(seeds)} seeds with 95 % intervals")
    for name in results[0]:
        columns = [interval([r[name][key] for r in results]) for key in ("val_accuracy", "train_seconds", "params")]
        print(f"growth: {name:24}: val_accuracy {columns[0]}, {columns[1]} s, {columns[2]} params")
    for name in arms:
        if name == "narrow":
            continue
        for other in (f"{name}, from scratch", *(["narrow"] if "narrow" in arms else [])):
            ours, theirs = ([100 * r[which]["val_accuracy"] for r in results] for which in (name, other))
            pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
            p = stats.ttest_rel(ours, theirs).pvalue
            print(f"growth: {name} minus {other}: {interval(pairs)} points, paired t-test p = {p:.2g}")


if __name__ == "__main__":
    main()
