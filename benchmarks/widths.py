"""What `prune.round_to=auto` is worth: ResNet-20 with random channels dead, cut to them and cut to what is fastest.

Each network has its own random share of dead channels a space, chosen so that the cut one has about half the MACs.
Training steps of the dense network and of both cuts alternate; batch 64, 32x32.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time

import torch
from interleaved import interleave
from torch import nn
from torch.nn import functional as F

from morphtrain.cost import count_macs
from morphtrain.model import ResNet
from morphtrain.morph import ChannelGraph
from morphtrain.prune.reconfigure import channels_to_keep, reconfigure
from morphtrain.prune.widths import WidthProbe
from morphtrain.trainer.process import prepare_process

BATCH, SHAPE = 64, (3, 32, 32)
IMAGES, LABELS = torch.randn(BATCH, *SHAPE), torch.randint(10, (BATCH,))
NETWORKS, ROUNDS = 5, 12


@torch.no_grad()
def half_dead(seed: int, rounded: bool, probe: WidthProbe) -> nn.Module:
    """A ResNet-20 of which about half the MACs are dead, after rounding or before it."""
    generator = torch.Generator().manual_seed(seed)
    low, high = 0.0, 1.0
    for _ in range(10):
        share = (low + high) / 2
        model = ResNet(blocks=3)
        graph = ChannelGraph.trace(model, IMAGES[:1])
        draws = {
            space.name: float(torch.rand((), generator=generator.manual_seed(seed + i)))
            for i, space in enumerate(graph.spaces)
        }
        for space in graph.spaces:
            dead = min(space.size - 1, int(space.size * share * (0.5 + draws[space.name])))
            for slot in space.slots:
                if slot.has_weights:
                    rows = torch.arange(slot.start, slot.start + dead)
                    getattr(slot.axis.module, slot.axis.tensors[0][0]).index_fill_(slot.axis.dim, rows, 0.0)
        cut = copy.deepcopy(model)
        reconfigure(ChannelGraph.trace(cut, IMAGES[:1]), round_to=probe if rounded else 1)
        if count_macs(cut, SHAPE) > count_macs(ResNet(blocks=3), SHAPE) / 2:
            low = share
        else:
            high = share
    return model


def step(model: nn.Module) -> None:
    F.cross_entropy(model(IMAGES), LABELS).backward()
    model.zero_grad()


def main() -> None:
    prepare_process()
    dense = ResNet(blocks=3)
    probe = WidthProbe(torch.device("cpu"), BATCH)
    macs = count_macs(dense, SHAPE)
    against_cut, efficiencies, plain = [], [], []
    for seed in range(0, 100 * NETWORKS, 100):
        model = half_dead(seed, True, probe)
        cut, rounded = copy.deepcopy(model), copy.deepcopy(model)
        reconfigure(ChannelGraph.trace(cut, IMAGES[:1]))
        start = time.perf_counter()
        reconfigure(ChannelGraph.trace(rounded, IMAGES[:1]), round_to=WidthProbe(torch.device("cpu"), BATCH))
        spent = time.perf_counter() - start
        variants = {"dense": dense, "cut": cut, "rounded": rounded}
        seconds = interleave({name: lambda m=m: step(m) for name, m in variants.items()}, rounds=ROUNDS)
        ratio = {
            name: statistics.median(a / b for a, b in zip(seconds["dense"], seconds[name], strict=True))
            for name in ("cut", "rounded")
        }
        reduction = {name: macs / count_macs(m, SHAPE) for name, m in variants.items()}
        pairs = [a / b for a, b in zip(seconds["rounded"], seconds["cut"], strict=True)]
        against_cut.append(statistics.median(pairs))
        efficiencies.append(ratio["rounded"] / reduction["rounded"])
        plain.append(ratio["cut"] / reduction["cut"])
        print(
            f"widths: network {seed // 100}: cut {reduction['cut']:.2f} x fewer MACs, {ratio['cut']:.2f} x faster; "
            f"rounded {reduction['rounded']:.2f} x fewer, {ratio['rounded']:.2f} x faster "
            f"(rounded / cut {against_cut[-1]:.3f}; probing {spent:.1f} s)"
        )
    worst, efficiency = max(against_cut), statistics.median(efficiencies)
    print(f"widths: rounded / cut, worst of {NETWORKS} = {worst:.3f}   limit 1.00 {'ok' if worst <= 1 else 'EXCEEDED'}")
    print(
        f"widths: speed-up / MAC reduction, median = {efficiency:.3f} (not rounded {statistics.median(plain):.3f})   "
        f"at least 0.75 {'ok' if efficiency >= 0.75 else 'MISSED'}"
    )
    if "-v" in sys.argv:
        for layer, seconds_of in sorted(probe.seconds.items(), key=lambda item: item[1]):
            print(f"{1e3 * seconds_of:8.3f} ms  {layer}")
        print([int(k.sum()) for k in channels_to_keep(ChannelGraph.trace(model, IMAGES[:1]), 1e-4, 1, probe).values()])


if __name__ == "__main__":
    main()
