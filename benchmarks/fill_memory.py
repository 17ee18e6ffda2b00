"""What filling the memory that pruning frees gains and costs: PruneTrain on 8000 images of Fashion-MNIST.

    python fill_memory.py [seeds]        # 5 by default, or their numbers: 4,5; some five minutes a seed on one core

The budget is what the dense network's step takes, plus the policy's overhead. All arms of a seed run one after the
other. After each, steps of all its networks and batch sizes are repeated, counting what torch's allocator hands out.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from growth import interval, seconds_of, train
from scipy import stats

from morphtrain import morph
from morphtrain.cost import memory_model
from morphtrain.cost.copies import MOMENTUM_SGD
from morphtrain.cost.step import training_step
from morphtrain.model import ResNet

BATCH, WIDTH, EPOCHS, SHAPE = 32, 8, 12, (1, 28, 28)
OVERHEAD = 0.1  # batch_policy.overhead's default
COMMON = (
    *("data.train_samples=8000", f"model.width={WIDTH}", f"epochs={EPOCHS}", f"batch_policy.batch_size={BATCH}"),
    "memory_format=channels_last",  # in the other format, oneDNN's copies take the same for 1 to 16 channels
)
PRUNE = (
    "prune=prunetrain",
    "prune.lasso_ratio=0.4",
    "prune.lasso_ratio_of=loss",
    "prune.interval=1",
    "prune.start_epoch=2",
)
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


def dense_network() -> torch.nn.Module:
    return ResNet(blocks=1, width=WIDTH, in_channels=1).to(memory_format=torch.channels_last)


def compare(seed: int, place: Path, budget: int) -> dict[str, dict[str, float]]:
    """Every arm: its last record, the median seconds of its last epochs, and its peak memory over the budget."""
    found = {}
    for name, overrides in ARMS.items():
        fill = (f"batch_policy.budget={budget}",) if "batch_policy=fill_memory" in overrides else ()
        history = train(place / name, *COMMON, *overrides, *fill, f"seed={seed}")
        found[name] = {**history[-1], "last epochs": seconds_of(history[-3:])}
        found[name]["memory / budget"] = max(peaks(history, place / name)) / budget
        last = found[name]
        print(
            f"fill_memory: seed {seed}: {name:20}: val_accuracy {last['val_accuracy']:.4f}, "
            f"{last['train_seconds']:.1f} s, last epochs {last['last epochs']:.2f} s, batch {last['batch_size']:.0f}, "
            f"{last['params']:.0f} params, memory / budget {last['memory / budget']:.3f}",
            flush=True,
        )
    return found


def peaks(history: list[dict[str, float]], run_dir: Path) -> list[int]:
    """Peak bytes of each epoch's steps, measured again."""
    paths = {0: None} | {int(path.stem[-4:]): path for path in (run_dir / "architecture").glob("epoch_*.json")}
    # A change comes after its epoch: an epoch ran on the latest network of the epochs before it.
    steps = {(paths[max(e for e in paths if e < record["epoch"])], int(record["batch_size"])) for record in history}
    found = []
    for path, batch in steps:
        model = dense_network() if path is None else morph.rebuild(dense_network(), json.loads(path.read_text()))
        found.append(measured_peak(model, batch))
    return found


def measured_peak(model: torch.nn.Module, batch: int) -> int:
    """Bytes of tensors at the fullest moment of a training step, by the profiler's account of torch's allocator."""
    images, labels = (
        torch.randn(batch, *SHAPE).contiguous(memory_format=torch.channels_last),
        torch.randint(10, (batch,)),
    )
    optimizer = MOMENTUM_SGD(model.parameters())
    training_step(model, optimizer, images, labels)
    states = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor is not None]
    now = peak = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *states, images, labels))
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            training_step(model, optimizer, images, labels)
        profile.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else "5"
    seeds = [int(seed) for seed in wanted.split(",")] if "," in wanted else range(1, int(wanted) + 1)
    budget = round(memory_model(dense_network(), SHAPE).peak(BATCH) / (1 - OVERHEAD))
    results = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as place:
            results.append(compare(seed, Path(place), budget))
    report(results, budget)


def report(results: list[dict[str, dict[str, float]]], budget: int) -> None:
    """Means with intervals, and every arm against the pruned one, paired by seed."""
    print(f"fill_memory: means of {len(results)} seeds with 95 % intervals, budget {budget} bytes")
    keys = ("val_accuracy", "train_seconds", "last epochs", "batch_size", "params")
    for name in ARMS:
        columns = [f"{key} {interval([r[name][key] for r in results])}" for key in keys]
        most = max(r[name]["memory / budget"] for r in results)
        print(f"fill_memory: {name:20}: {', '.join(columns)}, memory / budget at most {most:.3f}")
    for name in (name for name in ARMS if name.startswith("filled")):
        for key in ("val_accuracy", "train_seconds"):
            pairs = [(r[name][key], r["pruned"][key]) for r in results]
            p = stats.ttest_rel(*zip(*pairs, strict=True)).pvalue
            print(f"fill_memory: {name} less pruned, {key}: {interval([a - b for a, b in pairs])}, p = {p:.2f}")


if __name__ == "__main__":
    main()
