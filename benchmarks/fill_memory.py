"""What it brings, and costs, to fill the memory that pruning frees: PruneTrain on 6000 images of Fashion-MNIST.

    python fill_memory.py [seeds]        # 5 by default, or their numbers: 4,5; some five minutes a seed on one core

The budget is what the dense network's step takes. All arms of a seed run one after the other.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from growth import interval, seconds_of, train

from morphtrain.cost import memory_model
from morphtrain.model import ResNet

BATCH, WIDTH, EPOCHS = 32, 8, 12
COMMON = ("data.train_samples=6000", f"model.width={WIDTH}", f"epochs={EPOCHS}", f"batch_policy.batch_size={BATCH}")
PRUNE = ("prune=prunetrain", "prune.lasso_ratio=0.5", "prune.interval=1", "prune.start_epoch=2")
FILL = (*PRUNE, "batch_policy=fill_memory")
ARMS = {
    "dense": (),
    "pruned": PRUNE,
    "filled, linear": (*FILL, "batch_policy.lr_scaling=linear"),
    "filled, sqrt": (*FILL, "batch_policy.lr_scaling=sqrt"),
    "filled, none": (*FILL, "batch_policy.lr_scaling=none"),
    "filled, sqrt, ghost": (*FILL, "batch_policy.lr_scaling=sqrt", "norm=ghost"),
    "filled, sqrt, lars": (*FILL, "batch_policy.lr_scaling=sqrt", "optimizer=lars"),
}


def compare(seed: int, place: Path, budget: int) -> dict[str, dict[str, float]]:
    """Every arm: its last record, and the median seconds of its last epochs."""
    found = {}
    for name, overrides in ARMS.items():
        fill = (f"batch_policy.budget={budget}",) if "batch_policy=fill_memory" in overrides else ()
        history = train(place / name, *COMMON, *overrides, *fill, f"seed={seed}")
        found[name] = {**history[-1], "last epochs": seconds_of(history[-3:])}
        last = found[name]
        print(
            f"fill_memory: seed {seed}: {name:20}: val_accuracy {last['val_accuracy']:.4f}, "
            f"{last['train_seconds']:.1f} s, last epochs {last['last epochs']:.2f} s, batch {last['batch_size']:.0f}, "
            f"{last['params']:.0f} params",
            flush=True,
        )
    return found


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else "5"
    seeds = [int(seed) for seed in wanted.split(",")] if "," in wanted else range(1, int(wanted) + 1)
    dense = ResNet(blocks=1, width=WIDTH, in_channels=1)
    budget = memory_model(dense, (1, 28, 28)).peak(BATCH)
    results = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as place:
            results.append(compare(seed, Path(place), budget))
    print(f"fill_memory: means of {len(seeds)} seeds with 95 % intervals, budget {budget} bytes")
    for name in ARMS:
        keys = ("val_accuracy", "train_seconds", "last epochs", "batch_size", "params")
        columns = [f"{key} {interval([r[name][key] for r in results])}" for key in keys]
        print(f"fill_memory: {name:20}: {', '.join(columns)}")


if __name__ == "__main__":
    main()
