"""Whole training steps by number format, over those in 32 bits: dense and pruned, in both memory formats, interleaved.

    python number_formats.py                                         # widths 16, 32 and 64, all formats
    python number_formats.py --widths 64 --formats bf16 o2 --rounds 40

Each variant is a run of its own as `morphtrain.run` makes it, a ResNet-8 on the images of `mnist_5000`, batch 64; its
steps take turns with those of all others of its width: data, forward, backward, optimizer and hooks. "pruned": about
half of the MACs have gone, at widths drawn at random, so that they are as ragged as PruneTrain leaves them.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator

import torch
from interleaved import report
from torch import nn

import morphtrain
from morphtrain import schema
from morphtrain.compare.training import steps
from morphtrain.compare.turns import in_turns
from morphtrain.cost import count_macs
from morphtrain.morph import ChannelGraph
from morphtrain.state import Run
from morphtrain.trainer import build_run, start
from morphtrain.trainer.process import prepare_process

PLAIN = "o0"
FORMATS = ("bf16", "o1", "o2", "bf16_pure", "o3", "dfp16")
LAYOUTS, STRUCTURES = ("contiguous", "channels_last"), ("dense", "pruned")
WARMUP = 4  # rounds
LEAST, MOST = 0.5, 0.9  # of its channels, that a space keeps in a pruned network: 0.49 of the MACs on average
COMMON = ("data=mnist_5000", "batch_policy.batch_size=64", "epochs=1000", "tracking=none")


def halved(model: nn.Module) -> nn.Module:
    """The network without some of its channels, the same for every variant."""
    graph, draw = ChannelGraph.trace(model, torch.zeros(1, 1, 28, 28)), random.Random(0)
    kept = {space: max(1, round(draw.uniform(LEAST, MOST) * space.size)) for space in graph.spaces}
    graph.reindex_spaces({space: torch.arange(size) for space, size in kept.items()})
    return model


def started(width: int, structure: str, layout: str, precision: str) -> Run:
    overrides = (f"model.width={width}", f"memory_format={layout}", f"precision={precision}")
    run = build_run(morphtrain.compose(*COMMON, *overrides), morph=halved if structure == "pruned" else None)
    start(run)
    return run


def seconds_of(run: Run) -> Iterator[float]:
    return (step.seconds for step in steps(run))


def measure(width: int, formats: list[str], rounds: int) -> None:
    names = [" ".join(parts) for parts in itertools.product(STRUCTURES, LAYOUTS, formats)]
    runs = {name: started(width, *name.split()) for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    turns = in_turns({name: seconds_of(run) for name, run in runs.items()}, WARMUP)
    for name, seconds in itertools.islice(turns, len(names) * (WARMUP + rounds)):
        spent[name].append(seconds)
    spent = {name: found[WARMUP:] for name, found in spent.items()}
    macs = {name: count_macs(runs[f"{name} {LAYOUTS[0]} {PLAIN}"].model, (1, 28, 28)) for name in STRUCTURES}
    title = f"width {width}, {torch.get_num_threads()} thread(s)"
    print(f"{title}: the pruned network has {macs['pruned'] / macs['dense']:.2f} of the MACs")
    first = f"{STRUCTURES[0]} {LAYOUTS[0]} {PLAIN}"
    report(title, {name: found for name, found in spent.items() if name.endswith(f" {PLAIN}")}, first)
    for structure, layout in itertools.product(STRUCTURES, LAYOUTS):
        alike = {name: found for name, found in spent.items() if name.startswith(f"{structure} {layout} ")}
        report(title, alike, f"{structure} {layout} {PLAIN}")


def main() -> None:
    known = [name for name in FORMATS if name in schema.OPTIONS["precision"]]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--formats", nargs="+", default=known, choices=known)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    prepare_process()
    for width in given.widths:
        measure(width, [PLAIN, *given.formats], given.rounds)


if __name__ == "__main__":
    main()
