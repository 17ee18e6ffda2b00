"""The recipe beside what one would take instead: the same job in one process, epoch by epoch in turns.

    python peers.py [seeds [size [overrides ...]]]     # 5 seeds of size=small of conf/experiment/recipe.yaml

- ours: the recipe of that file.
- dense: the same loop as the peers', uncompiled.
- compiled: the dense network by `torch.compile` and bf16, as a user of plain PyTorch would train it. Compiling takes
  half a minute of its seconds, which only a longer job earns back.
- torch-pruning: the dense network, pruned once after a tenth of the epochs to half of its MACs, by the mean of its
  groups' norms over all layers, in widths of multiples of 8; then it is trained to its end (Fang et al. 2023).
- fasterai: pruned while it trains, by fasterai's schedule over the first half of the epochs, to the same MACs. Left out
  if fasterai is not installed (`pip install fasterai`).

All have the images, the order, the first weights, SGD, the cosine schedule and the batch size in common, and are
evaluated on the test images at their end. Shortcuts are projections, which torch-pruning can follow. Seconds
are those of training: epochs, what changes the network, and what compiles it; not evaluation. Formats are the recipe's.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import yaml
from torch import nn
from torch.nn import functional as F

import morphtrain
from morphtrain import schema
from morphtrain.compare.own_state import OwnState
from morphtrain.compare.training import epochs
from morphtrain.compare.turns import in_turns
from morphtrain.cost import count_macs
from morphtrain.evidence import words
from morphtrain.evidence.repeats import geometric, paired_ratio, share
from morphtrain.experiment.declaration import merged
from morphtrain.state import Run, derived_seed
from morphtrain.trainer import auto
from morphtrain.trainer.epoch import start
from morphtrain.trainer.loop import evaluate
from morphtrain.trainer.train import new_run, prepared
from morphtrain.wording import counted

TARGET = 0.5  # share of the MACs that pruning leaves
EARLY = 0.1  # share of the epochs before torch-pruning prunes
MULTIPLE = 8  # of widths
STEPS = 10  # in which fasterai prunes, and at most in how many torch-pruning comes near the target

FILE = yaml.safe_load((schema.CONF / "experiment" / "recipe.yaml").read_text())["hydra"]["sweeper"]
Change = Callable[[Run, float], bool]  # of the network, after a share of the epochs; whether it has changed


@dataclass(frozen=True)
class End:
    """What a training gave."""

    seconds: float
    accuracy: float
    macs: float  # of the last network, as a share of the first one's


@dataclass
class Side:
    """A training, an epoch whenever it is asked for the next one; `end` is set after the last."""

    training: Iterator[int]
    end: End | None = None


def ours(run: Run) -> Side:
    def training() -> Iterator[int]:
        start(run)
        for _ in epochs(run):
            yield run.epoch
        last = run.history[-1]
        side.end = End(last["train_seconds"], last["test_accuracy"], run.macs / run.initial["macs"])

    side = Side(training())
    return side


def peer(run: Run, forward: Callable[[nn.Module], nn.Module], change: Change) -> Side:
    """A loop as users write it, on a run's data, first weights and hyperparameters."""

    def training() -> Iterator[int]:
        auto.choose(run)  # not in its seconds
        first, seconds = run.macs, 0.0
        optimizer, model = sgd(run), forward(run.model)
        for epoch in range(run.config.epochs):
            begun = time.perf_counter()
            torch.manual_seed(derived_seed(run.config.seed, epoch + 1))
            train_epoch(run, model, optimizer, epoch)
            if change(run, (epoch + 1) / run.config.epochs):
                optimizer = sgd(run)
            seconds += time.perf_counter() - begun
            yield epoch
        left = count_macs(run.model, run.data.input_shape) / first
        side.end = End(seconds, evaluate(run, "test")[1], left)

    side = Side(training())
    return side


def train_epoch(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    config, seen = run.config, 0
    size: int = config.batch_policy.batch_size
    model.train()
    for images, labels in run.data.train_batches(size, run.generator(epoch + 1)):
        done = (epoch + (seen + len(labels) / 2) / len(run.data.train)) / config.epochs
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad(set_to_none=True)
        with run.precision.autocast():
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        seen += len(labels)


def sgd(run: Run) -> torch.optim.Optimizer:
    """As conf/optimizer/sgd.yaml: no weight decay on norms and biases."""
    config = run.config.optimizer
    weights = [p for p in run.model.parameters() if p.dim() > 1]
    others = [p for p in run.model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def nothing(run: Run, done: float) -> bool:
    return False


def by_torch_pruning() -> Change:
    pruned = False

    def change(run: Run, done: float) -> bool:
        nonlocal pruned
        if pruned or done < EARLY:
            return False
        import torch_pruning

        images = run.data.train.pixels[:1]
        pruner = torch_pruning.pruner.BasePruner(
            run.model,
            images,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=0.9,
            max_pruning_ratio=0.9,
            iterative_steps=10 * STEPS,
            round_to=MULTIPLE,
            ignored_layers=last_linear(run.model),
        )
        wanted = TARGET * run.macs
        for _ in range(10 * STEPS):
            pruner.step()
            if count_macs(run.model, run.data.input_shape) <= wanted:
                break
        pruned = True
        return True

    return change


def by_fasterai() -> Change:
    pruner = None
    steps = 0

    def change(run: Run, done: float) -> bool:
        nonlocal pruner, steps
        if pruner is None:
            from fasterai.core.criteria import large_final
            from fasterai.core.schedule import agp
            from fasterai.prune.pruner import Pruner

            pruner = Pruner(
                run.model,
                1 - math.sqrt(TARGET),  # of the channels: MACs fall by the square
                "local",
                large_final,
                schedule=agp,
                ignored_layers=last_linear(run.model),
                example_inputs=run.data.train.pixels[:1],
                iterative_steps=STEPS,
                round_to=MULTIPLE,
            )
        before = steps
        while steps < STEPS and (steps + 1) / STEPS <= 2 * done:
            pruner.prune_model()
            steps += 1
        return steps > before

    return change


def last_linear(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]


def sides(job: list[str], seed: int, device: torch.device) -> dict[str, Side]:
    config = [*job, f"seed={seed}", "tracking=none"]
    arms = FILE["arms"]
    recipe = [o for part in arms["recipe"]["parts"] for o in arms[part]["overrides"]]
    # Formats are no structure: all sides have ours.
    formats = [o for o in recipe if o.split("=")[0] in ("precision", "memory_format")]
    bf16 = [*(o for o in formats if not o.startswith("precision=")), "precision=bf16"]

    def run(*overrides: str) -> Run:
        return new_run(morphtrain.compose(*merged(config, overrides)), device)

    found = {
        "ours": ours(run(*recipe)),
        "dense": peer(run(*formats), lambda model: model, nothing),
        "compiled": peer(run(*bf16), torch.compile, nothing),
        "torch-pruning": peer(run(*formats), lambda model: model, by_torch_pruning()),
    }
    if importlib.util.find_spec("fasterai") is not None:
        found["fasterai"] = peer(run(*formats), lambda model: model, by_fasterai())
    for side in found.values():
        side.training = OwnState(device).of(side.training)
    return found


def trained(job: list[str], seed: int, device: torch.device) -> dict[str, End]:
    """All sides, trained to their ends in turns."""
    there = sides(job, seed, device)
    for _ in in_turns({name: side.training for name, side in there.items()}):
        pass
    ends = {name: side.end for name, side in there.items() if side.end is not None}
    for name, end in ends.items():
        print(
            f"peers: seed {seed}: {name:14}: {end.seconds:7.2f} s, test_accuracy {end.accuracy:.4f}, "
            f"{end.macs:.3f} of the MACs",
            flush=True,
        )
    return ends


def report(found: Mapping[int, Mapping[str, End]]) -> None:
    print(f"peers: means over {counted(len(found), 'seed')} with 95 % intervals; ratios of seconds are paired by seed")
    for name in next(iter(found.values())):
        ends = {seed: ends[name] for seed, ends in found.items()}
        seconds = {seed: end.seconds for seed, end in ends.items()}
        ratio = paired_ratio({seed: ends["ours"].seconds for seed, ends in found.items()}, seconds)
        assert ratio is not None
        taken, accuracy = geometric(list(seconds.values())), share([end.accuracy for end in ends.values()])
        print(
            f"peers: {name:14}: {words.interval(taken.mean, taken.low, taken.high)} s, test_accuracy "
            f"{words.interval(accuracy.mean, accuracy.low, accuracy.high)}, ours takes "
            f"{words.interval(ratio.mean, ratio.low, ratio.high)} of its seconds"
        )


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    size = sys.argv[2] if len(sys.argv) > 2 else "small"
    job = merged(FILE["sizes"][size]["overrides"], ["model.shortcut=B"], sys.argv[3:])
    if importlib.util.find_spec("fasterai") is None:
        print("peers: fasterai is not installed, and left out; pip install fasterai")
    with prepared(morphtrain.compose(*job)) as slot:
        report({seed: trained(job, seed, slot.device) for seed in range(1, seeds + 1)})


if __name__ == "__main__":
    main()
