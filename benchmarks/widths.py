"""How much time halving the MACs saves, by the widths that are left; and whether the table of layers foresees it.

    python widths.py [1] [2] [channels_last] [contiguous]      # threads and formats; the default is all of them

Half the MACs of ResNet-20 (width 16) and of ResNet-8 (width 64) go, batch 64, 32x32, in float32 and under bf16: the
channels with the least importance, which is drawn at random, so that no layer is spared. "ragged" are the widths that
lose least for half the MACs (`prune.round_to=1`), "ladder" the same in steps of 8 channels, and "measured" those that
lose least for their time by the table, with half the MACs or less. Their training steps take turns with those of the
dense network; efficiency is speed-up over MAC reduction, and "foreseen" the speed-up by the table.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from interleaved import interleave
from torch import nn
from torch.nn import functional as F

from morphtrain.cost import WidthCost, measured_cost
from morphtrain.cost.layer_steps import LADDER
from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph, Space
from morphtrain.prune.knapsack import within
from morphtrain.trainer.build import FORMATS
from morphtrain.trainer.process import prepare_process

BATCH, SHAPE = 64, (3, 32, 32)
IMAGES, LABELS = torch.randn(BATCH, *SHAPE), torch.randint(10, (BATCH,))
NETWORKS = {"ResNet-20, width 16": lambda: ResNet(blocks=3), "ResNet-8, width 64": lambda: ResNet(blocks=1, width=64)}
ROUNDS, SEEDS = 8, (1, 2, 3)
WANTED = 0.85

Autocast = Callable[[], AbstractContextManager[Any]]
Keep = dict[Space, torch.Tensor]


def bf16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


PRECISIONS: dict[str, Autocast] = {"float32": nullcontext, "bf16": bf16}


def step(model: nn.Module, images: torch.Tensor, autocast: Autocast) -> None:
    with autocast():
        loss = F.cross_entropy(model(images), LABELS)
    loss.backward()
    model.zero_grad()


def widths_of(keep: Keep) -> dict[Space, int]:
    return {space: int(mask.sum()) for space, mask in keep.items()}


def cut(graph: ChannelGraph, keep: Keep) -> nn.Module:
    twin = copy.deepcopy(graph)
    masks = zip(twin.spaces, (keep[space] for space in graph.spaces), strict=True)
    twin.reindex_spaces({space: mask.nonzero().flatten() for space, mask in masks})
    return twin.model


def by_time(graph: ChannelGraph, importance: Keep, seconds: WidthCost, flops: WidthCost) -> Keep:
    """The most time that half the MACs allow, to 1 %."""
    found: Keep = {}
    low, high = 0.0, 1.0
    while high - low > 0.01:
        middle = (low + high) / 2
        try:
            keep = within(graph, importance, seconds, middle * seconds(), multiple=LADDER)
        except ValueError:  # no widths are as fast as that
            low = middle
            continue
        if flops(widths_of(keep)) <= 0.5 * flops():
            low, found = middle, keep
        else:
            high = middle
    return found


def measure(title: str, graph: ChannelGraph, autocast: Autocast, seed: int) -> dict[str, float]:
    """The efficiency of each way to choose half the MACs."""
    flops, seconds = WidthCost(graph, "flops"), measured_cost(graph, BATCH, autocast)
    generator = torch.Generator().manual_seed(seed)
    importance = {space: torch.rand(space.size, generator=generator) for space in graph.spaces}
    half = 0.5 * flops()
    start = time.perf_counter()
    chosen = {
        "ragged": within(graph, importance, flops, half),
        "ladder": within(graph, importance, flops, half, multiple=LADDER),
        "measured": by_time(graph, importance, seconds, flops),
    }
    spent = time.perf_counter() - start
    networks = {"dense": graph.model, **{way: cut(graph, keep) for way, keep in chosen.items()}}
    networks["again"] = copy.deepcopy(graph.model)
    images = IMAGES.contiguous(
        memory_format=torch.channels_last if "channels_last" in title else torch.contiguous_format
    )
    times = interleave({way: partial(step, m, images, autocast) for way, m in networks.items()}, rounds=ROUNDS)

    def speedup(way: str) -> float:
        return statistics.median(a / b for a, b in zip(times["dense"], times[way], strict=True))

    efficiency = {}
    for way, keep in chosen.items():
        widths = widths_of(keep)
        fewer, lost = flops() / flops(widths), sum(float(importance[s][~mask].sum()) for s, mask in keep.items())
        efficiency[way] = speedup(way) / fewer
        print(
            f"{title}: seed {seed}, {way}: {fewer:.2f} x fewer MACs, {speedup(way):.2f} x faster "
            f"({efficiency[way]:.2f}), foreseen {seconds() / seconds(widths):.2f}; loses {lost:.1f}; "
            f"{list(widths.values())}",
            flush=True,
        )
    print(f"{title}: seed {seed}: dense / dense {speedup('again'):.3f}; widths chosen in {spent:.1f} s", flush=True)
    return efficiency


def main() -> None:
    prepare_process()
    threads = [int(word) for word in sys.argv[1:] if word.isdigit()] or [1, 2]
    formats = [word for word in sys.argv[1:] if word in FORMATS] or list(FORMATS)
    for number in threads:
        torch.set_num_threads(number)
        for layout in formats:
            for precision, autocast in PRECISIONS.items():
                for name, make in NETWORKS.items():
                    title = f"widths: {layout}, {precision}, {number} threads: {name}"
                    torch.manual_seed(0)
                    graph = ChannelGraph.trace(make().to(memory_format=FORMATS[layout]), IMAGES[:1])
                    start = time.perf_counter()
                    measured_cost(graph, BATCH, autocast)
                    print(f"{title}: the table in {time.perf_counter() - start:.1f} s", flush=True)
                    found = [measure(title, graph, autocast, seed) for seed in SEEDS]
                    for way in found[0]:
                        middle = statistics.median(efficiency[way] for efficiency in found)
                        held = (
                            "" if way == "ragged" else f"   at least {WANTED} {'ok' if middle >= WANTED else 'MISSED'}"
                        )
                        print(f"{title}: {way}: speed-up / MAC reduction, median = {middle:.2f}{held}", flush=True)


if __name__ == "__main__":
    main()
